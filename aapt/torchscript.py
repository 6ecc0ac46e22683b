"""Networks in TorchScript files, whose weights the user brings."""

from pathlib import Path

import torch
from torch import Tensor, nn


class TorchScriptFeatures(nn.Module):
    """The network of a file as a function of its pictures alone."""

    def __init__(self, kind: str, path: Path):
        super().__init__()
        if not path.is_file():
            raise ValueError(f"{kind}: expected a TorchScript file, got {path}: no such file")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError:
            raise ValueError(f"{kind}: expected a TorchScript file, got {path}") from None
        known = ("return_features", "rescale", "resize")
        names = {argument.name for argument in self.network.forward.schema.arguments}
        self.arguments = {name: True for name in known if name in names}
        self.dtype = torch.uint8 if kind == "fid" else torch.float32
        self.message = f"{kind}: expected {path} to return features (N, D)"

    def forward(self, pictures: Tensor) -> Tensor:
        try:
            features = self.network(pictures.to(self.dtype), **self.arguments)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.message} of {tuple(pictures.shape)}: {reason}") from None
        if (
            not isinstance(features, Tensor)
            or features.dim() != 2
            or len(features) != len(pictures)
        ):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ValueError(f"{self.message}, got {shape} for {len(pictures)} pictures")
        return features
