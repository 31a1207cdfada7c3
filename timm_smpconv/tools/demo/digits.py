"""scikit-learn's 1,797 real handwritten digits as images of 8×8 pixels."""
from pathlib import Path
from typing import List, Tuple

from PIL import Image
from sklearn.datasets import load_digits

from ..._files import written_beside

__all__ = ['digits', 'write_digits']

TRAINING_IMAGES = 1437  # the rest is held out, as in scikit-learn's own example
SPLITS = {'train': True, 'validation': False}


def digits(training: bool) -> Tuple[List[Image.Image], List[int]]:
    """Images of 8×8 grey pixels, and the digit that each of them shows.

    Args:
        training: Whether to return the first 1,437 images, or else the 360 held-out ones.

    Example:
        >>> from timm_smpconv.tools.demo.digits import digits
        >>> images, labels = digits(training=False)
        >>> images[0].size, len(labels)
        ((8, 8), 360)
    """
    data = load_digits()
    part = slice(0, TRAINING_IMAGES) if training else slice(TRAINING_IMAGES, None)
    images = [Image.fromarray((image * (255 / 16)).astype('uint8')) for image in data.images[part]]
    return images, [int(label) for label in data.target[part]]


def write_digits(folder: Path) -> List[Path]:
    """Write the digits as an ImageFolder: `train` and `validation`, each with one folder per digit.

    An error or an interrupt leaves nothing behind.

    Args:
        folder: Is created if it does not exist. May be the current directory, a link to a folder or a mount point.

    Returns:
        The paths of the images.

    Raises:
        FileExistsError: The folder is not empty.
        NotADirectoryError: It is a file.

    Example:
        >>> import tempfile
        >>> from timm_smpconv.tools.demo.digits import write_digits
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(write_digits(folder))
        1797
    """
    folder = Path(folder)
    if others := sorted(folder.glob('*')):
        raise FileExistsError(f'DIR must be an empty folder or a new one, got {folder}, which holds {others[0].name}')
    written = []
    with written_beside(folder) as new:
        for split, training in SPLITS.items():
            for i, (image, label) in enumerate(zip(*digits(training))):
                path = Path(split, str(label), f'{i:04}.png')
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                image.save(new / path)
                written.append(folder / path)
    return written
