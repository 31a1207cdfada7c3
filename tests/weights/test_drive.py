"""`pretrained=True` and `timm-smpconv weights`, by the real gdown and client of the Hub, against both on loopback.

Oracles: the checkpoint that the drive holds, its logits in tests/reference_smp.py, `pretrained_cfg_overlay=…` with
that checkpoint, and what was on the disk before.
"""
import errno
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference_smp
import timm
import torch
import yaml
from conftest import IMAGENET_MODELS, MODELS, difference, full_disk, interrupt
from drive_server import QUOTA, DriveServer, File
from hub_server import Repository
from PIL import Image
from reference import authors_state_dict
from safetensors.torch import load_file, save_file
from test_authors_networks import double
from test_checkpoint import same, save_as_the_authors_do

from timm_smpconv import CheckpointError
from timm_smpconv.__main__ import main
from timm_smpconv.weights import drive as client, hub
from timm_smpconv.weights.hub import file_sha256, load_sources

ROOT = Path(__file__).parents[2]
MODEL, NAME = 'smpconv_tcn_ct', 'smpconv_tcn_ct.character_trajectories'
REPO = f'timm-smpconv/{NAME}'
SOURCES = load_sources()
LISTED = [name for name in SOURCES if SOURCES[name]['origin']]
WEIGHTS, DOWNLOAD = f'{NAME}.safetensors', f'{NAME}.pth'  # in the cache


def id_of(name):
    return SOURCES[name]['origin']['file'].rpartition('/')[2]


def save(path, name):
    """A checkpoint of a model as the authors' code saves it; its state dict."""
    model = name.partition('.')[0]
    if model in IMAGENET_MODELS:
        sd = authors_state_dict(model)
        save_as_the_authors_do(path, ema=sd, model={key: value * 2 for key, value in sd.items()})
    else:
        sd = reference_smp.authors_state_dict(model)
        torch.save({'model': sd, 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 200}, path)
    return sd


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """A checkpoint of MODEL in the authors' layout: its state dict, and the file, of 1.5 MB."""
    path = tmp_path_factory.mktemp('authors') / 'checkpoint.pt'
    return save(path, MODEL), path


@pytest.fixture(scope='module')
def server_of_files(tmp_path_factory):
    with DriveServer(tmp_path_factory.mktemp('drive')) as drive:
        yield drive


@pytest.fixture
def drive(server_of_files, checkpoint, monkeypatch, tmp_path):
    """The drive with that file, for this process, where nothing is recorded or published."""
    drive = server_of_files
    drive.files = {id_of(NAME): File(checkpoint[1].read_bytes())}
    drive.requests, drive.faults, drive.forms = [], [], []
    drive.reached.clear()
    for name in ('ALL_PROXY', 'all_proxy', 'HTTP_PROXY', 'http_proxy'):
        monkeypatch.delenv(name, raising=False)
    for name, value in drive.environment().items():
        monkeypatch.setenv(name, value)
    record(monkeypatch, tmp_path)
    return drive


def record(monkeypatch, tmp_path, authors=None, **published):
    """Read a sources.yaml with these entries for NAME, and null for all other hashes."""
    sources = {name: {**entry, 'hub_id': None, 'commit': None, 'sha256': None} for name, entry in SOURCES.items()}
    for name in LISTED:
        sources[name]['origin'] = {**SOURCES[name]['origin'], 'bytes': None, 'sha256': None}
    sources[NAME]['origin']['sha256'] = authors
    sources[NAME].update(published)
    (tmp_path / 'sources.yaml').write_text(yaml.safe_dump(sources, allow_unicode=True), encoding='utf-8')
    monkeypatch.setattr(hub, 'SOURCES', tmp_path / 'sources.yaml')


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def load(cache):
    """`pretrained=True`, in evaluation mode."""
    return lambda name=MODEL, **kwargs: timm.create_model(name, pretrained=True, cache_dir=cache, **kwargs).eval()


@pytest.fixture
def refused(load):
    """The message with which it fails."""
    def refused(name=MODEL):
        with pytest.raises(CheckpointError) as raised:
            load(name)
        assert len(str(raised.value).splitlines()) == 1
        return str(raised.value)
    return refused


