"""`timm-smpconv weights`: the authors' weights into the cache, a list of what there is, and their removal."""
import logging
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Generator, List, Optional, Tuple

from filelock import FileLock, Timeout

from ..._errors import DataError
from ...weights.checkpoint import CheckpointError
from ...weights.hub import FILES, cache_folder, check_cached, file_sha256, find_cached, load_sources, origin_of
check_replaceable = convert = None  # type: ignore  # the other part of issue 25 replaces this file

__all__ = ['fetch', 'listing', 'remove']

_logger = logging.getLogger(__name__)
Say = Callable[[str], None]


def fetch(
        name: str,
        file: Optional[Path] = None,
        cache_dir: Optional[Path] = None,
        say: Say = _logger.info,
) -> Path:
    """Put the authors' weights into the cache, converted and verified, from which `pretrained=True` takes them.

    Weights that are there stay as they are. Several processes may do this at once: one downloads, the others wait.

    Args:
        name: 'smpconv_tiny' or 'smpconv_tiny.in1k'.
        file: The authors' file, if it was downloaded already. It stays where it is.
        cache_dir: The cache, by default that of `cache_folder`.
        say: Is told what is going on.

    Returns:
        The folder.

    Raises:
        ValueError: NAME is no model.
        DataError: There are no such weights, they could not be downloaded, or the file is not the authors' or damaged.
        OSError: Something could not be read or written.
        ModuleNotFoundError: A download needs the extra `weights`.
    """
    name, entry = _find(name)
    origin = entry['origin']
    if not origin:
        raise DataError(
            f'there are no weights of {entry["model"]}: the authors published none. Train it with timm\'s train.py and '
            f'the recipe that `timm-smpconv recipe {entry["recipe"]}` names')
    folder = cache_folder(cache_dir) / name

    def check() -> bool:
        if not find_cached(name, cache_dir):
            return False
        made_of = origin_of(folder)['sha256']
        check_cached(folder, origin['sha256'])
        say(f'{folder} is there already, made of a file of sha256 {made_of}')
        return True

    with suppress(CheckpointError, OSError):  # without the lock, which a cache that is only read does not allow
        if check():
            return folder
    with _lock(name, cache_dir, say):
        if find_cached(name, cache_dir):
            origin_of(folder)
            try:
                check()
                return folder
            except CheckpointError as error:
                say(f'{error}: replacing it')
        download = folder.with_name(f'{name}.download')
        check_replaceable(folder, file or download / 'checkpoint')  # before anything is downloaded
        if file:
            say(f'{name} from {file}, {_licence(entry)}')
            _convert(file, entry, folder, say)
        else:
            downloaded = _download(name, entry, download, say)
            try:
                _convert(downloaded, entry, folder, say)
            except DataError as error:
                shutil.rmtree(download)
                raise DataError(f'{error}; the downloaded file was deleted') from error
            shutil.rmtree(download)
        return folder


def listing(cache_dir: Optional[Path] = None) -> Generator[str, None, None]:
    """A line for each of the weights: name, what the cache has, and the authors' file, its size and licence."""
    yield f'cache: {cache_folder(cache_dir)}'
    rows: List[Tuple[str, ...]] = [('weights', 'in the cache', "authors' file", 'licence', 'source')]
    for name, entry in load_sources().items():
        origin = entry['origin']
        size = f'{origin["bytes"] / 1e6:.1f} MB' if origin and origin['bytes'] else 'size unknown'
        source = (size, entry['license'].upper(), origin['file']) if origin else ('none', '', '')
        rows.append((name, _state(name, cache_dir), *source))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def remove(name: str, cache_dir: Optional[Path] = None, say: Say = _logger.info) -> None:
    """Delete weights from the cache, and what was downloaded of them.

    Raises:
        ValueError: NAME is no model, or the cache has no weights of it.
        DataError: Other files are in their place.
        OSError: Something could not be deleted.
    """
    name, _ = _find(name)
    folder = cache_folder(cache_dir) / name
    download = folder.with_name(f'{name}.download')
    found = [path for path in (folder, download) if path.exists()]
    if not found:
        raise ValueError(f'NAME must be that of weights in the cache {folder.parent}, got {name}')
    others = [path for path in _files(folder) if path.name not in FILES or path.parent != folder]
    if others:
        raise DataError(f'{folder} must hold nothing but {", ".join(FILES)} to be removed, got {others[0]}')
    with _lock(name, cache_dir, say):
        for path in found:
            size = _size(path)
            # The configuration last: it tells that what an interrupt leaves may be replaced.
            for file in sorted(_files(path), key=lambda file: file.name == 'config.json'):
                file.unlink()
            if path.is_dir():
                shutil.rmtree(path)
            say(f'removed {path}, {size / 1e6:.1f} MB')


