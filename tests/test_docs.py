"""README.md, CONTRIBUTING.md and docs/: code that runs, commands and options that exist, links with a target.

Also: the examples in docstrings run, and every public name has one.
"""
import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import convert
import numpy as np
import publish
import pytest
import reference_smp
import timm
import torch
import yaml
from conftest import MODELS, difference, shake_norms, wake_weights
from huggingface_hub import constants
from PIL import Image, ImageDraw
from reference import authors_state_dict
from test_optim import SAM
from test_publish import unpublished
from timm.data import create_transform, resolve_model_data_config
from torch.distributed.run import get_args_parser
from torch.distributed.tensor import DTensor

import timm_smpconv
from timm_smpconv.__main__ import main
from timm_smpconv.training.recipes import recipe_names, recipe_path
from timm_smpconv.weights import hub as pretrained

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
    for path in [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md'))]}
README = PAGES['README.md']


def blocks(page, language=''):
    """The code blocks of a page in a language; shell lines have none."""
    found = re.findall(r'^```(\w*)\n(.*?)^```$', PAGES[page], re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the Python blocks of a page in order in an empty folder, and yields their names after each."""
    monkeypatch.chdir(tmp_path)

    def run(page):
        names = {}
        for block in blocks(page, 'python'):
            exec(compile(block, page, 'exec'), names)
            yield names
    return run


@pytest.fixture
def checkpoint(run):
    """The authors' checkpoints, in the folder in which the blocks run."""
    state_dict = authors_state_dict('smpconv_tiny')
    torch.save({'state_dict_ema': state_dict}, 'SMPConv_T.pth')
    torch.save({'model': reference_smp.authors_state_dict('smpconv_tcn_ct')}, 'ct.pt')
    return state_dict


def test_readme(run):
    *_, names = run('README.md')
    with torch.no_grad():
        assert difference(names['logits'], names['model'](names['image'])) < 1e-5
    assert names['large'].stages[0].blocks[0].dwconv.large.conv.kernel_size == (61, 61)
    assert names['convnext'].stages[0].blocks[0].conv_dw.kernel_size == (31, 31)


def test_training(run):
    *_, names = run('docs/training.md')
    assert isinstance(names['optimizer'], torch.optim.SGD)


def test_layer_and_operator(run):
    *_, names = run('docs/layer-and-operator.md')
    assert difference(names['y'].new_tensor(names['errors']['native']), torch.tensor(1.1e-6)) < 1
    assert 1e-4 < names['errors']['fft'] < 1e-2  # the figures on the page, on any CPU


def test_replace(run):
    pages = run('docs/replace.md')
    names = next(pages)
    assert difference(names['model'](names['images']), names['before']) < 1e-5
    assert {row[1:4] for row in names['report'].replaced} == {((7, 7), (31, 31), 277)}
    next(pages)
    sizes = [row.kernel_size for row in names['model'].modules() if isinstance(row, timm_smpconv.SMPConv2d)]
    assert sizes == [(31, 31)] * 2 + [(13, 13)] * 2 + [(7, 7)] * 8
    *_, names = pages
    assert isinstance(names['optimizer'], timm_smpconv.SMPAdamW)


def test_kernel_size(run, capsys):
    *_, names = run('docs/kernel-size.md')
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert difference(names['again'](image), names['merged'](image)) < 1e-5
    assert capsys.readouterr().out == '[(64, 64), (32, 32), (16, 16), (16, 16)]\n'  # as the page says


def test_sequences(run):
    weights = timm.create_model('smpconv_tcn_ct').state_dict()
    torch.save({'state_dict': weights}, 'last.ckpt')  # as tests/training/test_sequences.py sees Lightning write it
    *_, names = run('docs/sequences.md')
    assert difference(names['again'], names['logits']) < 1e-5
    assert torch.equal(names['model'].head.fc.weight, weights['head.fc.weight'])


@pytest.mark.filterwarnings(r'ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4\.49)')
def test_commands_for_sequences_are_understood(capsys):
    recipe, count = '', 0
    for words in (words for page in PAGES for words in commands(page)):
        if words[:2] == ['timm-smpconv', 'recipe']:
            recipe = str(recipe_path(words[2]))
        elif words[:2] == ['timm-smpconv', 'sequence']:
            arguments = [recipe if word == 'SUBSTITUTED' else word for word in words[1:]]
            with pytest.raises(SystemExit) as exit:
                main(arguments if arguments[-1] == '--help' else [*arguments, '--print_config'])
            assert not exit.value.code, capsys.readouterr().err
            count += 1
    assert count >= 6


@pytest.mark.slow
def test_weights(run, checkpoint, server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    sources = tmp_path / 'sources.yaml'  # whatever was published
    sources.write_text(unpublished(pretrained.SOURCES.read_text(encoding='utf-8')), encoding='utf-8')
    monkeypatch.setattr(pretrained, 'SOURCES', sources)
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    by_script = [args for args in commands('docs/weights.md') if args[:1] == ['python']]
    for _, script, *args in by_script:
        if '--all' not in args:  # which tests/weights/test_publish.py runs
            main_of = {'weights/convert.py': convert.main, 'weights/publish.py': publish.main}[script]
            assert main_of([word.replace('ORG/NAME', 'timm-smpconv/smpconv_tiny.in1k') for word in args]) == 0
    assert len(by_script) == 5 and server.exists('timm-smpconv/smpconv_tiny.in1k')
    monkeypatch.setattr(constants, 'HF_ASSETS_CACHE', str(tmp_path / 'assets'))
    *_, given, removal = (args for args in commands('docs/weights.md') if args[:2] == ['timm-smpconv', 'weights'])
    assert '--file' in given and main(given[1:]) == 0
    *_, names = run('docs/weights.md')
    assert '--remove' in removal and main(removal[1:]) == 0 and not list(tmp_path.glob('assets/**/*.safetensors'))
    for key, value in names['converted'].state_dict().items():
        for name in ('theirs', 'pretrained', 'by_address'):
            assert torch.equal(names[name].state_dict()[key], value), (name, key)
    expected = reference_smp.logits(torch.load('ct.pt')['model'], 'smpconv_tcn_ct', names['series'])
    assert difference(names['logits'], expected) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Setting (forward, )?backward hooks')  # captum, of what it does
def test_deployment(run, monkeypatch):
    create = timm.create_model

    def awake(*args, **kwargs):  # initial weights make logits of 1e-8
        return wake_weights(shake_norms(create(*args, **kwargs)))

    monkeypatch.setattr(timm, 'create_model', awake)
    for names in run('docs/deployment.md'):
        if 'plain_logits' in names:
            assert difference(names.pop('plain_logits'), names['model'](names['image'])) < 1e-4
    image = torch.randn(1, 3, 64, 64)
    assert difference(names['again'].eval()(image), names['model'](image)) < 1e-5
    for name in ('deep_lift', 'guided'):
        assert names[name].isfinite().all() and names[name].any(), name
    assert names['relevance'].shape == names['pixels'].shape  # with random weights it overflows; see test_plain.py
    # As the page says of 1,000 classes; the model here has 10.
    assert round((names['macs'] + 990 * names['merged'].num_features) / 1e9, 3) == 5.668
    for name in ('found', 'by_module', 'by_operator'):
        assert 1 < names[name] / names['macs'] < 1.15, name  # with biases; of operators also BatchNorms and rendering


@pytest.mark.slow
@pytest.mark.filterwarnings(
    'ignore:.isinstance.treespec, LeafSpec:FutureWarning',  # of Lightning 2.6 and torch 2.14
    'ignore:.*(pin_memory|tensorboardX|many workers|number of training batches):UserWarning')  # advice of trainers
def test_tools(run, tmp_path, monkeypatch, request):
    request.addfinalizer(torch.distributed.destroy_process_group)  # which the page leaves behind
    monkeypatch.setitem(sys.modules, 'sam', SimpleNamespace(SAM=SAM))
    monkeypatch.setattr(
        torch.distributed, 'init_process_group', partial(
            torch.distributed.init_process_group, init_method=f'file://{tmp_path}/meet', rank=0, world_size=1))
    torch.save({'model': authors_state_dict('smpconv_mobile31', num_classes=10)}, 'digits.pth')
    (command,) = (args for args in commands('docs/tools.md') if args[:2] == ['python', 'weights/convert.py'])
    assert convert.main(command[2:]) == 0
    network = timm.create_model('local-dir:smpconv_mobile31.digits', pretrained=True).eval()
    for names in run('docs/tools.md'):
        if 'logits' in names:
            with torch.no_grad():
                image = create_transform(**resolve_model_data_config(network))(names['image'])[None]
                assert difference(names.pop('logits'), network(image)) < 1e-4
                assert names['scores'][0]['score'] == pytest.approx(network(image).softmax(1).max().item(), rel=1e-3)
    images = names['images']
    with torch.no_grad():
        maps = network.forward_intermediates(images, intermediates_only=True)
        trainable = names['trainable'].eval()(images).feature_maps
        for actual, restored, expected in zip(names['maps'], trainable, maps, strict=True):
            assert difference(actual, expected) < 1e-4
            assert difference(restored, expected) < 1e-4
        assert difference(names['merged_unet'](images), names['unet'](images)) < 1e-4
        assert names['deeplab'].eval()(images).shape == (2, 3, 64, 64)
        for level, expected in names['retinanet'].backbone(images).items():
            assert difference(names['merged_retinanet'].backbone(images)[level], expected) < 1e-4
        assert len(names['faster_rcnn'].eval()(list(images.sigmoid()))) == 2
    again = timm.create_model('local-dir:finetuned', pretrained=True).eval()
    with torch.no_grad():
        assert difference(again(images), names['classifier'].eval()(images).logits) < 1e-4
    assert isinstance(names['optimizer'], timm_smpconv.SMPAdamW)
    for trained in (again, names['module'].network, names['sharded'], names['replica'].module, names['sharp']):
        assert difference(*(full(m.head.fc.weight) for m in (trained, network))) > 1e-4
    rates = [group['lr'] for group in names['finetuner'].optimizers[0].param_groups]
    assert rates == [pytest.approx(1e-3), pytest.approx(2e-4)]  # the backbone's: 1e-4 at first


def full(weight):
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def test_pictures(run, tmp_path):
    *_, names = run('docs/pictures.md')
    assert names['field'].shape == (96, 96) and names['table'].count('smpconv_mobile31') == 1
    assert (tmp_path / 'receptive-field.pdf').stat().st_size > 5_000


QUICK = '''
from functools import partialmethod
import ultralytics
ultralytics.YOLO.train = partialmethod(ultralytics.YOLO.train, workers=0, plots=False, device='cpu', verbose=False)
'''
SAME = '''def same(results, expected):
    boxes, others = (r[0].boxes.data[r[0].boxes.data[:, 4].argsort(descending=True)][:20] for r in (results, expected))
    assert len(boxes) and boxes.shape == others.shape
    assert (boxes[:, :4] - others[:, :4]).abs().max() < 0.05  # pixels
    assert (boxes[:, 4] - others[:, 4]).abs().max() < 1e-4

same(after, before)
same(by_onnx, before)
same(merged_backbone, unmerged)
for network in (merged.model, YOLO('merged.pt').model, detector.model):
    assert not any(isinstance(m, timm_smpconv.SMPKernel) for m in network.modules())
kernels = [m for m in YOLO(model.trainer.best).model.modules() if isinstance(m, timm_smpconv.SMPKernel)]
assert len(kernels) == 2 and all(k.weight.shape[2] == 42 for k in kernels)
assert 'radius_lr_scale' in model.trainer.optimizer.param_groups[0]
x = torch.randn(1, 64, 20, 20)
assert (smp_yolo.SMPBlock(64).eval()(x)).shape == x.shape
kernel = timm_smpconv.render_kernel(copied['weight_coord'], copied['radius'].flatten(1), copied['weights'], (13, 13))
expected = torch.nn.functional.conv2d(x, kernel.transpose(0, 1), padding=6, groups=64)
assert (layer(x) - expected).abs().max() < 1e-4
merge_of_a_subclass = torch.nn.Module()
merge_of_a_subclass.model = torch.nn.Sequential(layer)
assert (smp_yolo.merge(merge_of_a_subclass).model(x) - expected).abs().max() < 1e-4
'''


@pytest.mark.slow
def test_yolo(tmp_path):
    """In another process, since ultralytics changes PyTorch's functions when it is imported. The data are drawn."""
    found = subprocess.run([sys.executable, '-c', 'import cv2, ultralytics'], capture_output=True, text=True)
    if found.returncode:  # its OpenCV needs libGL of the system
        pytest.skip(f'needs ultralytics: {found.stderr.splitlines()[-1]}')
    module, *rest = blocks('docs/yolo.md', 'python')
    (tmp_path / 'smp_yolo.py').write_text(module, encoding='utf-8')
    for text in blocks('docs/yolo.md', 'yaml'):
        (tmp_path / text.split()[1]).write_text(text, encoding='utf-8')
    draw = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for i in range(16):
        image = Image.fromarray(draw.integers(0, 90, (64, 64, 3), dtype=np.uint8))
        x, y = draw.integers(12, 52, 2).tolist()
        ImageDraw.Draw(image).ellipse((x - 8, y - 8, x + 8, y + 8), 'white')
        image.save(tmp_path / 'images' / f'{i}.png')
        (tmp_path / 'labels' / f'{i}.txt').write_text(f'0 {x / 64} {y / 64} {17 / 64} {17 / 64}')
    image.save(tmp_path / 'dot.png')
    (tmp_path / 'dots.yaml').write_text(f'path: {tmp_path}\ntrain: images\nval: images\nnames: [dot]\n')
    points = torch.rand(1, 4, 2) - 0.5, torch.full((1, 4, 1, 1), 0.3), torch.randn(1, 64, 4)
    torch.save(dict(zip(('weight_coord', 'radius', 'weights'), points)), tmp_path / 'copied.pt')
    (tmp_path / 'page.py').write_text('\n'.join([QUICK, *rest, SAME]), encoding='utf-8')
    environment = dict(
        os.environ, YOLO_CONFIG_DIR=str(tmp_path), YOLO_AUTOINSTALL='false', YOLO_OFFLINE='true',
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    done = subprocess.run(
        [sys.executable, 'page.py'], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_page_with_code_is_run():
    found = {page for page in PAGES if blocks(page, 'python')}
    assert found == {
        'README.md', 'docs/training.md', 'docs/layer-and-operator.md', 'docs/sequences.md', 'docs/weights.md',
        'docs/deployment.md', 'docs/kernel-size.md', 'docs/pictures.md', 'docs/replace.md',
        'docs/tools.md', 'docs/yolo.md'}


@pytest.mark.parametrize('page', PAGES)
def test_blocks_that_need_packages_of_no_extra_are_python(page):
    for block in blocks(page, 'py'):
        compile(block, page, 'exec')


def commands(page):
    """The words of every command of a page's shell lines, a substituted one (`$(…)`) before the one that holds it."""
    for line in '\n'.join(blocks(page)).replace('\\\n', ' ').splitlines():
        for inner in re.findall(r'\$\(([^)]*)\)', line):
            yield shlex.split(inner)
        for part in re.sub(r'\$\([^)]*\)', 'SUBSTITUTED', line).split('&&'):
            words = shlex.split(part, comments=True)
            if words:
                yield [words[0].removeprefix('.venv/bin/'), *words[1:]]


def unwrap(words):
    """(program, arguments) of each program in a command: `torchrun … -m timm_smpconv run train.py …` is three."""
    if words[0] == 'torchrun':
        end = words.index('-m')
        yield 'torchrun', words[:end]
        words = ['timm-smpconv', *words[end + 2:]]
    if words[0] == 'python' and words[1] == '-m':
        words = words[2:]
    elif words[0] == 'python':
        words = words[1:]
    if words[:2] == ['timm-smpconv', 'run']:
        script, *rest = words[2:]
        end = rest.index('timm_smpconv') if 'timm_smpconv' in rest else len(rest)  # what bulk_runner.py starts
        yield script, rest[:end]
        if rest[end:]:
            yield from unwrap(['timm-smpconv', *rest[end + 1:]])
    else:
        yield words[0], words[1:]


PROGRAMS = [
    (page, program, arguments)
    for page in PAGES for words in commands(page) for program, arguments in unwrap(words)]
OURS = ('timm-smpconv', 'torchrun', 'weights/', 'benchmarks.')
FOREIGN = ('build', 'export', 'git', 'mypy', 'pip', 'pre-commit', 'pytest', 'python3', 'ruff', 'source', 'twine')


def lacking(arguments, text):
    """The options among arguments that a program's --help does not name."""
    options = [word.partition('=')[0] for word in arguments if re.match(r'--?[a-z]', word)]
    return [option for option in options if not re.search(rf'(?<![\w-]){re.escape(option)}(?![\w-])', text)]


def help_of(program, arguments):
    """The --help of a program of ours, or of torchrun."""
    if program == 'torchrun':
        return get_args_parser().format_help()
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output), contextlib.suppress(SystemExit),
        mock.patch.object(sys, 'argv', [program, '--help']), mock.patch.object(sys, 'path', [str(ROOT), *sys.path]),
    ):
        if program == 'timm-smpconv':
            depth = 2 if arguments[:1] == ['picture'] else 1  # of subcommands
            main([*(word for word in arguments[:depth] if not word.startswith('-')), '--help'])
        elif program.startswith('weights/'):
            {'weights/convert.py': convert, 'weights/publish.py': publish}[program].main(['--help'])
        else:
            runpy.run_module(program, run_name='__main__')
    return output.getvalue()


def test_commands_and_their_options_exist():
    extras = (ROOT / 'pyproject.toml').read_text(encoding='utf-8').split('[project.optional-dependencies]')[1]
    extras = set(re.findall(r'^(\w+) = \[', extras.split('\n[')[0], re.MULTILINE))
    checked = set()
    for page, program, arguments in PROGRAMS:
        if arguments[:1] == ['sequence']:
            continue  # test_commands_for_sequences_are_understood
        if program.startswith(OURS):
            text = help_of(program, arguments)
            assert not lacking(arguments, text), (page, program)
            checked.add(program)
            if program.startswith('benchmarks.'):
                assert not arguments or arguments[0].startswith('-') or arguments[0] in text, (page, arguments)
            if program == 'timm-smpconv' and arguments[:1] == ['recipe'] and arguments[1:]:
                assert arguments[1] in (*recipe_names(), 'NAME'), page
        else:
            assert program in FOREIGN or program.endswith('.py') or (ROOT / program).exists(), (page, program)
        for extra in re.findall(r'\.\[([\w,]+)\]', ' '.join(arguments)):
            assert set(extra.split(',')) <= extras, page
    assert {'timm-smpconv', 'torchrun', 'weights/convert.py', 'weights/publish.py'} <= checked


@pytest.mark.slow
def test_options_of_timms_scripts_exist():
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("timm's scripts: TIMM_SCRIPTS does not name their folder")
    texts = {}
    for page, program, arguments in PROGRAMS:
        if not program.endswith('.py') or program.startswith('weights/'):
            continue
        if program not in texts:
            texts[program] = subprocess.run(
                [sys.executable, '-m', 'timm_smpconv', 'run', program, '--help'], check=True, capture_output=True,
                text=True).stdout
        missing = lacking(arguments, texts[program])
        assert missing == (['-c'] if program == 'train.py' else []), (page, program)  # its --help omits -c
    assert {'train.py', 'validate.py', 'benchmark.py', 'bulk_runner.py'} <= texts.keys()


def test_readme_fits_on_two_screens_and_has_one_test_command():
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r'^python3 -m venv .*pytest.*$', README, re.MULTILINE)) == 1  # .ci/run runs it


def test_commit_hooks_run_what_ci_runs():
    (repository,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))['repos']
    entries = [hook['entry'] for hook in repository['hooks']]
    sessions = (ROOT / 'noxfile.py').read_text(encoding='utf-8')  # which .ci/run calls
    calls = [f'run(session, {", ".join(map(repr, entry.split()))})' for entry in entries]
    assert entries == ['ruff check', 'mypy'] and all(call in sessions for call in calls)


