"""The commands `run`, `recipe` and `digits`, with small scripts written here."""
import importlib
import itertools
import json
import os
import stat
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_smpconv.__main__ import main
from timm_smpconv._errors import DataError
from timm_smpconv.tools.demo.digits import write_digits
from timm_smpconv.tools.timm_scripts import find_script, run_script

SCRIPT = '''
import json, sys
import timm
if __name__ == '__main__':
    assert timm.is_model('smpconv_tiny') and 'smpadamw' in timm.optim.list_optimizers()
    with open(sys.argv[2], 'w') as file:
        json.dump(dict(argv=sys.argv, path=sys.path[0]), file)
'''


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What a script changes in this process."""
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', list(sys.path))


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'scripts' / 'show.py'
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def test_runs_as_python_would(script, tmp_path):
    out = tmp_path / 'out.json'
    assert main(['run', str(script), '--out', str(out)]) == 0
    assert json.loads(out.read_text()) == dict(argv=[str(script), '--out', str(out)], path=str(script.parent))


@pytest.mark.parametrize('source', ['timm.utils', 'timm.utils.model', 'timm.models'])
def test_scripts_may_merge_before_eval(tmp_path, source):
    if not hasattr(importlib.import_module(source), 'reparameterize_model'):
        pytest.skip(f'{source} has no reparameterize_model before timm 1.0.31')
    path = tmp_path / 'merge.py'
    path.write_text(f'''
import timm
from {source} import reparameterize_model
args = dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), kernel_sizes=(5, 5, 5, 5), num_classes=3)
model = reparameterize_model(timm.create_model('smpconv_tiny', **args))
assert not any('Norm' in type(m).__name__ for m in model.stages.modules())
''')
    run_script(path, [])


def test_ways_to_find_it(script, tmp_path, monkeypatch):
    environ = {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    assert find_script(str(script), environ) == script
    assert find_script('show.py', {**environ, 'TIMM_SCRIPTS': str(script.parent)}) == script
    assert find_script('show', {**environ, 'TIMM_SCRIPTS': str(script.parent)}) == script
    checkout = tmp_path / 'checkout'
    (checkout / 'timm').mkdir(parents=True)
    for name in ('train.py', 'show.py'):
        (checkout / name).write_text(SCRIPT)
    monkeypatch.setattr(timm, '__file__', str(checkout / 'timm' / '__init__.py'))
    assert find_script('show.py', environ) == checkout / 'show.py'
    for folder in (tmp_path / 'nowhere', tmp_path, script):
        with pytest.raises(DataError, match=f'TIMM_SCRIPTS must name a folder that holds show.py, got {folder}$'):
            find_script('show.py', {**environ, 'TIMM_SCRIPTS': str(folder)})


@pytest.fixture
def repository():
    """A web server with SCRIPT as show.py, which an answer may cut, spoil or refuse."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, sent = server.answers.pop(0)
            self.send_response(status if self.path == f'/v{timm.__version__}/show.py' else 404)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *args):
            pass

    with HTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_downloads_once_whole_or_not_at_all(repository, tmp_path, capsys):
    script = SCRIPT.encode()
    repository.answers = [
        (200, script, 100), (200, b'<html>Sign in</html>', None), (200, b'\0', None), (500, b'', None),
        (200, script, None)]
    source, environ = f'http://127.0.0.1:{repository.server_port}', {'XDG_CACHE_HOME': str(tmp_path)}
    for problem in ('IncompleteRead', 'invalid syntax', 'null bytes', '500'):
        with pytest.raises(DataError, match=problem):
            find_script('show.py', environ, source)
        assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    found = find_script('show.py', environ, source)
    assert found.read_bytes() == script and list(found.parent.iterdir()) == [found] and tmp_path in found.parents
    assert f'{len(script)} bytes in {found}' in capsys.readouterr().err
    assert find_script('show.py', environ, source) == found and not repository.answers


