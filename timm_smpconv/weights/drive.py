"""Downloads of the authors' files from their drive by gdown.

gdown follows the drive's pages (the warning that a large file was not scanned for viruses is a form to send), checks
that a resumed download continues at the right byte, and raises if one ends early. Here is what is left: going on where
a connection broke off, an end to waiting, and one sentence for everything that goes wrong.
"""
import html
import re
import threading
from pathlib import Path
from typing import Callable, List, Optional, Tuple
from urllib.request import getproxies

from .._errors import DataError

__all__ = ['download', 'parts', 'timeout']

PATIENCE = 120  # seconds until the file begins: gdown would follow for ever a page that leads to itself (its issue 26)


def timeout(answer: float) -> Tuple[float, float]:
    """Seconds until there is a connection, and `answer`, those without a byte: soon without a network."""
    return (10 if getproxies().keys() - {'no'} else 1.3), answer  # a proxy's answer counts as the connection


def download(url: str, path: Path, progress: Callable[[int, Optional[int]], None]) -> None:
    """Download a file, or the rest of one.

    What has arrived stays beside `path` if this raises or is interrupted, and the next call goes on from there, if the
    drive lets it.

    Args:
        url: Of the file's page on the drive.
        path: Where the file goes. Nothing happens if it is there.
        progress: Is told the bytes that have arrived, and those of the whole file or None.

    Raises:
        DataError: The drive did not send the file, or it could not be written, or `progress` raised this.
    """
    import gdown  # 0.15 s that only a download takes
    import requests
    from gdown.exceptions import DownloadError, FileURLRetrievalError

    if path.exists():
        return

    def show(done: int, total: Optional[int]) -> None:
        patience.cancel()
        progress(done, total)

    anew = False
    while True:
        before, cancel = _size(path), threading.Event()
        patience = threading.Timer(PATIENCE, cancel.set)
        patience.daemon = True
        patience.start()
        try:
            gdown.download(  # no cookies: they would be written to the home folder
                url, str(path), quiet=True, use_cookies=False, resume=True, timeout=timeout(60), progress=show,
                cancel=cancel)
            return
        except DataError:
            raise
        except Exception as error:  # gdown raises KeyError and others of pages that it does not understand
            if _size(path) > before:
                continue  # the connection broke off: the rest
            if cancel.is_set():
                reason = f'no file came within {PATIENCE} seconds'
            elif isinstance(error, (requests.ConnectionError, requests.Timeout)):
                reason = f'there is no connection to it ({type(error).__name__})'  # also a proxy's or certificate's
            elif isinstance(error, FileURLRetrievalError):
                reason = _first_sentence(error.__context__ or error)  # the drive's, without gdown's advice around
            elif isinstance(error, DownloadError) and before and not anew:
                anew = True
                for part in parts(path):  # the drive does not send the rest of it: all of it, then
                    part.unlink()
                continue
            else:
                reason = f'{type(error).__name__}: {_first_sentence(error)}'
            raise DataError(f'{url} could not be downloaded: {reason}') from error
        finally:
            patience.cancel()


def parts(path: Path) -> List[Path]:
    """What has arrived of a file, as gdown names it."""
    return list(path.parent.glob(f'{path.name}????????.part'))


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in parts(path))


def _first_sentence(error: BaseException) -> str:
    text = html.unescape(re.sub(r'<[^>]*>', '', str(error)))
    return re.split(r'\.\s|\n', text.strip())[0].rstrip('.')
