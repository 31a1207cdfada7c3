"""CIFAR-10 with the paper's random crop, which timm's train.py has no option for: the dataset `torch/cifar10_padded`.

Importing this module registers the dataset with timm. The recipe of the CIFAR-10 network does (`device_modules`).
"""
from typing import Any, Tuple

from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import RandomCrop

from .compat import register_dataset

__all__ = ['PaddedCIFAR10']


class PaddedCIFAR10(CIFAR10):
    """torchvision's CIFAR-10 whose training images are cropped at random after padding by 4 black pixels.

    Example:
        >>> from timm.data import create_dataset
        >>> create_dataset('torch/cifar10_padded', root='nowhere', split='train')
        Traceback (most recent call last):
        RuntimeError: Dataset not found or corrupted. You can use download=True to download it
    """
    crop = RandomCrop(32, padding=4)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        if self.train:
            image = self.crop(image)
        return self.transform(image) if self.transform else image, self.targets[index]


register_dataset('cifar10_padded', PaddedCIFAR10)
