"""Images in, video and figures out; no networks."""

from .image import load_image

__all__ = ["load_image"]
