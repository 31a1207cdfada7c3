"""A release: sdist and wheel built from a copy of this checkout, installed without extras and run outside it."""
import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import convert
import pytest
import torch
import yaml
from conftest import TOKENS
from hub_server import HubServer
from reference import authors_state_dict, logits
from test_convert import serve_image
from timm.data import ImageNetInfo, create_transform

import timm_smpconv

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'timm_smpconv'
VERSION = timm_smpconv.__version__


def run(*command, **kwargs):
    result = subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    """The folder of the sdist and the wheel, which is built from the sdist; any warning of setuptools fails."""
    folder = tmp_path_factory.mktemp('release')
    left_out = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', 'dist', 'smpconv-demo', 'shared')
    shutil.copytree(ROOT, folder / 'source', ignore=left_out)
    shutil.copytree(ROOT / '.ci', folder / 'source' / '.ci')
    shutil.copy(ROOT / '.pre-commit-config.yaml', folder / 'source')
    # No isolation: what pyproject.toml requires for the build is in the extra `test`, and nothing is downloaded.
    environ = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'}  # setuptools warns of it
    output = run('-m', 'build', '--no-isolation', '--outdir', folder / 'dist', folder / 'source', env=environ)
    assert 'Successfully built' in output and not re.search(r'warning|deprecat|absent from', output, re.IGNORECASE)
    return folder / 'dist'


@pytest.fixture(scope='module')
def wheel(dist):
    (path,) = dist.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def unpacked(dist, tmp_path_factory):
    """The folder of the unpacked sdist."""
    (path,) = dist.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        archive.extractall(folder := tmp_path_factory.mktemp('unpacked').resolve(), filter='data')
    return folder / f'timm_smpconv-{VERSION}'


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f'timm_smpconv-{VERSION}.dist-info/METADATA'))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel, metadata):
    expected = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob('*') if path.suffix in ('.py', '.yaml')}
    expected |= {path.name for path in ROOT.glob('timm_smpconv*.py')}  # modules beside the package
    assert 'timm_smpconv/training/recipes/smpconv_tiny.yaml' in expected
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if '.dist-info/' not in name]
        assert set(names) == expected | {'timm_smpconv/py.typed'} and len(set(names)) == len(names)
        licence = archive.read(f'timm_smpconv-{VERSION}.dist-info/licenses/LICENSE')
    assert licence == (ROOT / 'LICENSE').read_bytes()
    assert (metadata['Name'], metadata['Version'], metadata['License-Expression']) == ('timm-smpconv', VERSION, 'MIT')
    assert {'demo', 'deploy', 'scripts', 'test', 'tools'} <= set(metadata.get_all('Provides-Extra'))


@pytest.mark.slow
def test_sdist_holds_the_checkout(dist, unpacked):
    source = dist.parent / 'source'
    folders = ('.ci', 'benchmarks', 'docs', 'tests', 'timm_smpconv', 'weights')
    expected = {
        '.pre-commit-config.yaml', 'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'MANIFEST.in', 'README.md',
        'hubconf.py', 'noxfile.py', 'pyproject.toml',
        *(p.relative_to(source).as_posix() for folder in folders for p in (source / folder).rglob('*') if p.is_file())}
    found = {path.relative_to(unpacked) for path in unpacked.rglob('*') if path.is_file()}
    added = ('PKG-INFO', 'setup.cfg', 'timm_smpconv.egg-info')  # by setuptools
    assert {path.as_posix() for path in found if path.parts[0] not in added} == expected
    assert {'tests/plugins/float64.py', 'weights/convert.py', 'docs/kernels.png'} <= expected


@pytest.mark.slow
@pytest.mark.timeout(900)  # it runs hundreds of tests
def test_tests_run_from_the_sdist(unpacked):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(('PYTEST_', 'PYTHONPATH'))}
    where = run('-c', 'import timm_smpconv; print(timm_smpconv.__file__)', cwd=unpacked, env=environ)
    assert Path(where.strip()).parent == unpacked / 'timm_smpconv'
    output = run(
        '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/layers/test_kernel.py', 'tests/layers/test_layers.py',
        'tests/weights/test_convert.py', 'tests/weights/test_publish.py',
        'tests/test_docs.py::test_commit_hooks_run_what_ci_runs', cwd=unpacked, env=environ)
    assert re.search(r'^\d{2,} passed', output, re.MULTILINE), output


@pytest.mark.slow
def test_the_index_would_accept_it(dist):
    output = run('-m', 'twine', 'check', '--strict', *dist.iterdir(), env=dict(os.environ, COLUMNS='300', NO_COLOR='1'))
    assert output.count('PASSED') == 2


