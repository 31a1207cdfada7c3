"""Replaces a file, or a set of files or folders: all of them or none.

For a set, everything happens by renaming within one folder:

    FOLDER/
      NAME, ...                       what is replaced
      .timm-smpconv.lock              held while files move
      .timm-smpconv-1f2e3d4c/         one per run
        new/NAME, ...                 written by the caller
        old/NAME, ...                 the earlier ones
        journal                       exists while files move: each NAME with the inode of its new file or folder

A replacement begins when its journal appears and is complete when the journal is deleted. Whoever finds a journal while
holding the lock rolls that replacement back: the process that failed, or the next one if that was killed. Without a
journal, a run's folder holds nothing but garbage. A process that is killed may leave such a folder behind.
"""
import json
import os
import secrets
import shutil
import signal
import stat
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Generator, Sequence

if sys.platform != 'win32':
    import fcntl

__all__ = ['is_ours', 'replace_together', 'write_whole']

_PREFIX = '.timm-smpconv'
_ATTEMPTS = 1000  # to take a lock. One fails when the process that held it deletes the file, so many may


def is_ours(path: Path) -> bool:
    """Whether a file or folder is one that `replace_together` keeps beside its results while it works.

    Example:
        >>> is_ours(Path('folder/.timm-smpconv.lock'))
        True
    """
    return path.name.startswith(_PREFIX)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or leave the earlier one as it is.

    Raises:
        OSError: The file could not be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, 'a'), b'new')
        ...     [path.name for path in Path(folder).iterdir()]
        ['a']
    """
    part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def replace_together(folder: Path, names: Sequence[str], check: Callable[[Path], None]) -> Generator[Path, None, None]:
    """Give a folder to write into; at the end, move what was written to its place, all of it or nothing.

    On an error or an interrupt, earlier files stay as they are and new ones are deleted. SIGTERM and SIGHUP act as
    Ctrl-C does; once files move, they wait until all are in place. Several processes may write to the same place at
    once; the last one to finish wins. (Windows has no such lock: there, run one process at a time.) New files and
    folders get the permissions that the umask gives, where the file system has permissions.

    Args:
        folder: Where the results go. Created if missing, and removed again if nothing was written.
        names: The files or folders within it. The caller has to write every one of them.
        check: Raises if a path must not be replaced. Called for every path before the caller writes, and again just
            before files move.

    Raises:
        KeyboardInterrupt: Interrupted. Its message says what was written.
        OSError: Something could not be written. Nothing was, unless the message says so.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replace_together(Path(folder), ['a', 'b'], check=lambda path: None) as new:
        ...         for name in 'a', 'b':
        ...             _ = (new / name).write_text('new')
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a', 'b']
    """
    staging = folder / f'{_PREFIX}-{secrets.token_hex(4)}'
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    inodes: Dict[str, int] = {}

    def check_all() -> None:
        for name in names:
            check(folder / name)

    interrupts = _Interrupts()
    try:
        with interrupts:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with _consistent(folder):
                    check_all()
                for part in 'new', 'old':
                    (staging / part).mkdir(parents=True)
                interrupts.allow()
                yield staging / 'new'
                interrupts.allowed = False
                _apply_umask(staging / 'new')
                with _consistent(folder):
                    check_all()
                    inodes.update((name, (staging / 'new' / name).lstat().st_ino) for name in names)
                    _replace(staging, inodes)
            finally:
                interrupts.allowed = False
                _clean_up(staging, created)
        if interrupts.received:
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        outcome = _outcome(folder, inodes)
        if interrupts.received or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(outcome or 'nothing was written') from error
        if outcome and isinstance(error, OSError):
            raise OSError(f'{outcome}, but {error}') from error
        raise


class _Interrupts:
    """Makes SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once, where that is allowed; else they wait."""

    def __init__(self) -> None:
        self.allowed = False
        self.received = False
        self._handlers: Dict[int, Any] = {}

    def allow(self) -> None:
        self.allowed = True
        if self.received:
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other one gets signals
            for number in (getattr(signal, name, None) for name in ('SIGINT', 'SIGTERM', 'SIGHUP')):
                if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._handlers[number] = signal.signal(number, self._handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, *args: object) -> None:
        self.received = True
        if self.allowed:
            self.allowed = False
            raise KeyboardInterrupt


def _replace(staging: Path, inodes: Dict[str, int]) -> None:
    journal = staging / 'journal'
    write_whole(journal, json.dumps(inodes).encode())
    for name in inodes:
        target = staging.parent / name
        if os.path.lexists(target):
            target.replace(staging / 'old' / name)
        (staging / 'new' / name).replace(target)
    journal.unlink()


def _roll_back(staging: Path) -> None:
    journal = staging / 'journal'
    for name, inode in json.loads(journal.read_text(encoding='utf-8')).items():
        target, old = staging.parent / name, staging / 'old' / name
        try:
            if _has_inode(target, inode):
                target.replace(staging / 'new' / name)
            if os.path.lexists(old):
                if os.path.lexists(target):
                    raise FileExistsError('another file or folder is there now')
                old.replace(target)
        except OSError as error:
            raise OSError(f'could not move {old} back to {target}: {error}') from error
    journal.unlink()


def _has_inode(path: Path, inode: int) -> bool:
    """Whether this is the file or folder of that inode, which it keeps when it is renamed."""
    try:
        return path.lstat().st_ino == inode
    except FileNotFoundError:
        return False


def _outcome(folder: Path, inodes: Dict[str, int]) -> str:
    """What was written, read from the disk; empty if nothing was."""
    written = [str(folder / name) for name, inode in inodes.items() if _has_inode(folder / name, inode)]
    return f'{", ".join(written)} {"were" if written[1:] else "was"} written' if written else ''


def _clean_up(staging: Path, created: Sequence[Path]) -> None:
    if staging.parent.is_dir():
        with _consistent(staging.parent):
            if staging.exists():
                shutil.rmtree(staging)
    for path in created:
        with suppress(OSError):  # not empty: something was written
            path.rmdir()


@contextmanager
def _consistent(folder: Path) -> Generator[None, None, None]:
    """Hold the lock of a folder, without a replacement that is half done."""
    with _lock(folder):
        for journal in sorted(folder.glob(f'{_PREFIX}-*/journal')):
            _roll_back(journal.parent)
            shutil.rmtree(journal.parent)
        yield


@contextmanager
def _lock(folder: Path) -> Generator[None, None, None]:
    if sys.platform == 'win32':
        yield
        return
    path = folder / f'{_PREFIX}.lock'
    for _ in range(_ATTEMPTS):
        with path.open('w') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _has_inode(path, os.fstat(file.fileno()).st_ino):  # deleted by the process that held it
                continue
            try:
                yield
            finally:
                path.unlink()
            return
    raise OSError(f'{path} must have one inode number for its path and when it is open, got two {_ATTEMPTS} times')


def _apply_umask(new: Path) -> None:
    """Give all files the permissions of ordinary ones: safetensors writes files that only their owner may read."""
    mode = stat.S_IMODE(new.stat().st_mode)  # of an ordinary mkdir
    for path in new.rglob('*'):
        with suppress(OSError):  # a file system without permissions, such as vfat
            path.chmod(mode if path.is_dir() else mode & 0o666)
