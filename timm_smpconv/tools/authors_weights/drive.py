"""Downloads of the authors' files from their drive by gdown; needs the extra `weights`.

gdown follows the drive's pages (the warning that a large file was not scanned for viruses is a form to send), checks
that a resumed download continues at the right byte, and raises if one ends early. Here is what is left: how far it is,
whether there is room, an end to waiting, and one sentence for everything that goes wrong.
"""
import html
import re
import shutil
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

import gdown
import requests
from gdown.exceptions import DownloadCancelled, DownloadError, FileURLRetrievalError
from tqdm import tqdm

from ..._errors import DataError

__all__ = ['arrived', 'download']

TIMEOUT = 60  # seconds without a byte
PATIENCE = 120  # seconds until the file begins: gdown would follow for ever a page that leads to itself (its issue 26)
RETRIES = 3  # of a connection that failed or broke off, a few seconds apart
# What gdown raises of a page that is not as it expects.
_STRANGE_PAGE = (AssertionError, AttributeError, LookupError, TypeError, ValueError)


def download(url: str, path: Path, name: str) -> None:
    """Download a file, or the rest of one.

    What has arrived stays in `path.parent` when this raises or is interrupted, and the next call goes on from there, if
    the drive lets it.

    Args:
        url: Of the file's page on the drive.
        path: Where the file goes, in a folder that nobody else uses. Nothing happens if it is there.
        name: For the progress bar, on stderr.

    Raises:
        DataError: The drive did not send the file, or there is no room for it.
        OSError: The file could not be written.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = _parts(path)
    for part in begun[1:]:  # gdown goes on with one only
        part.unlink()
    bar = _Bar(name, path.parent)
    try:
        try:
            _download(url, path, bar)
        except DownloadError as error:
            if isinstance(error, FileURLRetrievalError) or not begun or bar.began:
                raise
            begun[0].unlink()  # the drive does not send the rest of it: all of it, then
            _download(url, path, bar)
    except DownloadCancelled as error:
        raise DataError(f'{url} led to no file within {PATIENCE} seconds') from error
    except (DownloadError, requests.RequestException) as error:
        raise DataError(f'{url} could not be downloaded: {_reason(error)}') from error
    except _STRANGE_PAGE as error:
        raise DataError(
            f'{url} led to a page that gdown does not understand: {type(error).__name__} {_reason(error)}') from error
    finally:
        bar.close()


def arrived(path: Path) -> int:
    """Bytes that `download` has of a file."""
    return path.stat().st_size if path.exists() else sum(part.stat().st_size for part in _parts(path))


def _parts(path: Path) -> List[Path]:
    """Unfinished files, as gdown names them; the largest first."""
    return sorted(path.parent.glob(f'{path.name}*.part'), key=lambda part: -part.stat().st_size)


def _download(url: str, path: Path, bar: '_Bar') -> None:
    cancel = threading.Event()
    timer = threading.Timer(PATIENCE, cancel.set)
    timer.daemon = True
    timer.start()

    def progress(done: int, total: Optional[int]) -> None:
        timer.cancel()
        bar.show(done, total)

    options: Dict[str, Any] = dict(  # no cookies: gdown would write them to the home folder
        quiet=True, use_cookies=False, resume=True, timeout=TIMEOUT, retries=RETRIES)
    try:
        gdown.download(url, str(path), progress=progress, cancel=cancel, **options)
    finally:
        timer.cancel()


class _Bar:
    """A progress bar that begins with the first bytes, when the size is known, if there is room for the file."""

    def __init__(self, name: str, folder: Path):
        self._name = name
        self._folder = folder
        self._bar: Optional[tqdm] = None

    @property
    def began(self) -> bool:
        return self._bar is not None

    def show(self, done: int, total: Optional[int]) -> None:
        if self._bar is None:
            free = shutil.disk_usage(self._folder).free
            if total is not None and total - done > free:
                raise DataError(
                    f'{self._folder} must have room for {total - done:,} more bytes, got {free:,} bytes that are free')
            self._bar = tqdm(total=total, initial=done, desc=self._name, unit='B', unit_scale=True)
        else:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _reason(error: Exception) -> str:
    """What went wrong, in one line: what the drive's page says, without gdown's advice around it."""
    if isinstance(error, FileURLRetrievalError) and isinstance(error.__context__, FileURLRetrievalError):
        error = error.__context__
    text = html.unescape(re.sub(r'<[^>]*>', '', str(error))).strip().partition('\n')[0]
    return ' '.join(text.split()).rstrip('.') or type(error).__name__
