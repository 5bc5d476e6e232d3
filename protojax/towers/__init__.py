"""Pretrained image and text towers from a local folder of weights, without PyTorch: `load(folder)`, then
`encode_images` and `encode_texts`; `protojax embed --weights=FOLDER` fills feature caches with them."""

from protojax.towers.model import ImageText, load

__all__ = ["ImageText", "load"]
