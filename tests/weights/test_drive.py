"""`timm-smpconv weights`, by the real gdown and a drive on loopback.

Oracles: the checkpoint that the drive holds, its logits in tests/reference_smp.py, and what was on the disk before.
"""
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference_smp
import timm
import torch
from conftest import difference
from drive_server import QUOTA, DriveServer, File
from reference import authors_state_dict, logits
from safetensors.torch import load_file
from test_authors_networks import double
from test_checkpoint import save_as_the_authors_do

from timm_smpconv import CheckpointError
from timm_smpconv.__main__ import main
from timm_smpconv.tools.authors_weights import command, conversion, drive as client
from timm_smpconv.weights import hub as pretrained
from timm_smpconv.weights.hub import FILES, file_sha256, find_cached, load_sources

MODEL, NAME = 'smpconv_tcn_ct', 'smpconv_tcn_ct.character_trajectories'
SOURCES = load_sources()


def id_of(name):
    return SOURCES[name]['origin']['file'].rpartition('/')[2]


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """A checkpoint of MODEL in the authors' layout: its state dict, and the file, of 1.5 MB."""
    sd = reference_smp.authors_state_dict(MODEL)
    path = tmp_path_factory.mktemp('authors') / 'checkpoint.pt'
    torch.save({'model': sd, 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 200}, path)
    return sd, path


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with DriveServer(tmp_path_factory.mktemp('drive')) as server:
        yield server


@pytest.fixture
def drive(server, checkpoint, monkeypatch):
    """The drive with that file, for gdown in this process, which does not try again."""
    server.files = {id_of(NAME): File(checkpoint[1].read_bytes())}
    server.requests, server.faults, server.forms = [], [], []
    server.reached.clear()
    for name in ('ALL_PROXY', 'all_proxy', 'HTTP_PROXY', 'http_proxy'):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, 'RETRIES', 0)
    monkeypatch.setattr(pretrained, 'BUILT_IN', dict.fromkeys(pretrained.BUILT_IN))  # whatever was published
    record(monkeypatch, None)
    return server


def record(monkeypatch, sha256):
    """As if this were recorded of the authors' file."""
    entry = SOURCES[NAME]
    sources = {**SOURCES, NAME: {**entry, 'origin': {**entry['origin'], 'sha256': sha256}}}
    for module in command, conversion, pretrained:
        monkeypatch.setattr(module, 'load_sources', lambda *args: sources)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def run(cache, capsys):
    """`timm-smpconv weights`: status, output, and errors without the progress bar."""
    def run(*args):
        status = main(['weights', *map(str, args), '--cache-dir', str(cache)])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith('timm-smpconv')]
        return SimpleNamespace(status=status, out=out, err='\n'.join(errors), bar=err)
    return run


def files(cache):
    """What is in the cache, apart from the lock."""
    found = {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob('*') if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith('.lock')}


def series():
    return torch.randn(2, 3, 182, generator=torch.Generator().manual_seed(0))


def same_as_the_oracle(model, sd):
    with torch.inference_mode():
        return difference(model.eval()(series()), reference_smp.logits(double(sd), MODEL, series().double())) < 1e-4


@pytest.mark.parametrize('large', [False, True])
def test_download_convert_and_load(drive, checkpoint, cache, run, large):
    sd, path = checkpoint
    drive.files[id_of(NAME)].large = large
    done = run(MODEL)
    assert done.status == 0 and not done.err
    origin = SOURCES[NAME]['origin']
    sha256 = file_sha256(path)
    for words in (
            f'{origin["file"]}, of unknown size, licence MIT ({origin["page"]})',
            f'{path.stat().st_size:,} bytes, sha256 {sha256}', 'the logits differ by', 'is not recorded yet',
            f'create_model("{MODEL}", pretrained=True, cache_dir="{cache}") takes it from there'):
        assert words in done.out
    assert '100%' in done.bar and drive.sent() == [None] * (2 if large else 1)
    assert set(files(cache)) == {f'{NAME}/{file}' for file in FILES}
    assert same_as_the_oracle(timm.create_model(MODEL, pretrained=True, cache_dir=cache), sd)
    other = timm.create_model(NAME, pretrained=True, cache_dir=cache, num_classes=7)
    weights = load_file(cache / NAME / 'model.safetensors')
    assert other.get_classifier().out_features == 7
    assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items() if not k.startswith('head.fc.'))

    before = len(drive.requests)
    again = run(NAME)
    assert again.status == 0 and f'is there already, made of a file of sha256 {sha256}' in again.out
    assert len(drive.requests) == before


