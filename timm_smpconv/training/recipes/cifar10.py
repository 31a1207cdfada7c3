"""CIFAR-10 with the paper's random crop, for which timm's train.py has no option: the dataset `torch/cifar10_padded`.

Importing this module registers the dataset with timm. The recipe of the CIFAR-10 network imports it (`device_modules`).
"""
import logging
from typing import Any, Callable, Tuple

from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import RandomCrop

__all__ = ['PaddedCIFAR10', 'register_dataset']

_logger = logging.getLogger(__name__)


class PaddedCIFAR10(CIFAR10):
    """torchvision's CIFAR-10, whose training images are padded by 4 black pixels and cropped at random.

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


def register_dataset(name: str, dataset: Callable[..., Any]) -> None:
    """Register a dataset with timm, so that `create_dataset` and `train.py --dataset` find it as `torch/NAME`.

    timm's table of datasets is private. If it cannot be found, this logs a warning, and timm then raises an error for
    the name.

    Args:
        name: The name in lower case, without 'torch/'.
        dataset: A function that is called with root, train and download.

    Example:
        >>> from timm.data import create_dataset
        >>> from timm_smpconv.training.recipes.cifar10 import register_dataset
        >>> register_dataset('three', lambda root, train, download: [1, 2, 3])
        >>> create_dataset('torch/three')
        [1, 2, 3]
    """
    try:
        from timm.data.dataset_factory import _TORCH_BASIC_DS
        _TORCH_BASIC_DS[name] = dataset
    except (ImportError, TypeError) as error:
        _logger.warning('timm has no dataset torch/%s: its table of datasets was not found (%s)', name, error)


register_dataset('cifar10_padded', PaddedCIFAR10)