@pytest.fixture
def run(cache, capsys):
    """`timm-smpconv weights`: status, output and the last line of the errors."""
    def run(*args):
        status = main(['weights', *map(str, args), '--cache-dir', str(cache)])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err.splitlines()[-1] if err else '')
    return run


@pytest.fixture(params=['refused', 'dropped'])
def no_network(request, monkeypatch):
    with socket.create_server(('127.0.0.1', 0), backlog=0) as server, socket.socket() as other:
        other.connect(server.getsockname())  # and now there is no room for another: Linux drops their packets
        address = server.getsockname() if request.param == 'dropped' else ('127.0.0.1', 9)  # where nobody listens
        for name in ('HTTPS_PROXY', 'https_proxy'):
            monkeypatch.delenv(name)
        monkeypatch.setattr(
            socket, 'getaddrinfo', lambda *args: [(socket.AF_INET, socket.SOCK_STREAM, 0, '', address)])
        monkeypatch.setattr(time, 'sleep', lambda seconds: pytest.fail('it waits before it tries again'))
        yield


def files(cache):
    """What is in the cache, apart from the lock."""
    found = {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob('*') if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith('.lock')}


def same_as_the_oracle(model, sd):
    x = torch.randn(2, 3, 182, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return difference(model(x), reference_smp.logits(double(sd), MODEL, x.double())) < 1e-4


@pytest.mark.parametrize('large', [False, True])
def test_the_first_call_downloads_and_no_other(large, drive, checkpoint, cache, load, capsys, caplog, monkeypatch):
    sd, path = checkpoint
    drive.files[id_of(NAME)].large = large
    assert same_as_the_oracle(load(), sd)
    assert drive.sent() == [None] * (2 if large else 1) and set(files(cache)) == {WEIGHTS}
    (said,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert said == (
        f"Downloading {NAME}, the authors' weights ({path.stat().st_size / 1e6:.1f} MB, licence MIT, "
        f'https://github.com/sangnekim/SMPConv), from {SOURCES[NAME]["origin"]["file"]}')
    out, err = capsys.readouterr()
    assert out == '' and f'{NAME}: 100%' in err
    requests = len(drive.requests)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert same_as_the_oracle(load(NAME), sd)
    assert len(drive.requests) == requests and len(caplog.records) == 1 and capsys.readouterr() == ('', '')


def test_other_classes_channels_and_features(drive, checkpoint, cache, load, caplog):
    weights = load_file(cache / WEIGHTS) if load() else None
    seven = load(num_classes=7)
    assert seven.get_classifier().out_features == 7
    assert all(torch.equal(v, weights[k]) for k, v in seven.state_dict().items() if not k.startswith('head.fc.'))
    x = torch.randn(2, 3, 182)
    with torch.inference_mode():
        features = load(features_only=True)(x)[-1]
        assert difference(features, load().forward_features(x)) < 1e-5
        gray = load(in_chans=1)(x[:, :1])  # timm sums the weights over the input's channels
        assert difference(gray, load()(x[:, :1].expand(-1, 3, -1))) < 1e-5
    assert len(caplog.records) == 1  # about the download; nothing about a classifier that was asked to differ


FAST = ('smpconv_tcn_sc.speech_commands', 'smpconv_resnet_cifar10.cifar10')


@pytest.mark.parametrize('name', [
    *FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in LISTED if name not in FAST)])
def test_all_names(name, drive, cache, load, tmp_path):
    save(tmp_path / 'theirs.pth', name)
    drive.files[id_of(name)] = File((tmp_path / 'theirs.pth').read_bytes(), large=True)
    model = name.partition('.')[0]
    loaded = load(model).state_dict()
    overlay = dict(file=str(tmp_path / 'theirs.pth'))
    assert same(loaded, timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay).state_dict())
    assert same(loaded, load_file(cache / f'{name}.safetensors'))


def test_what_is_listed_as_pretrained():
    assert timm.list_models('smpconv*', pretrained=True) == sorted(LISTED) and len(LISTED) == 9