def _find(name: str) -> Tuple[str, Dict[str, Any]]:
    """Name and entry in sources.yaml of model or model.tag."""
    entries = load_sources()
    for listed, entry in entries.items():
        if name in (listed, entry['model']):
            return listed, entry
    raise ValueError(f'NAME must be one of {", ".join(entry["model"] for entry in entries.values())}, got {name!r}')


def _licence(entry: Dict[str, Any]) -> str:
    return f'licence {entry["license"].upper()} ({entry["origin"]["page"]})'


def _state(name: str, cache_dir: Optional[Path]) -> str:
    folder = find_cached(name, cache_dir)
    if folder:
        return f'{_size(folder) / 1e6:.1f} MB'
    download = cache_folder(cache_dir) / f'{name}.download'
    return f'{_size(download) / 1e6:.1f} MB of a download' if download.is_dir() else 'no'


def _files(path: Path) -> List[Path]:
    """A file itself, or those in a folder and below."""
    return [found for found in (path, *path.rglob('*')) if found.is_file()]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


@contextmanager
def _lock(name: str, cache_dir: Optional[Path], say: Say) -> Generator[None, None, None]:
    path = cache_folder(cache_dir) / f'{name}.lock'
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f'waiting for another process that works on {name}')
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(name: str, entry: Dict[str, Any], folder: Path, say: Say) -> Path:
    """The authors' file, complete."""
    from .drive import arrived, download  # needs the extra `weights`
    origin, path = entry['origin'], folder / 'checkpoint'
    size = f'{origin["bytes"]:,} bytes' if origin['bytes'] else 'of unknown size'
    say(f'{name} from {origin["file"]}, {size}, {_licence(entry)}')
    if arrived(path):
        say(f'{arrived(path):,} bytes of it are here from an earlier attempt')
    try:
        download(origin['file'], path, name)
    except DataError as error:
        raise DataError(
            f'{error}. If it persists, download the file with a browser and run `timm-smpconv weights {name} --file '
            'FILE`') from error
    finally:
        if not arrived(path):
            shutil.rmtree(folder, ignore_errors=True)
        elif not path.exists():
            say(f'{arrived(path):,} bytes are kept for the next attempt')
    return path


def _convert(file: Path, entry: Dict[str, Any], folder: Path, say: Say) -> None:
    origin = entry['origin']
    found = file_sha256(file)
    say(f'{file.stat().st_size:,} bytes, sha256 {found}')
    if origin['sha256'] and found != origin['sha256']:
        raise CheckpointError(
            f'the file must have the sha256 {origin["sha256"]} that is recorded for it, got {found}: the download was '
            'damaged, or the authors replaced their file')
    (written,) = convert(file, entry['model'], folder, tag=entry['tag'], say=say)
    say(f'{written.folder}: the logits differ by {written.difference:.1e} relative from those of the checkpoint')
    if not origin['sha256']:
        say(
            f'This sha256 is not recorded yet. Please report it, with the size, to the maintainers of timm-smpconv for '
            f'`origin` of {folder.name} in sources.yaml: later downloads are then checked')