def test_the_other_ways_are_named_and_nothing_is_left(tmp_path):
    environ = {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    with pytest.raises(DataError) as error:
        find_script('validate.py', environ, (tmp_path / 'nowhere').as_uri())
    for way in ('could not be downloaded from', 'Give its path', 'TIMM_SCRIPTS', 'a checkout of its repository'):
        assert way in str(error.value)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


@pytest.mark.parametrize('name', ['', '.', '..', '.py', 'no/such.py', 'a b', '-'])
def test_names_that_no_script_has(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['run', name]) == 2
    message = f"SCRIPT must be a file or the name of one of timm's scripts, got {name!r}"
    assert capsys.readouterr().err == f'timm-smpconv run: {message}\n'


@pytest.mark.parametrize('source,message', [
    (b'x = (\n', 'SyntaxError'), (b'x = 1\0\n', 'null bytes'), (b'import no_such_module', 'ModuleNotFoundError'),
    (b'# -*- coding: latin-1 -*-\nraise ValueError("\xe9")', 'ValueError: é')])
def test_an_error_in_the_script_is_its_own(source, message, tmp_path, capsys):
    path = tmp_path / 'script.py'
    path.write_bytes(source)
    assert main(['run', str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('Traceback') and message in error


def test_an_interrupted_script_may_have_written_something(tmp_path, capsys):
    path = tmp_path / 'wait.py'
    path.write_text('print("epoch 1")\nraise KeyboardInterrupt')
    assert main(['run', str(path)]) == 130
    assert capsys.readouterr() == ('epoch 1\n', '\ntimm-smpconv run: interrupted\n')


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


def check_digits(folder):
    data = load_digits()
    train, held_out = (sorted((folder / split).rglob('*.png')) for split in ('train', 'validation'))
    assert (len(train), len(held_out)) == (1437, 360) and len(tree(folder)) == 1797 + 2 * 10 + 2
    assert {p.parent.name for p in train} == {p.parent.name for p in held_out} == {str(i) for i in range(10)}
    for path, offset in ((train[70], 0), (held_out[3], 1437)):
        index = int(path.stem) + offset
        assert int(path.parent.name) == data.target[index]
        pixels = torch.from_numpy(np.array(Image.open(path)))
        assert torch.equal(pixels, torch.from_numpy(data.images[index] * 255 / 16).to(torch.uint8))


@pytest.mark.parametrize('given,real', [('a/b/c', 'a/b/c'), ('empty', 'empty'), ('link', 'empty'), ('.', '.')])
def test_digits(given, real, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if real == 'empty':
        Path('empty').mkdir()
        Path('link').symlink_to('empty')
    inode = Path(real).stat().st_ino if Path(real).exists() else None
    before = os.umask(0o027)
    try:
        assert main(['digits', given]) == 0
    finally:
        os.umask(before)
    assert capsys.readouterr().out == f'1797 images in {given}\n'
    check_digits(Path(real))
    # An existing folder stays the same one: a mount point or the current directory cannot be replaced.
    assert inode in {None, Path(real).stat().st_ino}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in Path(real).rglob('*') if path.is_dir()}
    assert modes == {0o750} and stat.S_IMODE(Path(real, 'train/0/0000.png').stat().st_mode) == 0o640
    assert main(['digits', given]) == 1
    message = f'DIR must be an empty folder or a new one, got {given}, which holds '
    assert capsys.readouterr().err.startswith(f'timm-smpconv digits: {message}')
    check_digits(Path(real))


def test_digits_returns_the_paths(tmp_path):
    assert sorted(map(str, write_digits(tmp_path))) == sorted(map(str, tmp_path.rglob('*.png')))


@pytest.mark.parametrize('given', ['file', 'file/below', 'dangling'])
def test_digits_into_a_file(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('file').touch()
    Path('dangling').symlink_to('nowhere')
    assert main(['digits', given]) == 1
    assert f'{given} must be a folder or a new one, got a file at ' in capsys.readouterr().err
    assert tree(tmp_path) == ['dangling', 'file']


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(
        'timm_smpconv.tools.demo.digits.digits', lambda training: ([Image.new('L', (8, 8))] * 3, [0, 1, 1]))


@pytest.mark.parametrize('interrupted', [True, False])
@pytest.mark.parametrize('given', ['a/b', 'empty'])
def test_digits_stopped_leaves_nothing(interrupted, given, few_digits, tmp_path, monkeypatch, capsys):
    """By Ctrl-C or a full disk at the fourth image."""
    (tmp_path / 'empty').mkdir()
    save, count = Image.Image.save, itertools.count(1)

    def stops(*args):
        save(*args)
        if next(count) == 4:
            raise KeyboardInterrupt if interrupted else OSError('No space left on device')

    monkeypatch.setattr(Image.Image, 'save', stops)
    assert main(['digits', str(tmp_path / given)]) == (130 if interrupted else 1)
    problem = '\ntimm-smpconv digits: interrupted' if interrupted else (
        'timm-smpconv digits: No space left on device')
    assert capsys.readouterr() == ('', f'{problem}\n') and tree(tmp_path) == ['empty']