@pytest.mark.parametrize('model', ['smpconv_mobile31', 'smpconv_mobile51'])
def test_models_without_weights_say_how_to_train_them(model, drive, refused, run):
    message = f'the authors published no weights of {model}: train it by `timm-smpconv run train.py -c '
    assert refused(model).startswith(f'{message}$(timm-smpconv recipe {model})` and load the result with ')
    failed = run(model)
    assert failed.status == 1 and message in failed.err and not drive.requests


def test_a_tag_that_does_not_exist(load):
    with pytest.raises(RuntimeError, match=r'^Invalid pretrained tag \(in22k\) for smpconv_tiny\.$'):
        load('smpconv_tiny.in22k')


def test_a_connection_that_breaks_off_goes_on(drive, checkpoint, load):
    drive.faults = [(600_000, None), None, (600_000, None)]  # gdown asks for all of it before it asks for the rest
    assert same_as_the_oracle(load(), checkpoint[0])
    assert [wanted for wanted in drive.sent() if wanted] == ['bytes=524288-', 'bytes=1048576-']  # it writes such pieces


def test_a_download_that_was_cut_goes_on_the_next_time(drive, checkpoint, cache, load, refused):
    file = drive.files[id_of(NAME)]

    def quota():
        file.state = 'quota'
        return False

    drive.faults = [(600_000, quota)]
    assert 'Too many users' in refused()
    assert list(files(cache).values()) == [file.data[:2 ** 19]]
    file.state = 'public'
    assert same_as_the_oracle(load(), checkpoint[0]) and set(files(cache)) == {WEIGHTS}
    assert drive.sent()[-1] == 'bytes=524288-'


@pytest.mark.parametrize('change', ['no ranges', 'too much'])
def test_a_rest_that_the_drive_does_not_send(change, drive, checkpoint, cache, load):
    """Then all of it is downloaded again: what has arrived is never put together with something else."""
    file = drive.files[id_of(NAME)]
    file.ranges = False
    cache.mkdir()
    (cache / f'{DOWNLOAD}12345678.part').write_bytes(b'other' * 1000 if change == 'no ranges' else file.data + b'more')
    assert same_as_the_oracle(load(), checkpoint[0]) and set(files(cache)) == {WEIGHTS}


def test_a_connection_that_always_breaks_off_where_ranges_are_refused(drive, refused):
    drive.files[id_of(NAME)].ranges, drive.faults = False, [(600_000, None)] * 9
    assert 'could not be downloaded: DownloadError: ' in refused() and drive.faults


@pytest.mark.parametrize('state,message', [
    ('quota', f'could not be downloaded: {QUOTA.partition(".")[0]};'),
    ('sign-in', 'could not be downloaded: Cannot retrieve the public link of the file;'),
    ('changed', 'could not be downloaded: Cannot retrieve the public link of the file;'),
    ('formless', "could not be downloaded: KeyError: 'action'"),
    ('asks again', 'could not be downloaded: no file came within 0.5 seconds;'),
    ('busy', 'could not be downloaded: HTTPError: 503 Server Error'),
    (None, 'could not be downloaded: '),
])
def test_pages_instead_of_the_file(state, message, drive, cache, refused, monkeypatch):
    if state == 'asks again':
        monkeypatch.setattr(client, 'PATIENCE', 0.5)
    if state:
        drive.files[id_of(NAME)].state = state
    else:
        del drive.files[id_of(NAME)]
    found = refused()
    assert f'{SOURCES[NAME]["origin"]["file"]} {message}' in found
    assert f'timm-smpconv weights {NAME} --file FILE' in found and not files(cache)


def test_without_a_network(drive, cache, refused, no_network):
    assert 'could not be downloaded: there is no connection to it (Conn' in refused() and not files(cache)


