"""Where converted weights are kept for `pretrained=True` while the Hub has none.

In a folder CACHE:
- smpconv_tiny.in1k/: README.md, config.json and model.safetensors, put in place as a whole
- smpconv_tiny.in1k.download/: the authors' file, or what has arrived of it; deleted once it is converted
- smpconv_tiny.in1k.lock: held by the process that downloads, converts or removes
"""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union

from huggingface_hub import constants

from ..checkpoint import CheckpointError
from .sources import FILES

__all__ = ['cache_folder', 'check_cached', 'file_sha256', 'find_cached', 'origin_of']


def cache_folder(cache_dir: Union[str, Path, None] = None) -> Path:
    """The cache: `cache_dir`, or the place that huggingface_hub gives to libraries, `HF_ASSETS_CACHE` or in `HF_HOME`.

    Example:
        >>> cache_folder('weights').name, cache_folder().parts[-2:]
        ('weights', ('timm-smpconv', 'weights'))
    """
    return Path(cache_dir) if cache_dir else Path(constants.HF_ASSETS_CACHE, 'timm-smpconv', 'weights')


def find_cached(name: str, cache_dir: Union[str, Path, None] = None) -> Optional[Path]:
    """The folder of the weights model.tag in the cache, None if they are not there.

    Example:
        >>> find_cached('smpconv_tiny.in1k', 'an empty folder') is None
        True
    """
    folder = cache_folder(cache_dir) / name
    try:
        return folder if all((folder / file).is_file() for file in FILES) else None
    except PermissionError:  # the cache of another user; importing this package looks here
        return None


def origin_of(folder: Path) -> Dict[str, Any]:
    """What a converted folder says of itself: 'sha256' of the checkpoint, 'weights', 'file_sha256' of its own file.

    Raises:
        CheckpointError: It does not say it.
    """
    try:
        origin = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['origin']
        return {key: origin[key] for key in ('sha256', 'weights', 'file_sha256')}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'config.json must be that of converted weights, got another one in {folder} ({type(error).__name__} '
            f'{error}): run `timm-smpconv weights {folder.name} --remove`') from error


def check_cached(folder: Path, recorded: Optional[str]) -> None:
    """Refuse a folder whose file was damaged, or made of another checkpoint than the recorded one.

    Args:
        folder: As `find_cached` gives it.
        recorded: sha256 of the authors' file, None where nobody has recorded it.

    Raises:
        CheckpointError: It is refused.
    """
    origin = origin_of(folder)
    found = file_sha256(folder / 'model.safetensors')
    again = f'run `timm-smpconv weights {folder.name}` again'
    if found != origin['file_sha256']:
        raise CheckpointError(
            f'model.safetensors must have the sha256 {origin["file_sha256"]} with which it was written, got {found} in '
            f'{folder}: it was damaged; {again}')
    if recorded and origin['sha256'] != recorded:
        raise CheckpointError(
            f'the weights in {folder} must be made of the authors\' file of sha256 {recorded}, got one of '
            f'{origin["sha256"]}; {again}')


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
