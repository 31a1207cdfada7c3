"""scikit-learn's 1,797 real handwritten digits, 8×8 pixels, as images."""
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import List, Tuple

from PIL import Image
from sklearn.datasets import load_digits

__all__ = ['digits', 'write_digits']

TRAINING_IMAGES = 1437  # the rest is held out, as in scikit-learn's own example
SPLITS = {'train': True, 'validation': False}


def digits(training: bool) -> Tuple[List[Image.Image], List[int]]:
    """Images of 8×8 grey pixels and the digit that each shows.

    Args:
        training: The first 1,437 images if true, else the 360 held-out ones.

    Example:
        >>> from timm_smpconv.digits import digits
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

    Example:
        >>> import tempfile
        >>> from timm_smpconv.digits import write_digits
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(write_digits(folder))
        1797
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f'DIR must be an empty folder or a new one, got {folder}, which is no folder') from error
    present = next(folder.iterdir(), None)
    if present is not None:
        raise FileExistsError(f'DIR must be an empty folder or a new one, got {folder}, which holds {present.name}')
    try:
        return _write_whole(folder)
    except BaseException:
        with suppress(OSError):  # raised if another process has put something there
            for path in created:
                path.rmdir()
        raise


def _write_whole(folder: Path) -> List[Path]:
    """Write into a temporary folder inside `folder`, which itself cannot be replaced where it is a mount point."""
    staging = Path(tempfile.mkdtemp(prefix='.digits-', dir=folder))
    written: List[Path] = []
    complete = False
    try:
        for split, training in SPLITS.items():
            for i, (image, label) in enumerate(zip(*digits(training))):
                path = Path(split, str(label), f'{i:04}.png')
                (staging / path).parent.mkdir(parents=True, exist_ok=True)
                image.save(staging / path)
                written.append(folder / path)
        complete = True
        for split in SPLITS:
            (staging / split).rename(folder / split)
        staging.rmdir()
    except BaseException:
        for split in SPLITS:
            if complete and not (staging / split).exists():  # it was moved, so the one in `folder` is ours
                shutil.rmtree(folder / split, ignore_errors=True)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return written