def test_offline_nothing_is_asked_for(drive, cache, refused, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE forbids to download https://drive.google.com/' in refused()
    assert not drive.requests and not files(cache)


@pytest.mark.parametrize('content,message', [
    ('text', 'must be an undamaged weights-only checkpoint'),
    ('truncated', 'must be an undamaged weights-only checkpoint'),
    ('another network', 'exactly the keys of the model'),
    ('other classes', f'must hold the weights of {NAME}: Error.* size mismatch for head.fc'),
    ('NaN', 'blocks.0.shortcut.weight must be finite everywhere'),
])
def test_a_file_that_is_not_the_authors(content, message, drive, checkpoint, cache, refused, run, tmp_path):
    sd = dict(checkpoint[0])
    if content == 'another network':
        sd = reference_smp.authors_state_dict('smpconv_resnet_cifar10')
    elif content == 'other classes':
        sd.update({key: sd[key][:5] for key in ('finallyr.weight', 'finallyr.bias')})
    elif content == 'NaN':
        sd['backbone.0.shortcut.0.weight'] = sd['backbone.0.shortcut.0.weight'] / 0 * 0
    torch.save({'model': sd}, tmp_path / 'other.pt')
    data = (tmp_path / 'other.pt').read_bytes()
    drive.files[id_of(NAME)].data = {'text': b'<!DOCTYPE html>', 'truncated': data[:-100]}.get(content, data)
    found = refused()
    assert re.search(message, found) and found.endswith('; the downloaded file was deleted') and not files(cache)
    assert 'arbitrary code' not in found  # torch.load advises to run it
    (tmp_path / 'other.pt').write_bytes(drive.files[id_of(NAME)].data)
    given = run(MODEL, '--file', tmp_path / 'other.pt')
    assert given.status == 1 and re.search(message, given.err) and 'deleted' not in given.err
    assert (tmp_path / 'other.pt').exists() and not files(cache)


def test_the_recorded_hash(drive, checkpoint, cache, load, refused, monkeypatch, tmp_path):
    record(monkeypatch, tmp_path, '0' * 64)
    sha256 = file_sha256(checkpoint[1])
    assert f"the authors' file must have the sha256 {'0' * 64} that is recorded for it, got {sha256} of" in refused()
    assert not files(cache)
    record(monkeypatch, tmp_path, sha256)
    assert same_as_the_oracle(load(), checkpoint[0])


def test_no_room(drive, cache, refused, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    size = len(drive.files[id_of(NAME)].data)
    assert f'{cache} must have room for {size - 2 ** 19:,} more bytes, got 1,000 free ones;' in refused()


@pytest.mark.parametrize('downloaded', [False, True])
def test_a_full_disk(downloaded, drive, checkpoint, cache, load, refused):
    """With room for more, the next attempt goes on."""
    if downloaded:
        cache.mkdir()
        shutil.copy(checkpoint[1], cache / DOWNLOAD)
    with full_disk(1_000_000):
        message = refused()
    assert os.strerror(errno.EFBIG) in message and WEIGHTS not in files(cache)
    assert same_as_the_oracle(load(), checkpoint[0]) and set(files(cache)) == {WEIGHTS}


def test_a_cache_that_cannot_be_written(drive, cache, refused):
    cache.write_text('a file')
    message = f'the weights of {MODEL} could not be written to the cache {cache}, which HF_HOME and cache_dir change: '
    assert refused().startswith(message) and cache.read_text() == 'a file' and not drive.requests


def test_a_cache_that_is_only_read(drive, checkpoint, cache, load, run):
    """Weights that are there need no lock."""
    load()
    (cache / f'{NAME}.lock').unlink(missing_ok=True)
    (cache / f'{NAME}.lock').mkdir()  # no file can be written there
    assert same_as_the_oracle(load(), checkpoint[0])
    failed = run(MODEL, '--file', checkpoint[1])
    assert failed.status == 1 and f'could not be written to the cache {cache}' in failed.err


def test_an_interrupt_of_the_download(drive, checkpoint, cache, load, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hub.tqdm, 'update', interrupt)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert WEIGHTS not in files(cache)
    assert all(checkpoint[1].read_bytes().startswith(content) for content in files(cache).values())
    assert same_as_the_oracle(load(), checkpoint[0])


def test_an_interrupt_of_the_conversion(drive, checkpoint, cache, load, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hub, 'checkpoint_filter_fn', interrupt)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert files(cache) == {DOWNLOAD: checkpoint[1].read_bytes()}
    requests = len(drive.requests)
    assert same_as_the_oracle(load(), checkpoint[0]) and len(drive.requests) == requests


def test_the_command(drive, checkpoint, cache, load, run):
    def row(name):
        (line,) = (line for line in run().out.splitlines() if line.startswith(f'{name} '))
        return re.split(r'  +', line)

    assert row(NAME) == [NAME, 'not there', SOURCES[NAME]['origin']['file']]
    assert row('smpconv_mobile31.in1k') == ['smpconv_mobile31.in1k', 'not there', 'none published']
    assert len(run().out.splitlines()) == 1 + len(MODELS) and not cache.exists()
    done = run(MODEL)
    assert (done.status, done.out) == (0, f'{cache / WEIGHTS}\n') and drive.sent() == [None]
    assert row(NAME)[1] == f'{len(files(cache)[WEIGHTS]) / 1e6:.1f} MB'
    (cache / f'{DOWNLOAD}12345678.part').touch()
    (cache / 'another file').touch()
    removed = run('--remove', MODEL)
    assert removed.status == 0 and f'removed {cache / WEIGHTS}\n' in removed.out
    assert set(files(cache)) == {'another file'}
    given = run(MODEL, '--file', checkpoint[1])
    assert given.status == 0 and drive.sent() == [None] and checkpoint[1].exists()
    assert same_as_the_oracle(load(), checkpoint[0])
    failed = run('smpconv_tcn_sc', '--file', cache / 'missing')
    assert failed.status == 1 and 'file must exist' in failed.err


@pytest.mark.parametrize('args,message', [
    (['smpconv_huge'], r"NAME must be one of smpconv_base, .*, got 'smpconv_huge'"),
    (['--remove'], 'arguments must be NAME, NAME --file FILE, NAME --remove or none'),
    (['--file', 'a'], 'arguments must be'),
    ([MODEL, '--remove', '--file', 'a'], 'arguments must be'),
])
def test_bad_arguments(args, message, run, cache):
    failed = run(*args)
    assert failed.status == 2 and re.search(message, failed.err) and not cache.exists()


@pytest.fixture
def published(server, drive, monkeypatch, tmp_path):
    """MODEL on the Hub, with other weights than the authors', as publish.py records it; those weights."""
    weights = timm.create_model(MODEL).state_dict()
    save_file(weights, tmp_path / 'model.safetensors')
    server.repositories[REPO] = repository = Repository(private=False)
    file = repository.store((tmp_path / 'model.safetensors').read_bytes(), large=True)
    commit = repository.commit('main', 'weights', {'model.safetensors': file})
    repository.commit('main', 'later, and not recorded', {})
    record(monkeypatch, tmp_path, hub_id=REPO, commit=commit, sha256=file.oid)
    return weights


def test_published_weights_come_from_the_hub(published, server, drive, cache, load, run):
    model = load()
    assert same(model.state_dict(), published) and not drive.requests
    assert model.pretrained_cfg['hf_hub_id'].startswith(f'{REPO}@') and 'url' not in model.pretrained_cfg
    assert run(MODEL).out.startswith(f'{REPO}@')
    server.stop()
    assert same(load().state_dict(), published)  # the client's cache
    assert server.count('GET', 'model.safetensors') == 1


def test_a_hub_that_cannot_be_reached(published, server, drive, checkpoint, load, refused, caplog, monkeypatch):
    """Then the authors' weights are taken, and nobody waits for the client's five attempts."""
    server.stop()
    with monkeypatch.context() as patch:
        patch.setattr(time, 'sleep', lambda seconds: pytest.fail('it waits before it tries again'))
        drive.files[id_of(NAME)].state = 'quota'
        assert 'Too many users' in refused()
        drive.files[id_of(NAME)].state = 'public'
        assert same_as_the_oracle(load(), checkpoint[0])
    assert f'tried model.safetensors of {REPO}@' in caplog.text and "; taking the authors' file" in caplog.text


def environment(drive, tmp_path, **more):
    """Of a process that knows this drive and this cache only."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**kept, **drive.environment(), 'HF_HOME': str(tmp_path / 'home'), 'PYTHONPATH': path, **more}


LOAD = f'''
import timm, timm_smpconv, torch
print('imported', flush=True)
model = timm.create_model("{MODEL}", pretrained=True).eval()
torch.save(model.state_dict(), __import__('os').environ.get('OUT', 'out.pth'))
'''


def python(drive, tmp_path, *command, **more):
    """A process in `tmp_path`."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment(drive, tmp_path, **more), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


def weights_of(checkpoint):
    return timm.create_model(
        MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint[1]))).state_dict()


