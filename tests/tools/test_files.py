"""Replacing files and folders together: interrupted, killed or failing behind every system call, and two at once.

The oracle is the disk: what is there is all old or all new, and what is said agrees with it.
"""
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest

from timm_smpconv.tools import _files as files
from timm_smpconv.tools._files import replace_together, write_whole

NAMES = ('one', 'two', 'three')  # `three` has no earlier version
CALLS = (  # everything that changes the disk; the functions of os are those of shutil.rmtree
    (Path, 'replace'), (Path, 'mkdir'), (Path, 'rmdir'), (Path, 'unlink'), (Path, 'chmod'), (Path, 'write_text'),
    (Path, 'write_bytes'), (os, 'unlink'), (os, 'rmdir'), (fcntl, 'flock'))


class Killed(BaseException):
    """Nothing that the process does afterwards reaches the disk."""


def write(path, text, kind):
    if kind == 'folders':
        path.mkdir()
        path = path / 'file'
    path.write_text(text)


def content(folder):
    """name → text, of everything there."""
    return {
        path.name: (path / 'file').read_text() if path.is_dir() else path.read_text()
        for path in folder.iterdir()}


OLD = dict.fromkeys(NAMES[:2], 'old')
NEW = dict.fromkeys(NAMES, 'new')


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'folder'


def prepare(folder, kind):
    folder.mkdir()
    for name in OLD:
        write(folder / name, 'old', kind)


def replace(folder, kind, text='new'):
    with replace_together(folder, NAMES, check=lambda path: None) as new:
        for name in NAMES:
            write(new / name, text, kind)


def interrupt():
    signal.raise_signal(signal.SIGINT)  # whose handler runs at once


def fail():
    raise OSError('the disk is full')


def raise_interrupt():
    raise KeyboardInterrupt


def kill():
    raise Killed


def inject(monkeypatch, when, fault, at):
    """Have a fault before or behind each call that changes the disk whose number is in `at`; returns the calls."""
    calls = []

    def injected(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            n = len(calls)
            if (n in at and when == 'before') or (fault is kill and n > at[0]):
                fault()
            result = function(*args, **kwargs)
            if n in at and when == 'behind':
                fault()
            return result
        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, injected(getattr(owner, name)))
    return calls


def runs(monkeypatch, tmp_path, kind, when, fault, again=0):
    """Repeat with a fault at the first call, the second, …, until one is not reached: (folder, error or None)."""
    for n in range(1, 1000):
        folder = tmp_path / str(n)
        prepare(folder, kind)
        raised = None
        with monkeypatch.context() as patch:
            calls = inject(patch, when, fault, (n, n + again))
            try:
                replace(folder, kind)
            except BaseException as error:
                raised = error
        if len(calls) < n:
            assert n > 30 and raised is None and content(folder) == NEW
            return
        yield folder, raised


@pytest.mark.parametrize('kind', ['files', 'folders'])
@pytest.mark.parametrize('again', [0, 5])
@pytest.mark.parametrize('when', ['before', 'behind'])
def test_an_interrupt_at_every_system_call(kind, again, when, tmp_path, monkeypatch):
    """Once, and a second time `again` calls later."""
    outcomes = set()
    for folder, error in runs(monkeypatch, tmp_path, kind, when, interrupt, again):
        assert isinstance(error, KeyboardInterrupt)
        (said,) = error.args
        written = said == ', '.join(str(folder / name) for name in NAMES) + ' were written'
        assert written or said == 'nothing was written'
        assert content(folder) == (NEW if written else OLD)
        outcomes.add(written)
    assert outcomes == {True, False}


@pytest.mark.parametrize('kind', ['files', 'folders'])
@pytest.mark.parametrize('when', ['before', 'behind'])
@pytest.mark.parametrize('fault', [fail, raise_interrupt])
def test_an_error_at_every_system_call(kind, when, fault, tmp_path, monkeypatch):
    for folder, error in runs(monkeypatch, tmp_path, kind, when, fault):
        left = list(folder.glob('.timm-smpconv*'))
        assert not any((path / 'journal').exists() for path in left)
        for path in left:  # could not be deleted
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if error is not None:  # else a folder that could not be deleted because it is not empty
            expected, message = (OSError, 'the disk is full') if fault is fail else (KeyboardInterrupt, 'written')
            assert isinstance(error, expected) and message in str(error)
        assert content(folder) == (NEW if error is None or 'were written' in str(error) else OLD)


