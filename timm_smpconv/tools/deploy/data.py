"""Inputs that files are compared on: the user's images, or photographs, digits and noise.

Shapes: N inputs, C channels, H and W height and width, L length of a sequence.
"""
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import create_dataset, create_transform

from ..images import open_image
from .network import Network

__all__ = ['Inputs', 'read_data', 'samples']

RANDOM = 16


class Inputs(NamedTuple):
    """Inputs, and what is known of them.

    Attributes:
        x: Pixels in uint8, (N, C, H, W), or sequences in float32, (N, C, L).
        labels: Their classes, (N,), where they are known.
        own: Whether they are the user's.
    """
    x: torch.Tensor
    labels: Optional[torch.Tensor] = None
    own: bool = False


def samples(network: Network) -> Inputs:
    """16 random inputs; of images ten more: two photographs and eight digits, all from scikit-learn."""
    generator = torch.Generator().manual_seed(0)
    size = (RANDOM, *network.input_size)
    if not network.data:
        return Inputs(torch.randn(size, generator=generator))
    from sklearn.datasets import load_sample_images

    from ..demo.digits import digits
    images = [*map(Image.fromarray, load_sample_images().images), *digits(training=False)[0][:8]]
    transform, mode = _transform(network), 'RGB' if network.input_size[0] == 3 else 'L'
    x = torch.stack([torch.as_tensor(transform(image.convert(mode))) for image in images])
    return Inputs(torch.cat([x, torch.randint(256, size, dtype=torch.uint8, generator=generator)]))


def read_data(
        folder: Path,
        network: Network,
        calibration: int,
        limit: int,
) -> Tuple[torch.Tensor, Inputs, List[str]]:
    """Images for calibration, others to measure on, and the names of the classes.

    A folder `train` and a folder `validation` (or `val`, as timm finds them) are these two parts, else every other
    image. Images in folders are labelled by the names of these, images directly in a part are not labelled.

    Args:
        folder: Of images.
        network: Says how they are prepared.
        calibration: How many images to take for calibration at most, evenly spaced.
        limit: How many to measure on at most.

    Raises:
        ValueError: There are no images, one cannot be read, or the parts have other classes.
    """
    if not network.data:
        raise ValueError(f'--data must go with a network of images, got {network.model}')
    try:
        train, validation = (create_dataset(
            '', str(folder), split, transform=_transform(network)) for split in ('train', 'validation'))
    except RuntimeError as error:  # of timm, which finds none
        raise ValueError(f'--data must be a folder with images in it or below, got {folder}') from error
    parts = [part for part in (train, validation) if Path(part.reader.root) != folder]
    if len(parts) == 1:
        found = Path(parts[0].reader.root).name
        raise ValueError(f'--data must have folders train and validation, or neither, got {found} alone in {folder}')
    whole = range(len(train))
    if len(parts) == 2:
        indices: Sequence[Sequence[int]] = whole, range(len(validation))
    else:
        indices = whole[::2], whole[1::2]
    classes = list(train.reader.class_to_idx)
    labelled = network.task == 'classification' and '' not in classes
    if not all(indices) or (labelled and classes != list(validation.reader.class_to_idx)):
        raise ValueError(f'--data must have images of the same classes in both parts, got {folder}')
    channels = network.input_size[0]
    x, _ = _read(train, indices[0], calibration, channels)
    measured, labels = _read(validation, indices[1], limit, channels)
    return x, Inputs(measured, labels if labelled else None, own=True), classes if labelled else []


def _read(dataset: Any, indices: Sequence[int], count: int, channels: int) -> Tuple[torch.Tensor, torch.Tensor]:
    count = min(count, len(indices))
    images, labels = [], []
    for i in (indices[i * len(indices) // count] for i in range(count)):
        file, label = dataset.reader[i]  # for one that it cannot read, the dataset itself takes the next
        with file:
            image = open_image(file, channels, dataset.filename(i))
        images.append(torch.as_tensor(dataset.transform(image)))
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def _transform(network: Network) -> Any:
    """From a PIL image to uint8, (C, H, W): timm prepares pixels so for a loader that normalises them."""
    size: Any = tuple(network.input_size)
    return create_transform(size, **network.data, is_training=False, use_prefetcher=True)
