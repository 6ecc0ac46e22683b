"""Networks with the user's weights, read from TorchScript files."""

from pathlib import Path

import torch
from torch import Tensor, nn


class TorchScriptNetwork(nn.Module):
    """The network of a TorchScript file as a function of images alone.

    Args:
        kind: Names the option in errors.
        returned: The result in words, for errors: "features (N, D)".
        shape: Of one image's result; -1 is any number.
        dtype: Of the images that the network takes.

    If its `forward` has arguments `return_features`, `rescale` or `resize`, they are set to true.
    ValueError if the file is missing or not a TorchScript network.
    """

    def __init__(
        self, kind: str, path: Path, returned: str, shape: tuple[int, ...], dtype: torch.dtype
    ):
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
        self.shape, self.dtype = shape, dtype
        self.message = f"{kind}: expected {path} to return {returned}"

    def forward(self, images: Tensor) -> Tensor:
        """Return the result for N images. ValueError if the network returns anything else."""
        try:
            found = self.network(images.to(self.dtype), **self.arguments)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.message} of {tuple(images.shape)}: {reason}") from None
        if not isinstance(found, Tensor) or not self._fits(found, len(images)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found)
            raise ValueError(f"{self.message}, got {shape} for {len(images)} images")
        return found

    def _fits(self, found: Tensor, count: int) -> bool:
        sizes = tuple(found.shape)
        return len(sizes) == 1 + len(self.shape) and all(
            wanted in (-1, size) for size, wanted in zip(sizes, (count, *self.shape), strict=True)
        )


class TorchScriptFeatures(TorchScriptNetwork):
    """A network that returns features (N, D).

    kind: names the option in errors, and "fid" takes uint8 images, other kinds float32.
    """

    def __init__(self, kind: str, path: Path):
        dtype = torch.uint8 if kind == "fid" else torch.float32
        super().__init__(kind, path, "features (N, D)", (-1,), dtype)
