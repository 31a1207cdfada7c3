"""scikit-learn's 1,797 real handwritten digits as images of 8×8 pixels."""
import os
from pathlib import Path
from typing import List, Tuple

from PIL import Image
from sklearn.datasets import load_digits

from .._files import is_ours, replace_together

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
        FileExistsError: The folder is not empty, or is not a folder.
        KeyboardInterrupt: Interrupted by Ctrl-C, SIGTERM or SIGHUP. Its message says what was written.

    Example:
        >>> import tempfile
        >>> from timm_smpconv.tools.demo.digits import write_digits
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(write_digits(folder))
        1797
    """
    folder = Path(folder)
    rule = f'DIR must be an empty folder or a new one, got {folder}'
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not present.is_dir():
        raise FileExistsError(f'{rule}, which is no folder')

    def check_empty(path: Path) -> None:
        for other in folder.iterdir():
            if not is_ours(other):
                raise FileExistsError(f'{rule}, which holds {other.name}')

    written = []
    with replace_together(folder, list(SPLITS), check_empty) as new:
        for split, training in SPLITS.items():
            for i, (image, label) in enumerate(zip(*digits(training))):
                path = Path(split, str(label), f'{i:04}.png')
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                image.save(new / path)
                written.append(folder / path)
    return written