def test_the_map_in_contributing_names_every_room():
    section = PAGES['CONTRIBUTING.md'].split('## Where')[1].split('\n## ')[0]
    rows = re.findall(r'^\| `([^`|]*)` \| (.*) \|$', section, re.MULTILINE)
    assert {ROOT / room for room, _ in rows} == {path.parent for path in (ROOT / 'timm_smpconv').glob('*/__init__.py')}
    named = [ROOT / room / file for room, row in rows for file in re.findall(r'`([^`]+(?:\.py|\.yaml|/))`', row)]
    assert len(named) > 20 and not [path for path in named if not path.exists()]


def anchors(text):
    """GitHub's names of the headings of a page."""
    titles = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


TABLES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('benchmarks/**/*.md'))


@pytest.mark.parametrize('page', [*PAGES, 'CHANGELOG.md', *TABLES])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)]+)\)', text):
        if target.startswith('https://'):
            continue
        path, _, anchor = target.partition('#')
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding='utf-8')), target


def test_table_names_every_model_and_its_parameters():
    rows = dict(re.findall(r'\| `(smpconv_\w+)` \| [\d.]+ \| ([\d,]+) \|', README))
    assert rows.keys() == set(MODELS)
    for name, parameters in rows.items():
        model = timm.create_model(name, device='meta')
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(',', ''))


MODULES = [
    info.name for info in pkgutil.walk_packages(timm_smpconv.__path__, 'timm_smpconv.')
    if 'triton' not in info.name and not info.name.endswith('__main__')]  # Triton need not be installed
PUBLIC = sorted(
    name for name, value in vars(timm_smpconv).items()
    if not name.startswith('_') and (inspect.isclass(value) or inspect.isfunction(value))
    and not (inspect.isclass(value) and issubclass(value, Exception)))


@pytest.mark.parametrize('module', MODULES)
def test_examples_of_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_have_an_example(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(timm_smpconv, name), name)
    assert any(test.examples for test in tests)
