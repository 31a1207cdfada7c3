"""timm's own model tests, from its source distribution, on this package's models.

The distribution is downloaded. Where that fails the test is skipped with the reason; in CI it fails.
"""
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm
from conftest import MODELS
from hub_server import HubServer, Repository
from timm.models import save_for_hf

# Forward, backward, cfg, TorchScript, features in two ways, intermediates, pruning, FX forward, backward and scripted.
# Pruning and FX are left out for base, which is tiny with other numbers, and for which they take 40 seconds.
PER_MODEL = {name: 7 if name == 'smpconv_base' else 10 for name in MODELS}


@pytest.fixture
def timm_tests(tmp_path):
    """A folder with timm's tests alone, so that they import the installed timm."""
    command = [
        sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:',
        '--dest', str(tmp_path), f'timm=={timm.__version__}']
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = f"timm's source distribution cannot be downloaded: {result.stderr.strip().splitlines()[-1]}"
        pytest.fail(reason) if os.environ.get('CI') else pytest.skip(reason)
    with tarfile.open(next(tmp_path.glob('timm-*.tar.gz'))) as archive:
        for name in ('tests/test_models.py', 'pyproject.toml'):
            member = archive.extractfile(f'timm-{timm.__version__}/{name}')
            target = tmp_path / 'timm' / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(member.read())
    models = tmp_path / 'timm' / 'tests' / 'test_models.py'
    # timm lists by file which models it tests for forward_intermediates: ours is one of them.
    text, count = re.subn(
        r'^FEAT_INTER_FILTERS = \[', "FEAT_INTER_FILTERS = ['smpconv', ", models.read_text(), flags=re.MULTILINE)
    assert count == 1
    models.write_text(text)
    return tmp_path / 'timm'


@pytest.fixture
def weights_on_a_hub(tmp_path):
    """The environment where the built-in weights exist, with random values, for timm's tests with pretrained=True."""
    with HubServer() as server:
        for name in timm.list_models('smpconv*', pretrained=True):
            save_for_hf(timm.create_model(name), tmp_path / name, safe_serialization=True)
            repository = server.repositories[timm.get_pretrained_cfg(name).hf_hub_id] = Repository(private=False)
            files = {path.name: repository.store(path.read_bytes(), large=True) for path in (tmp_path / name).iterdir()}
            repository.commit('main', 'weights', files)
        plugins = Path(__file__).parent / 'plugins'
        yield {**server.environment(), 'HF_HOME': str(tmp_path / 'cache'), 'PYTHONPATH': str(plugins)}


@pytest.mark.timeout(600)
def test_timm_model_tests_pass_on_every_model(timm_tests, weights_on_a_hub):
    command = [
        sys.executable, '-m', 'pytest', '-p', 'any_weights', 'tests/test_models.py', '-q',
        '-k', 'smpconv and not (smpconv_base and (fx or prune))',
        '-p', 'no:cacheprovider', '--junitxml', 'report.xml']
    result = subprocess.run(
        command, cwd=timm_tests, env={**os.environ, **weights_on_a_hub}, capture_output=True, text=True)
    cases = ElementTree.parse(timm_tests / 'report.xml').findall('.//testcase')
    passed = [c.get('name') for c in cases if not list(c.iter('failure')) and not list(c.iter('error'))]
    skipped = [c.get('name') for c in cases if list(c.iter('skipped'))]
    assert result.returncode == 0, result.stdout[-5000:]
    assert skipped == [] and len(passed) == len(cases)
    assert sum('pretrained' in name for name in passed) >= 4  # loading weights, and features of them, tiny and base
    for model in MODELS:
        assert sum(re.search(rf'-{model}(\.in1k)?\]', name) is not None for name in passed) >= PER_MODEL[model], model
