"""Files and folders that are written beside their place. The oracle is the disk: what is there is old or new."""
from pathlib import Path

import pytest
from conftest import full_disk

from timm_smpconv._files import check_no_folder, written_beside

OLD = dict.fromkeys(('one', 'two'), 'old')
NEW = dict.fromkeys(('one', 'two', 'three'), 'new')


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


@pytest.fixture(params=['files', 'folders'])
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path, kind):
    for name in OLD:
        write(tmp_path / name, 'old', kind)
    return tmp_path


def replace(folder, kind, text='new'):
    with written_beside(folder) as new:
        for name in NEW:
            write(new / name, text, kind)


def test_replaces_what_is_there(folder, kind):
    replace(folder, kind)
    assert content(folder) == NEW


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt, ValueError])
def test_an_error_or_an_interrupt_while_it_is_written(folder, kind, error):
    def stop():
        with written_beside(folder) as new:
            write(new / 'one', 'new', kind)
            raise error('stop')

    with pytest.raises(error, match='stop'):
        stop()
    assert content(folder) == OLD


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('when', ['before', 'behind'])
@pytest.mark.parametrize('at', [1, 2])
def test_an_error_or_an_interrupt_of_a_rename(folder, kind, error, when, at, monkeypatch):
    """What is there is old or new, and whole: a folder is never lost between the two renames that replace it."""
    count = 0

    def stops(name):
        rename = getattr(Path, name)

        def stop(path, target):
            nonlocal count
            count += 1
            if count != at:
                return rename(path, target)
            if when == 'behind':
                rename(path, target)
            raise error('stop')
        return stop

    with monkeypatch.context() as patch:
        for name in 'rename', 'replace':
            patch.setattr(Path, name, stops(name))
        with pytest.raises(error, match='stop'):
            replace(folder, kind)
    found = content(folder)
    assert all(found[name] in ('old', 'new') for name in OLD) and found.keys() <= NEW.keys()
    replace(folder, kind)
    assert content(folder) == NEW


def test_a_full_disk(tmp_path):
    (tmp_path / 'one').write_text('old')
    with full_disk(1000), pytest.raises(OSError, match='File too large'), written_beside(tmp_path) as new:
        (new / 'one').write_bytes(bytes(2000))
    assert content(tmp_path) == {'one': 'old'}


@pytest.mark.parametrize('out', ['.', 'link', 'new/below'])
def test_any_folder_will_do(tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to('real')
    replace(Path(out), 'files')
    assert all((Path(out) / name).read_text() == 'new' for name in NEW)
    assert (tmp_path / 'link').is_symlink()


def test_a_new_folder_goes_if_nothing_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_beside(tmp_path / 'new' / 'below'):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'file').write_text('old')
    with pytest.raises(IsADirectoryError, match='one must be a file or not exist, got a folder'):
        check_no_folder(tmp_path / 'one')
    with pytest.raises(OSError, match='one'):
        replace(tmp_path, 'files')
    assert content(tmp_path) == {'one': 'old'}
