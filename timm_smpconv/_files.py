"""Files and folders that are written beside their place and then renamed: an error or Ctrl-C leaves no half result."""
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generator

__all__ = ['check_no_folder', 'written_beside']


def check_no_folder(path: Path) -> None:
    """Refuse to write a file where a folder is, before the work begins.

    Raises:
        IsADirectoryError: A folder is there.
    """
    if path.is_dir():
        raise IsADirectoryError(f'{path} must be a file or not exist, got a folder')


@contextmanager
def written_beside(folder: Path) -> Generator[Path, None, None]:
    """Give an empty folder to write into; at the end, rename everything in it into `folder`.

    A file or a folder that is there is replaced. On an error or Ctrl-C, what was there stays, and what was written is
    deleted. Each file or folder is replaced as a whole, one after the other.

    Args:
        folder: Created if missing, and removed again if nothing was written.

    Raises:
        NotADirectoryError: It is a file, or below one.
        OSError: Something could not be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_beside(Path(folder)) as new:
        ...         _ = (new / 'a').write_text('new')
        ...     [path.name for path in Path(folder).iterdir()]
        ['a']
    """
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    present = created[-1].parent if created else folder
    if not present.is_dir():
        raise NotADirectoryError(f'{folder} must be a folder or a new one, got a file at {present}')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.timm-smpconv-', dir=folder) as new:
            yield Path(new)
            for path in sorted(Path(new).iterdir()):
                _replace(path, folder / path.name)
    finally:
        for path in created:
            with suppress(OSError):  # not empty: something was written
                path.rmdir()


def _replace(new: Path, target: Path) -> None:
    if not (new.is_dir() and target.is_dir()):
        new.replace(target)
        return
    old = new.with_name(f'{new.name}.old')  # since nothing can be renamed to a folder that is not empty
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
