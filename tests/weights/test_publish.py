"""publish.py: from folders, and from the authors' files, to a Hub on loopback and into sources.yaml.

Oracles: the files that were to be uploaded, the table before, and tests/reference.py. The slow test goes all the way:
in processes with the real clients, from a drive and a Hub on loopback to `pretrained=True` on another machine.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import starmap
from pathlib import Path

import convert
import publish
import pytest
import reference_smp
import torch
import yaml
from conftest import TOKENS, difference, interrupt
from drive_server import DriveServer, File
from hub_server import HubServer
from huggingface_hub import constants
from reference import authors_state_dict, logits
from test_authors_networks import double

from timm_smpconv.weights import hub

ROOT = Path(__file__).parents[2]
REPO = 'timm-smpconv/net'
CT, TINY = 'smpconv_tcn_ct.character_trajectories', 'smpconv_tiny.in1k'


def unpublished(text):
    """Of sources.yaml, before anything was published or recorded."""
    return re.sub(r'^( +)(bytes|sha256|hub_id|commit): \S+', r'\1\2: null', text, flags=re.MULTILINE)


def write_folder(path, weights=b'weights'):
    """What publish.py reads of a folder that convert.py wrote."""
    path.mkdir(parents=True, exist_ok=True)
    (path / 'README.md').write_text('---\nlicense: mit\n---\n"hf-hub:ORG/x" ORG/x-merged\n', encoding='utf-8')
    (path / 'model.safetensors').write_bytes(weights)
    origin = {'file_sha256': hashlib.sha256(weights).hexdigest()}
    (path / 'config.json').write_text(json.dumps({'origin': origin}), encoding='utf-8')
    shutil.copy(convert.REMOTE_CODE, path)
    return path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / 'out')


@pytest.fixture
def run(server, monkeypatch, tmp_path, capfd):
    """Run publish.py in this process: (status, output, errors)."""
    def run(*args, token='hf_writer'):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN', raising=False)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no token'))
        return publish.main(list(map(str, args))), *capfd.readouterr()
    return run


@pytest.mark.parametrize('token,options,status,message', [
    (None, [], 0, 'nothing was uploaded; --upload does it'),
    (None, ['--upload'], 1, 'no token found: run `hf auth login` or set HF_TOKEN; nothing was created'),
    ('hf_unknown', ['--upload'], 1, 'rejects the token; nothing was created'),
    ('hf_reader', ['--upload'], 1, 'the token must have write access, got a read-only one; nothing was created'),
    ('hf_stranger', ['--upload'], 2, 'the owner must be eve or an organisation of theirs, got timm-smpconv'),
])
def test_publishing_nothing(server, folder, run, token, options, status, message):
    found, out, err = run(folder, '--repo-id', REPO, *options, token=token)
    assert found == status and message in out + err
    assert len(err.splitlines()) <= 1 and not server.exists(REPO)


def test_publishing_a_folder_privately_again_on_a_branch_and_after_an_error(server, folder, run):
    command = folder, '--repo-id', REPO, '--upload', '--private'
    server.fail('POST', '/commit/main', 500, times=100)
    status, _, err = run(*command)
    assert status == 1 and f'the request to {server.url} failed' in err
    server.repair()
    for options in ([], [], ['--revision', 'retrained']):
        status, out, err = run(*command, *options)
        assert status == 0, err
    assert server.repositories[REPO].private and f'{REPO}, revision retrained:' in out
    card = f'---\nlicense: mit\n---\n"hf-hub:{REPO}" {REPO}-merged\n'.encode()
    expected = {**{path.name: path.read_bytes() for path in folder.iterdir()}, 'README.md': card}
    for revision in 'main', 'retrained':
        found = server.files(REPO, revision)
        assert {name: found[name] for name in convert.FILES} == expected
        assert set(found) == {'.gitattributes', *convert.FILES}
    for name, content in expected.items():
        assert re.search(rf'{len(content):,} bytes  {hashlib.sha256(content).hexdigest()}  {name}', out)
    server.repositories[REPO].private = False
    status, _, err = run(*command)
    assert status == 2 and 'which is public' in err


def test_an_interrupt(folder, run, monkeypatch):
    monkeypatch.setattr(publish.HfApi, 'create_commit', interrupt)
    status, _, err = run(folder, '--repo-id', REPO, '--upload')
    assert status == 130 and err == '\npublish: interrupted\n'


@pytest.mark.parametrize('file,content,repo,message', [
    ('README.md', None, REPO, 'DIR must be a folder that weights/convert.py wrote, got .* without README.md'),
    ('README.md', b'\xff\xfe', REPO, 'README.md in DIR must be UTF-8'),
    ('config.json', b'{}', REPO, "DIR must be .* with another config.json: KeyError 'origin'"),
    ('config.json', b'\xff', REPO, 'DIR must be .* with another config.json: UnicodeDecodeError'),
    ('config.json', b'[1]', REPO, 'DIR must be .* with another config.json: TypeError'),
    ('model.safetensors', b'weighty', REPO, 'with a model.safetensors that does not match its config.json'),
    ('README.md', b'---\n---\n', 'no namespace', "the repository must be ORG/NAME, got 'no namespace'"),
    ('README.md', b'---\n---\n', 'name', "the repository must be ORG/NAME, got 'name'"),
])
def test_bad_folders_and_names(folder, file, content, repo, message, run):
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    status, _, err = run(folder, '--repo-id', repo)
    assert status == (2 if message.startswith('the repository') else 1)
    assert re.search(message, err) and len(err.splitlines()) == 1


@pytest.mark.parametrize('args', [['DIR'], ['--all'], ['--only', TINY], ['DIR', '--all', '--org', 'o'], []])
def test_arguments_that_belong_together(args, capsys):
    with pytest.raises(SystemExit) as exit:
        publish.main(args)
    assert (exit.value.code == 2 and 'required' in (err := capsys.readouterr().err)) or 'not allowed with' in err


def test_a_card_that_the_hub_refuses(server, folder, run):
    (folder / 'README.md').write_text('---\nlicense: mine\n---\n')
    status, _, err = run(folder, '--repo-id', REPO, '--upload')
    assert status == 1 and 'must be a model card that the Hub accepts' in err
    assert set(server.files(REPO)) == {'.gitattributes'}


# The authors' weights


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A copy of sources.yaml in which nothing is published or recorded."""
    text = unpublished(hub.SOURCES.read_text(encoding='utf-8'))
    (tmp_path / 'sources.yaml').write_text(text, encoding='utf-8')
    monkeypatch.setattr(hub, 'SOURCES', tmp_path / 'sources.yaml')
    return tmp_path / 'sources.yaml'


