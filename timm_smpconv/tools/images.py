"""Images as inputs for a network: files in folders, prepared as the model's own data configuration says."""
from pathlib import Path
from typing import IO, Any, Dict, Iterable, Iterator, List, Optional, Union

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, get_img_extensions, resolve_data_config

__all__ = ['data_config', 'find_images', 'open_image', 'own_size', 'read_images']


def find_images(folder: Path, count: Optional[int] = None) -> List[Path]:
    """The images in a folder and below, in the order of their names.

    Args:
        folder: Is searched recursively. Files with timm's image suffixes count as images, hidden files do not.
        count: Return at most this number of images, evenly spaced, because folders are often sorted by class.

    Raises:
        ValueError: There are no images, or `folder` is not a folder.

    Example:
        >>> find_images(Path('nowhere'))
        Traceback (most recent call last):
        ValueError: images must be in a folder, got nowhere
    """
    if not folder.is_dir():
        raise ValueError(f'images must be in a folder, got {folder}')
    suffixes = get_img_extensions(as_set=True)
    found = sorted(
        p for p in folder.rglob('*')
        if p.suffix.lower() in suffixes and not p.name.startswith('.') and not p.is_dir())
    if not found:
        raise ValueError(f'images must be in a folder with files *.png, *.jpg or *.jpeg in it or below, got {folder}')
    count = min(count or len(found), len(found))
    return [found[i * len(found) // count] for i in range(count)]


def own_size(model: nn.Module) -> int:
    """Height and width of the images that a timm model is made for, in pixels.

    Example:
        >>> import timm
        >>> own_size(timm.create_model('smpconv_mobile31', device='meta'))
        224
    """
    return resolve_data_config({}, model=model)['input_size'][-1]


def read_images(files: Iterable[Path], model: nn.Module, size: int) -> Iterator[torch.Tensor]:
    """Images as inputs for a timm model, one at a time: resized, cropped and normalized by the model's transform.

    Args:
        files: Images of any size.
        model: A model for images of three channels or one.
        size: Height and width, in pixels.

    Returns:
        Batches (1, C, size, size).

    Raises:
        ValueError: A file is not an image, or the model does not accept such channels or this size.

    Example:
        >>> import tempfile, timm
        >>> model = timm.create_model('smpconv_mobile31', device='meta')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new('L', (30, 50)).save(f'{folder}/a.png')
        ...     [x.shape for x in read_images(find_images(Path(folder)), model, 64)]
        [torch.Size([1, 3, 64, 64])]
    """
    config = data_config(model, size)
    channels, transform = config['input_size'][0], create_transform(**config, is_training=False)
    return (transform(open_image(file, channels, file)).unsqueeze(0) for file in files)


def data_config(model: nn.Module, size: Optional[int] = None, **given: Any) -> Dict[str, Any]:
    """How images are prepared for a timm model: what `timm.data.create_transform` takes.

    Args:
        model: A model for images of three channels or one.
        size: Height and width, in pixels, by default the model's own.
        given: Settings that replace the model's own.

    Raises:
        ValueError: The model does not accept such channels or this size.
    """
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if channels not in (1, 3):
        raise ValueError(f'model must take images of 1 or 3 channels, got {type(model).__name__} of {channels}')
    fixed = (getattr(model, 'pretrained_cfg', None) or {}).get('fixed_input_size')
    if fixed and size not in (None, own_size(model)):
        raise ValueError(f'image_size must be {own_size(model)} for {type(model).__name__}, got {size}')
    size = size or own_size(model)
    config = resolve_data_config({'input_size': (channels, size, size)}, model=model)
    if channels == 1:
        config.update((key, (sum(config[key]) / len(config[key]),)) for key in ('mean', 'std'))
    return {**config, **given}


def open_image(file: Union[Path, IO[bytes]], channels: int, name: object) -> Image.Image:
    """An image of three channels or one.

    Raises:
        ValueError: The file is not an image, or damaged; `name` is how the error calls it.
    """
    try:
        with Image.open(file) as image:
            return image.convert('RGB' if channels == 3 else 'L')
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a damaged PNG
        raise ValueError(f'images must be files that Pillow reads, got {name}: {error}') from error