@pytest.mark.parametrize('kind', ['files', 'folders'])
@pytest.mark.parametrize('when', ['before', 'behind'])
def test_killed_at_every_system_call(kind, when, tmp_path, monkeypatch):
    """The next run finds all old or all new files, even if it fails itself."""
    left = []
    for folder, error in runs(monkeypatch, tmp_path, kind, when, kill):
        assert isinstance(error, Killed)
        complete = {path.name for path in folder.iterdir()} >= OLD.keys()
        with pytest.raises(ValueError, match='no'), replace_together(folder, NAMES, check=lambda path: None):
            raise ValueError('no')
        left.append(complete)
        for path in folder.glob('.timm-smpconv-*'):
            assert not (path / 'journal').exists()
            shutil.rmtree(path)
        assert content(folder) in (OLD, NEW)
    assert not all(left)  # some were killed while a file was in no place


# An interrupt between open() and the block that closes the file leaves that to the garbage collector.
@pytest.mark.filterwarnings('ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_an_interrupt_at_any_time(folder):
    """By a timer, so between any two instructions."""
    prepare(folder, 'files')
    seconds = min(timeit.repeat(lambda: replace(folder, 'files', 'old'), number=1))
    handler = signal.signal(signal.SIGALRM, lambda *args: interrupt())
    generator = random.Random(0)
    outcomes = []
    try:
        for i in range(150):
            said = None
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, generator.random() * 1.2 * seconds))
                replace(folder, 'files', str(i))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt as error:
                said = error.args[0] if error.args else ''
            now = content(folder)
            assert now.keys() == NEW.keys() and len(set(now.values())) == 1
            written = now['one'] == str(i)
            outcomes.append(written)
            assert said is None or not said or written == (said != 'nothing was written')
            assert said is not None or written
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert {True, False} == set(outcomes)


# Loads files.py alone, which takes milliseconds where the package takes seconds.
WRITER = f'''
import importlib.util, random, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
folder, tag, rounds, failing = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
replace, generator, failed = Path.replace, random.Random(tag), 0

def sometimes(path, target):
    if path.parent.name == "new" and generator.random() < failing:  # not while it rolls back
        raise OSError("failed")
    time.sleep(generator.random() * 1e-3)  # let the other process run in between
    return replace(path, target)

for i in range(rounds):
    try:
        with files.replace_together(folder, ["one", "two"], check=lambda path: None) as new:
            for name in "one", "two":
                (new / name).write_text(f"{{tag}} {{i}}")
            print("ready", flush=True)
            Path.replace = sometimes
    except OSError as error:
        failed += 1
    finally:
        Path.replace = replace
print(failed)
'''


def writer(folder, tag, rounds, failing=0.):
    return subprocess.Popen(
        [sys.executable, '-c', WRITER, str(folder), tag, str(rounds), str(failing)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_inode_of_a_path_that_another_process_deletes(tmp_path, monkeypatch):
    """The lock of a process that has just finished, say: it may be gone between two looks at it."""
    path = tmp_path / 'lock'
    path.touch()
    inode = path.lstat().st_ino
    assert files._has_inode(path, inode) and not files._has_inode(path, inode + 1)
    lstat = Path.lstat

    def delete_and_look(path):
        path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, 'lstat', delete_and_look)
    assert not files._has_inode(path, inode)


def test_two_processes_at_once(tmp_path):
    """A process that fails and rolls back never takes what the other one wrote."""
    folder = tmp_path / 'new' / 'folder'
    processes = [writer(folder, tag, 40) for tag in ('a', 'b')]
    for process in processes:
        assert process.communicate(timeout=60)[0].endswith('\n0\n'), 'no run failed'
    tags = {path.name: path.read_text() for path in folder.iterdir()}
    assert tags.keys() == {'one', 'two'} and tags['one'] == tags['two']

    processes = [writer(folder, 'good', 40), writer(folder, 'bad', 40, failing=1.)]
    out = [process.communicate(timeout=60)[0] for process in processes]
    assert out[0].endswith('\n0\n') and out[1].endswith('\n40\n')
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(('one', 'two'), 'good 39')


def test_a_process_that_is_killed_beside_another(tmp_path):
    for i in range(4):
        folder = tmp_path / str(i)
        other, killed = writer(folder, 'other', 20), writer(folder, 'killed', 1000)
        assert killed.stdout.readline() == 'ready\n'
        time.sleep(i * 5e-3)
        killed.kill()
        killed.communicate(timeout=60)
        assert other.communicate(timeout=60)[0].endswith('\n0\n')
        assert not list(folder.glob('*/journal'))
        assert (folder / 'one').read_text() == (folder / 'two').read_text()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_that_end_a_process_leave_nothing(tmp_path, number):
    code = WRITER.partition('replace, generator')[0] + '''
with files.replace_together(folder, ["one"], check=lambda path: None) as new:
    print("ready", flush=True)
    time.sleep(60)
'''
    process = subprocess.Popen(
        [sys.executable, '-c', code, str(tmp_path / 'folder'), '', '0', '0'], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: [
            signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)])
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert 'KeyboardInterrupt: nothing was written' in err and not list(tmp_path.iterdir())