@pytest.mark.slow
def test_two_processes_at_once(drive, checkpoint, tmp_path):
    """The second one waits, and takes what the first one made."""
    go_on = threading.Event()
    drive.faults = [(600_000, lambda: go_on.wait(120))]
    processes = [python(drive, tmp_path, '-c', LOAD, OUT=f'{i}.pth') for i in range(2)]
    for process in processes:
        assert process.stdout.readline() == 'imported\n'
    assert drive.reached.wait(120)
    go_on.set()
    said = ''.join(finished(process)[1] for process in processes)
    assert said.count('Downloading') == 1 and drive.sent() == [None]
    assert all(same(torch.load(tmp_path / f'{i}.pth'), weights_of(checkpoint)) for i in range(2))


@pytest.mark.slow
def test_four_ranks(drive, checkpoint, tmp_path):
    (tmp_path / 'load.py').write_text(LOAD.replace("'OUT', 'out.pth'", "'RANK'"))
    process = python(
        drive, tmp_path, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4', 'load.py',
        OMP_NUM_THREADS='1')
    assert finished(process)[1].count('Downloading') == 1 and drive.sent() == [None]
    assert all(same(torch.load(tmp_path / str(rank)), weights_of(checkpoint)) for rank in range(4))


@pytest.mark.slow
def test_killed_in_the_middle(drive, checkpoint, tmp_path):
    """SIGKILL leaves no lock and no half file, and the next process goes on."""
    go_on = threading.Event()
    drive.faults = [(1_200_000, lambda: go_on.wait(120))]
    process = python(drive, tmp_path, '-c', LOAD)
    assert drive.reached.wait(120)
    process.kill()
    process.wait()
    go_on.set()
    finished(python(drive, tmp_path, '-c', LOAD))
    assert same(torch.load(tmp_path / 'out.pth'), weights_of(checkpoint))