def test_the_list_and_removal(drive, cache, run):
    def row(name):
        (line,) = (line for line in run('--list').out.splitlines() if line.startswith(f'{name} '))
        return re.split(r'  +', line)

    assert row(NAME) == [NAME, 'no', 'size unknown', 'MIT', SOURCES[NAME]['origin']['file']]
    assert row('smpconv_mobile31.in1k') == ['smpconv_mobile31.in1k', 'no', 'none']
    assert len(run('--list').out.splitlines()) == 2 + len(SOURCES) and not cache.exists()
    drive.faults = [(600_000, None)]
    run(MODEL)
    assert re.fullmatch(r'0\.\d MB of a download', row(NAME)[1])
    assert run(MODEL).status == 0
    assert row(NAME)[1] == f'{sum(map(len, files(cache).values())) / 1e6:.1f} MB'
    removed = run('--remove', MODEL)
    assert removed.status == 0 and f'removed {cache / NAME}, ' in removed.out and not files(cache)
    again = run('--remove', MODEL)
    assert again.status == 2 and 'NAME must be that of weights in the cache' in again.err


@pytest.mark.parametrize('other', [f'{NAME}/notes.txt', NAME, f'{NAME}/folder/README.md'])
def test_other_files_in_the_place(drive, cache, run, other):
    """Nothing is downloaded in vain, and nobody's files are deleted."""
    (cache / other).parent.mkdir(parents=True)
    (cache / other).write_text('mine')
    failed = run(MODEL)
    assert failed.status == 2 and 'must not exist, be empty, or be a folder that was converted' in failed.err
    assert failed.err.endswith(f'got {cache / NAME}')
    assert not drive.requests
    failed = run('--remove', MODEL)
    assert failed.status == 1 and f'{cache / NAME} must hold nothing but README.md, config.json' in failed.err
    assert files(cache) == {other: b'mine'}


@pytest.mark.parametrize('left', [1, 2])
def test_an_interrupt_of_the_removal(checkpoint, cache, run, left, monkeypatch):
    """What is left is replaced the next time."""
    assert run(MODEL, '--file', checkpoint[1]).status == 0
    unlink, unlinked = Path.unlink, []

    def interrupted(path, *args, **kwargs):
        if len(unlinked) == 3 - left:
            raise KeyboardInterrupt
        unlinked.append(path)
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', interrupted)
        assert run('--remove', MODEL).status == 130
    assert len(files(cache)) == left
    assert run(MODEL, '--file', checkpoint[1]).status == 0 and len(files(cache)) == 3
    assert run('--remove', MODEL).status == 0 and not files(cache)


def test_what_pretrained_says_before(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, 'BUILT_IN', dict.fromkeys(pretrained.BUILT_IN))
    monkeypatch.setattr(pretrained, 'hf_hub_download', refuse)
    with pytest.raises(CheckpointError) as raised:
        timm.create_model(MODEL, pretrained=True, cache_dir=tmp_path)
    message = str(raised.value)
    assert message.startswith(f'could not download the weights of {MODEL}: tried model.safetensors of timm-smpconv/')
    assert f'run `timm-smpconv weights {MODEL} --cache-dir {tmp_path}`' in message
    assert message.endswith('The client reported: OSError: nobody answers')