@pytest.fixture
def without_networks(monkeypatch):
    """The authors' files are their names, and converting writes what `write_folder` does; names of those downloaded."""
    def download(name, path):
        downloaded.append(name)
        path.write_text(name)

    def converted(file, model, out, tag, merged, downloaded):
        for folder in (out, out.with_name(f'{out.name}-merged')):
            yield convert.Converted(write_folder(folder, folder.name.encode()), 1e-7, '')

    downloaded = []
    monkeypatch.setattr(hub, 'download_authors', download, raising=False)
    monkeypatch.setattr(publish, 'convert', converted)
    return downloaded


def test_all_of_them_are_shown_then_published_and_recorded(server, run, table, without_networks, tmp_path):
    before = table.read_text(encoding='utf-8')
    entries = yaml.safe_load(before)
    names = [name for name, entry in entries.items() if entry['origin']]
    command = '--all', '--org', 'timm-smpconv', '--work', tmp_path / 'work'
    status, out, err = run(*command, token=None)
    assert status == 0 and not err and 'nothing was uploaded; --upload does it' in out
    assert not server.repositories and table.read_text(encoding='utf-8') == before and without_networks == names
    status, out, err = run(*command, '--upload')
    assert status == 0, err
    assert set(server.repositories) == {f'timm-smpconv/{name}{kind}' for name in names for kind in ('', '-merged')}
    for name in names:
        published = server.files(f'timm-smpconv/{name}')['model.safetensors']
        assert published == name.encode() and f'"hf-hub:timm-smpconv/{name}"' in (
            server.files(f'timm-smpconv/{name}')['README.md'].decode())
        sha256 = hashlib.sha256(published).hexdigest()  # of the file on the drive as well, in this test
        entries[name]['origin'].update(bytes=len(name), sha256=sha256)
        entries[name].update(
            hub_id=f'timm-smpconv/{name}', sha256=sha256,
            commit=server.repositories[f'timm-smpconv/{name}'].branches['main'])
    after = table.read_text(encoding='utf-8')
    assert yaml.safe_load(after) == entries
    for old, new in zip(before.splitlines(), after.splitlines(), strict=True):  # comments and order stay
        assert old == new or old.replace(r': null', '') == re.sub(r': [^ ]+', '', new, count=1)


def test_what_was_recorded_is_compared(run, server, table, without_networks, tmp_path):
    publish.record(CT, {'bytes': 3, 'sha256': '0' * 64}, {})
    status, _, err = run('--only', CT, '--org', 'timm-smpconv', '--upload', '--work', tmp_path / 'work')
    assert status == 1 and "must have {'bytes': 3, 'sha256': '00" in err and not server.repositories


@pytest.mark.parametrize('name', ['smpconv_mobile31.in1k', 'smpconv_tiny'])
def test_names_without_an_authors_file(run, table, name, tmp_path):
    status, _, err = run('--only', name, '--org', 'timm-smpconv', '--work', tmp_path / 'work')
    assert status == 2 and f'--only must name some of {TINY}, ' in err and err.strip().endswith(f'got {name}')
    assert not (tmp_path / 'work').exists()


