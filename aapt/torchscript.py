"""Networks with the user's weights, read from TorchScript files."""

from pathlib import Path

import torch
from torch import Tensor, nn


class TorchScriptFeatures(nn.Module):
    """The network of a TorchScript file as a function of images alone.

    kind: names the option in errors, and "fid" takes uint8 images, other kinds float32. ValueError
    if the file is missing or not a TorchScript network.
    """

    def __init__(self, kind: str, path: Path):
        super().__init__()
        wanted = f"{kind}: expected a TorchScript file, got {path}"
        try:
            if not path.is_file():
                raise ValueError(f"{wanted}: no such file")
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except OSError as error:
            raise ValueError(f"{wanted}: {error.strerror}") from None
        except RuntimeError:
            raise ValueError(wanted) from None
        known = ("return_features", "rescale", "resize")
        names = {argument.name for argument in self.network.forward.schema.arguments}
        self.arguments = {name: True for name in known if name in names}
        self.dtype = torch.uint8 if kind == "fid" else torch.float32
        self.message = f"{kind}: expected {path} to return features (N, D)"

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D) of N images. ValueError if the network returns anything else."""
        try:
            features = self.network(images.to(self.dtype), **self.arguments)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.message} of {tuple(images.shape)}: {reason}") from None
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ValueError(f"{self.message}, got {shape} for {len(images)} images")
        return features