@pytest.mark.slow
def test_torch_hub_and_offline(drive, checkpoint, tmp_path):
    code = (
        'import torch\n'
        f'model = torch.hub.load({str(ROOT)!r}, "{MODEL}", source="local", pretrained=True)\n'
        'torch.save(model.state_dict(), "out.pth")\n')
    for offline in '0', '1':
        finished(python(drive, tmp_path, '-c', code, PYTHONPATH='', HF_HUB_OFFLINE=offline))
        assert same(torch.load(tmp_path / 'out.pth'), weights_of(checkpoint)) and drive.sent() == [None]


@pytest.mark.slow
def test_timms_validate_script(drive, tmp_path):
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("timm's scripts: TIMM_SCRIPTS does not name their folder")
    name = 'smpconv_resnet_cifar10.cifar10'
    save(tmp_path / 'theirs.pth', name)
    drive.files[id_of(name)] = File((tmp_path / 'theirs.pth').read_bytes())
    for i in range(10):
        (tmp_path / 'images' / f'class{i}').mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(tmp_path / 'images' / f'class{i}' / '0.png')
    command = [
        '-m', 'timm_smpconv', 'run', 'validate.py', '--model', 'smpconv_resnet_cifar10', '--data-dir', 'images',
        '--split', '', '--device', 'cpu', '--workers', '0']
    out, err = finished(python(drive, tmp_path, *command, '--pretrained'))
    assert drive.sent() == [None] and f'{name}: 100%' in err
    loaded = tmp_path / 'home' / 'assets' / 'timm-smpconv' / 'weights' / f'{name}.safetensors'
    again, _ = finished(python(drive, tmp_path, *command, '--checkpoint', loaded))

    def result(out):
        return {key: value for key, value in yaml.safe_load(out.partition('--result')[2]).items() if 'top' in key}

    assert result(out) == result(again)
