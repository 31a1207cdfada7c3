"""`timm-smpconv run` and `digits`: finding, fetching and checking, with small scripts written here."""
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_smpconv.__main__ import main
from timm_smpconv.scripts import ScriptError, find_script, run_script

SCRIPT = '''
import argparse, json, sys
import timm
parser = argparse.ArgumentParser()
parser.add_argument('data', nargs='?')
parser.add_argument('-c', '--config')
parser.add_argument('--data-dir')
parser.add_argument('--dataset')
parser.add_argument('--batch-size', '-b', type=int)
parser.add_argument('--initial', dest='start')
parser.add_argument('--out')
args = parser.parse_args()
if __name__ == '__main__':
    assert timm.is_model('smpconv_tiny') and 'smpadamw' in timm.optim.list_optimizers()
    json.dump(dict(argv=sys.argv, path=sys.path[0]), open(args.out, 'w'))
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'scripts' / 'show.py'
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def test_runs_as_python_would(script, tmp_path):
    out = tmp_path / 'out.json'
    before = sys.argv, list(sys.path)
    assert main(['run', str(script), '--batch-size', '3', '--out', str(out)]) == 0
    assert (sys.argv, sys.path) == before
    assert f'"{script}", "--batch-size", "3"' in out.read_text() and f'"path": "{script.parent}"' in out.read_text()


@pytest.mark.parametrize('source', ['timm.utils', 'timm.utils.model'])
def test_scripts_may_merge_before_eval(tmp_path, source):
    path = tmp_path / 'merge.py'
    path.write_text(f'''
import timm
from {source} import reparameterize_model
model = reparameterize_model(timm.create_model('smpconv_mobile31', num_classes=3))
assert not any('Norm' in type(m).__name__ for m in model.stages.modules())
''')
    before = timm.utils.reparameterize_model, timm.utils.model.reparameterize_model
    run_script(path, [])
    assert (timm.utils.reparameterize_model, timm.utils.model.reparameterize_model) == before


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


def test_fetches_once_whole_or_not_at_all(repository, tmp_path, capsys):
    script = SCRIPT.encode()
    repository.answers = [
        (200, script, 100), (200, b'<html>Sign in</html>', None), (200, b'\0', None), (200, b'error', None),
        (500, b'', None), (200, script, None)]
    source, environ = f'http://127.0.0.1:{repository.server_port}', {'XDG_CACHE_HOME': str(tmp_path)}
    for problem in ('IncompleteRead', 'invalid syntax', 'null bytes', 'not a script', '500'):
        with pytest.raises(ScriptError, match=problem):
            find_script('show.py', environ, source)
        assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    found = find_script('show.py', environ, source)
    assert found.read_bytes() == script and list(found.parent.iterdir()) == [found] and tmp_path in found.parents
    assert f'{len(script)} bytes in {found}' in capsys.readouterr().err
    assert find_script('show.py', environ, source) == found and not repository.answers


def test_the_four_ways_are_named_and_nothing_is_left(tmp_path):
    environ = {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    with pytest.raises(ScriptError) as error:
        find_script('validate.py', environ, (tmp_path / 'nowhere').as_uri())
    for way in ('Give its path', 'TIMM_SCRIPTS', 'a checkout of its repository', 'let it be fetched from'):
        assert way in str(error.value)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    with pytest.raises(ScriptError, match='there is no script no/such.py'):
        find_script('no/such.py', environ)


@pytest.mark.parametrize('text,message', [
    ('batch_size: 3\nbatchsize: 4\nmodle: x', 'must hold options of the script only, got batchsize, modle in'),
    ('- 3', 'must be a YAML file of options and values'),
    ('a: [', 'must be a YAML file that can be read'),
    (None, 'must be a YAML file that can be read'),
])
@pytest.mark.parametrize('form', [['-c', '{}'], ['--config={}']])
def test_bad_configurations(script, tmp_path, text, message, form, capsys):
    config, out = tmp_path / 'recipe.yaml', tmp_path / 'out.json'
    if text is not None:
        config.write_text(text)
    assert main(['run', str(script), *[part.format(config) for part in form], '--out', str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_good_configurations(script, tmp_path):
    config = tmp_path / 'recipe.yaml'
    config.write_text('batch_size: 3\nstart: x\ndata: y')
    run_script(script, ['-c', str(config), '--out', str(tmp_path / 'out.json')])
    assert (tmp_path / 'out.json').exists()


def test_a_folder_of_images_that_does_not_exist(script, tmp_path, capsys):
    assert main(['run', str(script), '--data-dir', str(tmp_path / 'none'), '--out', str(tmp_path / 'out')]) == 2
    assert f'--data-dir must be a folder that exists, got {tmp_path / "none"}' in capsys.readouterr().err


def test_digits(tmp_path, capsys):
    folder = tmp_path / 'data' / 'digits'
    assert main(['digits', str(folder)]) == 0
    assert '1797 images' in capsys.readouterr().out
    data = load_digits()
    train = sorted((folder / 'train').rglob('*.png'))
    held_out = sorted((folder / 'validation').rglob('*.png'))
    assert (len(train), len(held_out)) == (1437, 360)
    assert {p.parent.name for p in train} == {p.parent.name for p in held_out} == {str(i) for i in range(10)}
    for path, offset in ((train[70], 0), (held_out[3], 1437)):
        index = int(path.stem) + offset
        assert int(path.parent.name) == data.target[index]
        pixels = torch.from_numpy(np.array(Image.open(path)))
        assert torch.equal(pixels, torch.from_numpy(data.images[index] * 255 / 16).to(torch.uint8))
    assert main(['digits', str(folder)]) == 1
    assert f'DIR must not exist or be empty, got {folder}' in capsys.readouterr().err
    assert [p.name for p in folder.parent.iterdir()] == ['digits']