def refuse(*args, **kwargs):
    raise OSError('nobody answers')


def test_a_download_that_is_cut_goes_on(drive, checkpoint, cache, run):
    drive.faults = [(600_000, None), None, (600_000, None)]  # gdown asks for all of it before it asks for the rest
    for kept in (2 ** 19, 2 ** 20):  # gdown writes pieces of that size
        cut = run(MODEL)
        assert cut.status == 1 and f'{kept:,} bytes are kept for the next attempt' in cut.out
        assert f'run `timm-smpconv weights {MODEL} --file FILE`'.replace(MODEL, NAME) in cut.err
        assert list(files(cache).values()) == [checkpoint[1].read_bytes()[:kept]]
    done = run(MODEL)
    assert done.status == 0 and '1,048,576 bytes of it are here from an earlier attempt' in done.out
    assert [wanted for wanted in drive.sent() if wanted] == ['bytes=524288-', 'bytes=1048576-']
    assert file_sha256(checkpoint[1]) in done.out and set(files(cache)) == {f'{NAME}/{file}' for file in FILES}


def test_a_connection_that_breaks_off_is_tried_again(drive, checkpoint, cache, run, monkeypatch):
    monkeypatch.setattr(client, 'RETRIES', 1)
    drive.faults = [(600_000, None)]
    done = run(MODEL)
    assert done.status == 0 and file_sha256(checkpoint[1]) in done.out and drive.sent()[-1] == 'bytes=524288-'


@pytest.mark.parametrize('change', ['no ranges', 'another file', 'too much'])
def test_a_rest_that_the_drive_does_not_send(drive, checkpoint, cache, run, change):
    """Then all of it is downloaded again: what has arrived is never put together with something else."""
    file = drive.files[id_of(NAME)]
    if change == 'too much':
        part = cache / f'{NAME}.download' / 'checkpoint12345678.part'
        part.parent.mkdir(parents=True)
        part.write_bytes(file.data + b'more')
    else:
        drive.faults = [(600_000, None)]
        assert run(MODEL).status == 1
    if change == 'no ranges':
        file.ranges = False
    done = run(MODEL)
    assert done.status == 0 and file_sha256(checkpoint[1]) in done.out


@pytest.mark.parametrize('state,message', [
    ('quota', f'could not be downloaded: {QUOTA[:-1]}'),
    ('sign-in', "could not be downloaded: .* permission to 'Anyone with the link'"),
    ('changed', "could not be downloaded: .* permission to 'Anyone with the link'"),
    ('formless', "led to a page that gdown does not understand: KeyError 'action'"),
    ('untyped', "led to a page that gdown does not understand: KeyError 'content-type'"),
    ('asks again', 'led to no file within 1 seconds'),
    ('busy', 'could not be downloaded: 503 Server Error'),
    (None, 'could not be downloaded: '),
])
def test_pages_instead_of_the_file(drive, cache, run, state, message, monkeypatch):
    if state == 'asks again':
        monkeypatch.setattr(client, 'PATIENCE', 1)
    if state:
        drive.files[id_of(NAME)].state = state
    else:
        del drive.files[id_of(NAME)]
    failed = run(MODEL)
    assert failed.status == 1 and re.search(message, failed.err) and len(failed.err.splitlines()) == 1
    assert SOURCES[NAME]['origin']['file'] in failed.err and f'timm-smpconv weights {NAME} --file FILE' in failed.err
    assert not files(cache) and not list(cache.glob('*.download'))


def test_a_page_instead_of_the_rest_leaves_what_has_arrived(drive, cache, run):
    drive.faults = [(600_000, None)]
    run(MODEL)
    before = files(cache)
    drive.files[id_of(NAME)].state = 'quota'
    failed = run(MODEL)
    assert failed.status == 1 and 'Too many users' in failed.err and '524,288 bytes are kept' in failed.out
    assert files(cache) == before


