"""scikit-learn's 1,797 real handwritten digits, 8×8 pixels, as images."""
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, List, Tuple

from PIL import Image
from sklearn.datasets import load_digits

__all__ = ['digits', 'write_digits']

TRAINING_IMAGES = 1437  # the rest is held out, as in scikit-learn's own example


def digits(training: bool) -> Tuple[List[Image.Image], List[int]]:
    """Images of 8×8 grey pixels, and which digit each shows."""
    data = load_digits()
    part = slice(0, TRAINING_IMAGES) if training else slice(TRAINING_IMAGES, None)
    images = [Image.fromarray((image * (255 / 16)).astype('uint8')) for image in data.images[part]]
    return images, [int(label) for label in data.target[part]]


def write_digits(folder: Path) -> Iterator[Path]:
    """Write the digits as an ImageFolder: `train` and `validation`, each with a folder for every digit.

    The folder appears when it is complete, not before.

    Raises:
        FileExistsError: The folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'DIR must not exist or be empty, got {folder}')
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix='.digits-', dir=folder.parent))
    try:
        for split, training in (('train', True), ('validation', False)):
            for i, (image, label) in enumerate(zip(*digits(training))):
                path = staging / split / str(label) / f'{i:04}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                yield path
        staging.chmod(0o755)
        Path(staging).replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