def test_handlers_come_back(folder):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    replace(folder, 'files')
    assert before == [signal.getsignal(number) for number in numbers]


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
@pytest.mark.parametrize('kind', ['files', 'folders'])
def test_permissions_are_those_of_ordinary_files(folder, umask, kind):
    before = os.umask(umask)
    try:
        with replace_together(folder, ['one'], check=lambda path: None) as new:
            write(new / 'one', 'new', kind)
            for path in new.rglob('*'):
                path.chmod(0o700 if path.is_dir() else 0o600)
    finally:
        os.umask(before)
    for path in folder.rglob('*'):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_what_was_not_written_replaces_nothing(folder):
    prepare(folder, 'files')
    with (
            pytest.raises(FileNotFoundError, match='two'),
            replace_together(folder, NAMES, check=lambda path: None) as new):
        (new / 'one').write_text('new')
    assert content(folder) == OLD


def refuse_folders(path):
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder')


def test_checks_come_before_the_work_and_again_after_it(folder):
    folder.mkdir()

    def work(new):
        (new / 'one').write_text('new')
        (folder / 'one').mkdir()

    with pytest.raises(IsADirectoryError), replace_together(folder, ['one'], refuse_folders) as new:
        work(new)
    with pytest.raises(IsADirectoryError), replace_together(folder, ['one'], refuse_folders):
        pytest.fail('the work has begun')
    assert [path.name for path in folder.iterdir()] == ['one']


def test_what_came_into_the_place_of_a_file_is_kept(folder, monkeypatch):
    """Killed between the two renames; before the next run somebody writes a file of their own there."""
    prepare(folder, 'files')
    real = Path.replace

    def killed(path, target):
        real(path, target)
        if path == folder / 'one':
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', killed)
        patch.setattr(files, '_clean_up', lambda *args: None)
        with pytest.raises(Killed):
            replace(folder, 'files')
    (folder / 'one').write_text('mine')
    for _ in range(2):
        with pytest.raises(OSError, match=r'could not move .*old/one back to .*one: another file or folder is there'):
            replace(folder, 'files')
    assert (folder / 'one').read_text() == 'mine'
    assert [path.read_text() for path in folder.glob('*/old/one')] == ['old']
    (folder / 'one').unlink()
    replace(folder, 'files')
    assert content(folder) == NEW


@pytest.mark.parametrize('out', ['.', 'link', 'new/below'])
def test_any_folder_will_do(tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to('real')
    replace(Path(out), 'files')
    assert all((Path(out) / name).read_text() == 'new' for name in NAMES)
    assert (tmp_path / 'link').is_symlink()


@pytest.mark.parametrize('fault', [fail, raise_interrupt])
@pytest.mark.parametrize('method', ['write_bytes', 'replace'])
def test_a_single_file_is_written_whole_or_not_at_all(tmp_path, method, fault, monkeypatch):
    path = tmp_path / 'a.yaml'
    write_whole(path, b'old')
    real = getattr(Path, method)

    def fails(self, *args):
        if method == 'write_bytes':
            real(self, b'ne')
        fault()

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fails)
        with pytest.raises((OSError, KeyboardInterrupt)):
            write_whole(path, b'new')
    assert content(tmp_path) == {'a.yaml': 'old'}
    write_whole(path, b'new')
    assert content(tmp_path) == {'a.yaml': 'new'}


def test_a_file_system_without_permissions(folder, monkeypatch):
    """vfat: chmod fails where it cannot store the mode."""
    def refuse(path, mode):
        raise PermissionError(1, 'Operation not permitted', str(path))

    monkeypatch.setattr(Path, 'chmod', refuse)
    replace(folder, 'files')
    assert content(folder) == NEW


def test_a_file_system_whose_inode_numbers_differ(folder, monkeypatch):
    """Those of an open file and of its path, so that no lock seems to be the current one."""
    prepare(folder, 'files')
    real = Path.lstat
    monkeypatch.setattr(Path, 'lstat', lambda path: SimpleNamespace(st_ino=-real(path).st_ino))
    with pytest.raises(OSError, match=r'\.timm-smpconv\.lock must have one inode number'):
        replace(folder, 'files')
    assert {name: text for name, text in content(folder).items() if not name.startswith('.')} == OLD