def test_without_a_network(drive, cache, run, monkeypatch):
    for name in ('HTTPS_PROXY', 'https_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # where nobody listens
    failed = run(MODEL)
    assert failed.status == 1 and 'could not be downloaded' in failed.err
    assert len(failed.err.splitlines()) == 1 and not files(cache)


@pytest.mark.parametrize('what,message', [
    ('text', 'must be an undamaged weights-only checkpoint'),
    ('another network', 'exactly the keys of the model'),
])
def test_a_file_that_is_not_the_authors(drive, cache, run, what, message, tmp_path):
    torch.save({'model': reference_smp.authors_state_dict('smpconv_resnet_cifar10')}, tmp_path / 'other.pt')
    drive.files[id_of(NAME)].data = b'<!DOCTYPE html>' if what == 'text' else (tmp_path / 'other.pt').read_bytes()
    failed = run(MODEL)
    assert failed.status == 1 and message in failed.err and 'the downloaded file was deleted' in failed.err
    assert 'arbitrary code' not in failed.err  # torch.load advises to run it
    assert len(failed.err.splitlines()) == 1 and not files(cache)


def test_the_recorded_hash(drive, checkpoint, cache, run, monkeypatch):
    sha256 = file_sha256(checkpoint[1])
    assert run(MODEL).status == 0  # before anything was recorded
    record(monkeypatch, '0' * 64)
    with pytest.raises(CheckpointError, match=f'of sha256 {"0" * 64}, got one of {sha256}; run `timm-smpconv weights'):
        timm.create_model(MODEL, pretrained=True, cache_dir=cache)
    before = files(cache)
    refused = run(MODEL)
    assert refused.status == 1 and 'replacing it' in refused.out and files(cache) == before
    assert f'must have the sha256 {"0" * 64} that is recorded for it, got {sha256}' in refused.err
    record(monkeypatch, sha256)
    assert timm.create_model(MODEL, pretrained=True, cache_dir=cache) is not None
    assert run('--remove', MODEL).status == 0
    done = run(MODEL)
    assert done.status == 0 and 'not recorded' not in done.out and f'("{MODEL}", pretrained=True' in done.out
    monkeypatch.setitem(pretrained.BUILT_IN, NAME, '0' * 64)  # published: pretrained=True takes that
    assert f'timm.create_model("local-dir:{cache / NAME}", pretrained=True) takes it' in run(MODEL).out


@pytest.mark.parametrize('file,content,message', [
    ('model.safetensors', None, 'must have the sha256 .* with which it was written'),
    ('config.json', b'{}', r"config.json must be that of converted weights, .* \(KeyError 'origin'\)"),
])
def test_damage_in_the_cache_is_found_and_mended(drive, checkpoint, cache, run, file, content, message):
    assert run(MODEL).status == 0
    path = cache / NAME / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data) if content is None else content)
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(MODEL, pretrained=True, cache_dir=cache)
    if content is not None:  # then nothing tells that the folder is ours
        assert f'run `timm-smpconv weights {NAME} --remove`' in run(MODEL).err
        assert run('--remove', MODEL).status == 0
    assert run(MODEL).status == 0
    assert same_as_the_oracle(timm.create_model(MODEL, pretrained=True, cache_dir=cache), checkpoint[0])


