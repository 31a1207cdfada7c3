"""timm's RandAugment with Pillow 13: importing this module mends it, as the recipes of the image networks do.

They ask for a magnitude of 9 with a deviation of 0.5. From 10 on timm keeps 0 bits of each colour, which is black, and
which `PIL.ImageOps.posterize` refuses since Pillow 13 (timm 1.0.31).
"""
from typing import Any

from PIL import Image
from timm.data import auto_augment

__all__ = ['posterize']


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """The image with the highest bits of each colour, 0 to 8 of them.

    Example:
        >>> posterize(Image.new('L', (1, 1), 200), 0).getpixel((0, 0))
        0
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


for _name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
    auto_augment.NAME_TO_OP[_name] = posterize