def test_a_file_that_the_drive_does_not_send(run, table, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    status, _, err = run('--only', TINY, '--org', 'timm-smpconv', '--work', tmp_path / 'work')
    assert status == 1 and len(err.splitlines()) == 1
    assert err.endswith(f'takes the file from elsewhere, and publish.py from {tmp_path}/work/{TINY}.pth\n')


LOAD = '''
import sys
import timm, torch
import timm_smpconv
print(timm_smpconv.__file__, file=sys.stderr)
image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
series = torch.randn(1, 3, 182, generator=torch.Generator().manual_seed(1))
maps = []
with torch.inference_mode():
    found = [timm.create_model("smpconv_tiny", pretrained=True).eval()(image)]
    found.append(timm.create_model("smpconv_tcn_ct", pretrained=True).eval()(series))
    for repo in "hf-hub:timm-smpconv/smpconv_tiny.in1k", "hf-hub:timm-smpconv/smpconv_tiny.in1k-merged":
        found.append(timm.create_model(repo, pretrained=True).eval()(image))
        maps.append(timm.create_model(repo, pretrained=True, features_only=True).eval()(image))
torch.save((image, series, found, maps), "found.pth")
'''


@pytest.mark.slow
def test_publishing_day(tmp_path):
    """From the authors' files on a drive, by the command of the docs, to another machine that has the Hub alone.

    In a copy of the checkout, whose table lists two of the weights that exist and one that does not.
    """
    checkout, elsewhere = tmp_path / 'checkout', tmp_path / 'elsewhere'
    for name in 'timm_smpconv', 'weights':
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns('__pycache__'))
    table = checkout / 'timm_smpconv' / 'weights' / 'sources.yaml'
    entries = re.split(r'^(?=smpconv_)', table.read_text(encoding='utf-8'), flags=re.MULTILINE)
    kept = [entry for entry in entries[1:] if entry.startswith((TINY, CT, 'smpconv_mobile31'))]
    text = unpublished(''.join(kept))
    table.write_text(text, encoding='utf-8')
    elsewhere.mkdir()
    states = {TINY: authors_state_dict('smpconv_tiny'), CT: reference_smp.authors_state_dict('smpconv_tcn_ct')}
    other = authors_state_dict('smpconv_tiny', seed=1)
    torch.save({'state_dict': other, 'state_dict_ema': states[TINY]}, tmp_path / TINY)
    torch.save({'model': states[CT], 'epoch': 200}, tmp_path / CT)

    def python(*command, cwd, home, **environ):
        environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith('HF_')}, 'NO_PROXY': '127.0.0.1',
            'PYTHONPATH': str(checkout), 'HF_HOME': str(tmp_path / home), **environ}
        result = subprocess.run(
            [sys.executable, *map(str, command)], cwd=cwd, env=environ, text=True, capture_output=True, timeout=280)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    (tmp_path / 'drive').mkdir()
    with HubServer(TOKENS) as server, DriveServer(tmp_path / 'drive') as drive:
        listed = yaml.safe_load(text)
        for name in states:
            id_of_file = listed[name]['origin']['file'].rpartition('/')[2]
            drive.files[id_of_file] = File((tmp_path / name).read_bytes(), large=name == TINY)
        command = checkout / 'weights' / 'publish.py', '--all', '--org', 'timm-smpconv'
        shown = python(*command, cwd=checkout, home='publisher', **{**server.environment(), **drive.environment()})
        assert 'nothing was uploaded' in shown.stdout and not server.repositories
        assert table.read_text(encoding='utf-8') == text
        files = [line for line in shown.stdout.splitlines() if line.endswith(tuple(convert.FILES))]
        assert len(files) == 16  # four of each repository
        before = len(drive.sent())
        done = python(
            *command, '--upload', cwd=checkout, home='publisher',
            **{**server.environment('hf_writer'), **drive.environment()})
        assert [line for line in files if line not in done.stdout] == []  # what was shown is what was uploaded
        assert len(drive.sent()) == before  # nothing was downloaded twice
        requests = len(drive.requests)

        loaded = python('-c', LOAD, cwd=elsewhere, home='other machine', **server.environment())
        assert str(checkout) in loaded.stderr
        image, series, found, maps = torch.load(elsewhere / 'found.pth')
        expected = logits(states[TINY], 'smpconv_tiny', image)
        assert difference(found[0], expected) < 1e-5 and difference(found[3], expected) < 1e-4
        assert torch.equal(found[0], found[2])
        assert difference(found[1], reference_smp.logits(double(states[CT]), 'smpconv_tcn_ct', series.double())) < 1e-4
        assert max(starmap(difference, zip(*maps, strict=True))) < 1e-4
        asked = len(server.requests)
        python('-c', LOAD, cwd=elsewhere, home='other machine', HF_HUB_OFFLINE='1', **server.environment())
        assert len(server.requests) == asked and len(drive.requests) == requests