def test_no_room(drive, cache, run, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(client.shutil, 'disk_usage', lambda path: usage)
    failed = run(MODEL)
    size = len(drive.files[id_of(NAME)].data)
    assert failed.status == 1 and f'must have room for {size - 2 ** 19:,} more bytes, got 1,000 bytes' in failed.err


def test_a_full_disk(drive, checkpoint, cache, run):
    """Files may have 1 MB here: the download ends in the middle. With room for it, the next attempt goes on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        failed = run(MODEL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.status == 1 and len(failed.err.splitlines()) == 1
    assert os.strerror(errno.EFBIG) in failed.err and re.search(r'[\d,]+ bytes are kept', failed.out)
    assert run(MODEL).status == 0 and set(files(cache)) == {f'{NAME}/{file}' for file in FILES}


def test_a_cache_that_cannot_be_written(drive, cache, run):
    cache.write_text('a file')
    failed = run(MODEL)
    assert failed.status == 1 and str(cache) in failed.err and len(failed.err.splitlines()) == 1
    assert cache.read_text() == 'a file'


def test_a_cache_that_is_only_read(checkpoint, cache, run, monkeypatch):
    """Weights that are there need no lock; that of another user's cache is no reason not to import the package."""
    assert run(MODEL, '--file', checkpoint[1]).status == 0
    (cache / f'{NAME}.lock').unlink()
    (cache / f'{NAME}.lock').mkdir()  # no file can be written there
    done = run(MODEL)
    assert done.status == 0 and 'is there already' in done.out
    (cache / NAME / 'README.md').unlink()
    failed = run(MODEL, '--file', checkpoint[1])
    assert failed.status == 1 and str(cache / f'{NAME}.lock') in failed.err

    def forbidden(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(Path, 'is_file', forbidden)
    assert pretrained.hub_id(NAME) is None


def test_an_interrupt_of_the_download(drive, checkpoint, cache, run):
    main_thread = threading.main_thread().ident
    drive.faults = [(600_000, lambda: signal.pthread_kill(main_thread, signal.SIGINT))]
    stopped = run(MODEL)
    assert stopped.status == 130
    assert ('bytes are kept for the next attempt' in stopped.out) == bool(files(cache))
    assert all(checkpoint[1].read_bytes().startswith(content) for content in files(cache).values())
    assert run(MODEL).status == 0


def test_an_interrupt_of_the_conversion(drive, cache, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, 'oracle', lambda *args: signal.raise_signal(signal.SIGINT))
        stopped = run(MODEL)
    assert stopped.status == 130 and 'interrupted' in stopped.err
    assert set(files(cache)) == {f'{NAME}.download/checkpoint'}
    before = len(drive.requests)
    assert run(MODEL).status == 0 and len(drive.requests) == before


def test_a_file_from_a_browser(drive, checkpoint, cache, run, tmp_path):
    done = run(MODEL, '--file', checkpoint[1])
    assert done.status == 0 and not drive.requests and checkpoint[1].exists()
    assert find_cached(NAME, cache) and same_as_the_oracle(
        timm.create_model(MODEL, pretrained=True, cache_dir=cache), checkpoint[0])
    failed = run('smpconv_tcn_sc', '--file', tmp_path / 'missing')
    assert failed.status == 1 and 'No such file' in failed.err and len(failed.err.splitlines()) == 1


def test_without_gdown(drive, cache, run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    monkeypatch.delitem(sys.modules, 'timm_smpconv.tools.authors_weights.drive')
    failed = run(MODEL)
    assert failed.status == 1 and failed.err.endswith('gdown is missing; it comes with the extra "weights"')


@pytest.mark.parametrize('args,status,message', [
    (['smpconv_huge'], 2, "NAME must be one of smpconv_tiny, smpconv_base, .*, got 'smpconv_huge'"),
    (['smpconv_mobile31'], 1, 'there are no weights of smpconv_mobile31: the authors published none. Train it'),
    ([], 2, 'arguments must be NAME, NAME --file FILE, NAME --remove or --list'),
    (['--remove'], 2, 'arguments must be'),
    (['--list', MODEL], 2, 'arguments must be'),
    ([MODEL, '--remove', '--file', 'a'], 2, 'arguments must be'),
    (['--remove', MODEL], 2, 'NAME must be that of weights in the cache'),
])
def test_bad_arguments(run, cache, args, status, message):
    failed = run(*args)
    assert failed.status == status and re.search(message, failed.err) and len(failed.err.splitlines()) == 1
    assert not cache.exists()


def test_models_are_listed_as_pretrained_when_they_can_be_had(checkpoint, monkeypatch, tmp_path):
    """What a cfg gets when the package is imported."""
    monkeypatch.setattr(pretrained, 'BUILT_IN', dict.fromkeys(pretrained.BUILT_IN))
    assert pretrained.hub_id(NAME) is None
    monkeypatch.setattr('timm_smpconv.weights.hub.constants.HF_ASSETS_CACHE', str(tmp_path))
    assert main(['weights', MODEL, '--file', str(checkpoint[1])]) == 0
    assert find_cached(NAME) == tmp_path / 'timm-smpconv' / 'weights' / NAME
    assert pretrained.hub_id(NAME) == f'timm-smpconv/{NAME}' and pretrained.hub_id('smpconv_tiny.in1k') is None
    assert same_as_the_oracle(timm.create_model(MODEL, pretrained=True), checkpoint[0])
    monkeypatch.setitem(pretrained.BUILT_IN, 'smpconv_tiny.in1k', '0' * 64)
    assert pretrained.hub_id('smpconv_tiny.in1k') == 'timm-smpconv/smpconv_tiny.in1k'


def environment(drive, tmp_path):
    """Of a process that knows this drive and this cache only."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
    return {**kept, **drive.environment(), 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1'}


@pytest.mark.slow
def test_two_processes_at_once(drive, checkpoint, tmp_path):
    """The second one waits, and takes what the first one made."""
    go_on = threading.Event()
    drive.faults = [(600_000, lambda: go_on.wait(120))]
    argv = [sys.executable, '-m', 'timm_smpconv', 'weights', MODEL]

    def start():
        return subprocess.Popen(
            argv, env=environment(drive, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    one = start()
    assert drive.reached.wait(120)
    two = start()
    assert two.stdout.readline() == f'waiting for another process that works on {NAME}\n'
    go_on.set()
    for process in one, two:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert 'is there already' in out and len(drive.sent()) == 1


@pytest.mark.slow
def test_killed_in_the_middle(drive, tmp_path):
    """SIGKILL leaves no lock and no half folder, and the next process goes on."""
    go_on = threading.Event()
    drive.faults = [(1_200_000, lambda: go_on.wait(120))]
    argv = [sys.executable, '-m', 'timm_smpconv', 'weights', MODEL]
    process = subprocess.Popen(
        argv, env=environment(drive, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert drive.reached.wait(120)
    process.kill()
    process.wait()
    go_on.set()
    done = subprocess.run(argv, env=environment(drive, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_tiny_from_the_drive_to_timms_list(drive, tmp_path):
    sd = authors_state_dict('smpconv_tiny')
    path = save_as_the_authors_do(tmp_path / 'SMPConv_T.pth', ema=sd, model=authors_state_dict('smpconv_tiny', seed=1))
    drive.files[id_of('smpconv_tiny.in1k')] = File(Path(path).read_bytes(), large=True)
    argv = [sys.executable, '-m', 'timm_smpconv', 'weights', 'smpconv_tiny']
    done = subprocess.run(argv, env=environment(drive, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = (
        'import timm, timm_smpconv, torch\n'
        'x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))\n'
        'with torch.inference_mode():\n'
        '    y = timm.create_model("smpconv_tiny", pretrained=True).eval()(x)\n'
        'torch.save((y, timm.list_models("smpconv*", pretrained=True)), "found.pth")\n')
    subprocess.run([sys.executable, '-c', code], env=environment(drive, tmp_path), cwd=tmp_path, check=True)
    found, listed = torch.load(tmp_path / 'found.pth')
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    assert difference(found, logits(sd, 'smpconv_tiny', x)) < 1e-5
    published = {name for name, sha256 in pretrained.BUILT_IN.items() if sha256}
    assert set(listed) >= {'smpconv_tiny.in1k'} and not published - set(listed)