@pytest.mark.slow
def test_installs_without_extras_and_runs_outside_the_checkout(wheel, metadata, tmp_path):
    installed, work = tmp_path / 'installed', tmp_path / 'work'
    run('-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--target', installed, wheel)
    work.mkdir()
    extras = {
        re.match(r'[\w.-]+', line)[0] for line in metadata.get_all('Requires-Dist')
        if re.search(r'extra == "(demo|export|scripts)"', line)}
    assert {'matplotlib', 'scikit-learn'} <= extras
    blocked = dict.fromkeys({'sklearn', *extras})
    (installed / 'sitecustomize.py').write_text(f'import sys\nsys.modules.update({blocked})\n')
    environ = dict(os.environ, PYTHONPATH=str(installed))

    def command(*args, code=0):
        result = subprocess.run(
            [sys.executable, '-m', 'timm_smpconv', *args], cwd=work, env=environ, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return result.stdout.strip() if code == 0 else result.stderr.strip()

    assert command('--version') == VERSION
    assert command('recipe').splitlines() == sorted(path.stem for path in PACKAGE.glob('training/recipes/*.yaml'))
    recipe = Path(command('recipe', 'smpconv_tiny'))
    assert installed in recipe.parents and yaml.safe_load(recipe.read_text(encoding='utf-8'))['opt'] == 'smpadamw'
    (work / 'script.py').write_text(
        'import sys, timm, timm_smpconv\n'
        'model = timm.create_model("smpconv_mobile31", num_classes=3)\n'
        'print(timm_smpconv.__file__, type(model).__name__, *sys.argv[1:])\n')
    path, *rest = command('run', 'script.py', 'an argument').split(maxsplit=2)
    assert installed in Path(path).parents and rest == ['SMPConvNet', 'an argument']
    assert 'it comes with the extra "demo"' in command('demo', code=1)
    assert 'it comes with the extra "demo"' in command('picture', 'kernels', 'smpconv_mobile31', code=1)
    assert 'https://drive.google.com/' in command('weights', '--cache-dir', 'cache')
    script = installed / 'bin' / 'timm-smpconv'
    assert run(script, '--version', cwd=work, env=environ).strip() == VERSION


@pytest.mark.slow
def test_code_of_the_card_runs_where_only_the_package_is_installed(wheel, tmp_path):
    """Each block in a process of its own, with a Hub on loopback; the one for transformers imports no timm_smpconv."""
    pytest.importorskip('transformers')
    installed, work = tmp_path / 'installed', tmp_path / 'work'
    run('-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--target', installed, wheel)
    work.mkdir()
    state_dict = authors_state_dict('smpconv_mobile31')
    torch.save({'model': state_dict}, tmp_path / 'mobile.pth')
    command = [str(tmp_path / 'mobile.pth'), '--model', 'smpconv_mobile31', '--out', str(tmp_path / 'net'), '--merged']
    assert convert.main(command) == 0
    with HubServer(TOKENS) as server:
        image = serve_image(server, 250, 300)
        environ = {**{k: v for k, v in os.environ.items() if k[:3] != 'HF_'}, 'HF_HOME': str(work / 'home')}
        for name in 'net', 'net-merged':
            run(ROOT / 'weights' / 'publish.py', tmp_path / name, '--repo-id', f'alice/{name}', '--upload',
                env={**environ, **server.environment('hf_writer')})
        environ.update(server.environment(), PYTHONPATH=str(installed))
        outputs = {
            (name, find_subject(code)): run('-c', WATCH.replace('CODE', code), cwd=work, env=environ)
            for name in ('net', 'net-merged')
            for code in re.findall(
                r'```python\n(.*?)```', server.files(f'alice/{name}')['README.md'].decode(), re.DOTALL)}
    assert len(outputs) == 9 and all(str(installed) in output for output in outputs.values())
    x = create_transform((3, 224, 224), interpolation='bicubic', crop_pct=0.875)(image)[None]
    scores, classes = logits(state_dict, 'smpconv_mobile31', x).softmax(1)[0].topk(5)
    labels = ImageNetInfo().label_descriptions()
    for name in 'net', 'net-merged':
        lines = [f'{score:.1%} {labels[label]}' for score, label in zip(scores, classes)]
        assert '\n'.join(lines) in outputs[name, 'topk']
        assert 'torch.Size([1, 320, 7, 7])' in outputs[name, 'features_only']
        found = ast.literal_eval(re.search(r'^\[.*\]$', outputs[name, 'transformers'], re.MULTILINE)[0])
        assert [row['label'] for row in found] == [labels[label] for label in classes]
        assert [row['score'] for row in found] == pytest.approx(scores.tolist(), rel=1e-4)
        assert 'not supported' not in outputs[name, 'transformers']


# Tells where the package is that the code imported, or had imported by transformers.
WATCH = '''import sys
assert "timm_smpconv" not in sys.modules
CODE
print(sys.modules["timm_smpconv"].__file__)
'''


def find_subject(code):
    return re.search(r'transformers|topk|features_only|num_classes=0|reparameterize_model', code)[0]


def test_the_version_stands_in_one_place():
    tree = ast.parse((PACKAGE / '__init__.py').read_text(encoding='utf-8'))
    assigned = [
        node.value.value for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == '__version__']
    assert assigned == [VERSION]
    assert not re.search(r'^version\s*=\s*"', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'), re.MULTILINE)
    released = re.findall(r'^## \[(\d[^]]*)\]', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert released[0] == VERSION  # CONTRIBUTING.md, "Release": both are set in the same commit
