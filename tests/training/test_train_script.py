"""timm's own scripts, unmodified, on real digits, each run in a new process.

timm's wheel does not contain them: set TIMM_SCRIPTS to the folder that holds them, or these tests are skipped.
"""
import csv
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import convert
import pytest
import timm
import torch
import yaml
from conftest import difference
from data_folders import write_cifar10
from PIL import Image
from timm.data import create_transform
from timm.models import load_checkpoint
from timm.utils import reparameterize_model

from timm_smpconv._errors import DataError
from timm_smpconv.tools.demo.digits import write_digits
from timm_smpconv.tools.timm_scripts import find_script
from timm_smpconv.training.recipes import recipe_names, recipe_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group('scripts')]

SIZE = 32
PLUGINS = Path(__file__).parents[1] / 'plugins'
MODEL = ['--model', 'smpconv_mobile31', '--num-classes', '10', '--img-size', str(SIZE)]
ON_CPU = ['--device', 'cpu', '--workers', '0']
TRAIN = [
    '--num-classes', '10', '--img-size', str(SIZE), '--crop-pct', '1.0', *ON_CPU, '--no-prefetcher',
    '--epochs', '3', '--warmup-epochs', '1', '--batch-size', '20', '--grad-accum-steps', '1', '--lr', '2e-3',
    '--model-ema-decay', '0.5', '--no-aug', '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--log-interval', '100']

LONG = [
    '--epochs', '3', '--cooldown-epochs', '9', '--checkpoint-hist', '4',
    '--device-modules', 'timm_smpconv', 'fixed_order']


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
    environ = dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp('cache')))
    try:
        return find_script('train.py', environ, 'file:///nowhere').parent
    except DataError:
        if os.environ.get('TIMM_SCRIPTS'):  # names the wrong folder
            raise
        pytest.skip("timm's scripts were not found: set TIMM_SCRIPTS to the folder that holds train.py")


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Sixteen images of each digit to train on, six to validate."""
    folder = tmp_path_factory.mktemp('data') / 'digits'
    list(write_digits(folder))
    for split, count in (('train', 16), ('validation', 6)):
        for label in (folder / split).iterdir():
            for path in sorted(label.iterdir())[count:]:
                path.unlink()
    return folder


@pytest.fixture(scope='module')
def trained(scripts, digits, tmp_path_factory):
    """An uninterrupted run, long enough for the running statistics to follow; it keeps its four best checkpoints."""
    return train(scripts, digits, tmp_path_factory.mktemp('trained'), *LONG)


def run(scripts, name, *args, launcher=('-m', 'timm_smpconv', 'run'), **environ):
    path = os.pathsep.join([str(PLUGINS), *filter(None, [os.environ.get('PYTHONPATH')])])
    environ = dict(os.environ, TIMM_SCRIPTS=str(scripts), PYTHONPATH=path, **environ)
    result = subprocess.run(
        [sys.executable, *launcher, name, *map(str, args)], env=environ, capture_output=True, text=True)
    assert result.returncode == 0, f'{result.stdout[-2000:]}\n{result.stderr[-4000:]}'
    return result.stdout


def train(scripts, digits, out, *args, recipe=None, **kwargs):
    """Run train.py; returns the folder of its summary and checkpoints."""
    recipe = recipe or recipe_path('smpconv_mobile31')
    run(scripts, 'train.py', '-c', recipe, '--data-dir', digits, *TRAIN, '--output', out, '--experiment', 'run',
        *args, **kwargs)
    return out / 'run'


def summary(folder):
    with Path(folder / 'summary.csv').open(newline='') as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def state_dict(path, key='state_dict'):
    return torch.load(path, weights_only=False)[key]  # written by train.py here; it holds an argparse.Namespace


def results(stdout):
    return json.loads(stdout.split('--result\n')[1])


def load(path, use_ema=True):
    """The model of a checkpoint, as timm's scripts load it."""
    model = timm.create_model('smpconv_mobile31', num_classes=10)
    load_checkpoint(model, str(path), use_ema=use_ema, weights_only=False)
    return model.eval()


def images(folder):
    transform = create_transform((3, SIZE, SIZE), interpolation='bicubic', crop_pct=1.0)
    paths = sorted(folder.rglob('*.png'))
    return paths, torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])


def test_our_recipes_hold_options_of_train_py_only(scripts):
    options = {action.dest for action in runpy.run_path(str(scripts / 'train.py'))['parser']._actions}
    for name in recipe_names():
        if name.startswith('smpconv_tcn_'):  # for Lightning
            continue
        # train.py ignores an option that it does not have.
        assert yaml.safe_load(recipe_path(name).read_text(encoding='utf-8')).keys() <= options


def checkpoints(folder):
    """Epoch -> file."""
    return {int(path.stem.split('-')[1].split('.')[0]): path for path in folder.glob('checkpoint-*.pth.tar')}


def test_trains_and_resumes_with_the_same_losses(scripts, digits, trained, tmp_path):
    losses = [row['train_loss'] for row in summary(trained)]
    assert len(losses) == 13 and losses[3] < 0.6 * losses[0]
    stopped = min(checkpoints(trained))
    resumed = train(scripts, digits, tmp_path, *LONG, '--resume', checkpoints(trained)[stopped])
    assert stopped < 12 and summary(resumed) == summary(trained)[stopped + 1:]
    for key in ('state_dict', 'state_dict_ema'):
        first, second = (state_dict(folder / 'last.pth.tar', key) for folder in (trained, resumed))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def one_and_two(scripts, digits, trained, tmp_path):
    """Runs train.py in one process, and in two with half the batch each, from the same weights."""
    recipe = tmp_path / 'recipe.yaml'
    settings = yaml.safe_load(recipe_path('smpconv_mobile31').read_text(encoding='utf-8'))
    recipe.write_text(yaml.safe_dump(dict(settings, sync_bn=False)), encoding='utf-8')  # needs GPUs
    two_processes = (
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m', 'timm_smpconv', 'run')

    def one_and_two(*plugins):
        folders = []
        for name, batch, more in (('one', '20', {}), ('two', '10', dict(launcher=two_processes))):
            folders.append(tmp_path / name)
            folders[-1].mkdir()
            train(
                scripts, digits, folders[-1], '--initial-checkpoint', trained / 'last.pth.tar', '--epochs', '1',
                '--lr', '5e-5', '--batch-size', batch, '--device-modules', 'timm_smpconv', 'fixed_order', 'cpu_ddp',
                *plugins, recipe=recipe, RANK_FILES=str(folders[-1]), **more)
        return folders
    return one_and_two


def test_two_processes_and_one_with_twice_the_batch(one_and_two, trained):
    """In float64, where rounding cannot move an input of a ReLU across zero: 16 updates and the evaluation."""
    one, two = one_and_two('float64')
    for a, b in zip(summary(one / 'run'), summary(two / 'run'), strict=True):
        assert math.isclose(a['train_loss'], b['train_loss'], rel_tol=1e-6)  # train.py averages over ranks in float32
        assert math.isclose(a['eval_loss'], b['eval_loss'], rel_tol=1e-12)
    ranks = [torch.load(two / f'rank{rank}.pt') for rank in (0, 1)]
    start = state_dict(trained / 'last.pth.tar', 'state_dict_ema')  # what train.py starts from
    for key in ('state_dict', 'state_dict_ema'):
        ours, theirs = (state_dict(folder / 'run' / 'last.pth.tar', key) for folder in (one, two))
        classifier = ours['head.fc.weight']
        assert classifier.dtype == torch.float64 and (classifier != start['head.fc.weight']).any()
        for name, value in ours.items():
            step, expected = theirs[name].double() - start[name], value.double() - start[name]
            assert (step - expected).norm() <= 1e-9 * expected.norm(), name
            assert key == 'state_dict_ema' or all(torch.equal(rank[name], theirs[name]) for rank in ranks), name


def test_one_gradient_of_two_processes_and_of_one_in_float32(one_and_two):
    one, two = (
        [torch.load(folder / f'gradients{rank}.pt') for rank in range(count)]
        for folder, count in zip(one_and_two('first_gradient'), (1, 2)))
    assert all(map(torch.equal, two[0], two[1]))
    for actual, expected in zip(two[0], one[0], strict=True):
        # One input of a ReLU that changes sign by rounding moves it by 1e-3.
        assert (actual - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize('options', [
    ['--amp', '--amp-dtype', 'bfloat16'],
    ['--torchcompile', 'aot_eager'],  # inductor takes 150 s
    ['--grad-checkpointing'],
    ['--channels-last'],
    ['--grad-accum-steps', '2'],
    ['--layer-decay', '0.7'],
    ['--initial-checkpoint', 'TRAINED', '--lr', '1e-4'],
    ['--pretrained', '--pretrained-path', 'TRAINED', '--lr', '1e-4'],
    ['--opt', 'adamw'],
], ids=lambda options: options[0][2:])
def test_options_train(scripts, digits, trained, tmp_path, options):
    checkpoint = trained / 'last.pth.tar'
    options = [checkpoint if option == 'TRAINED' else option for option in options]
    losses = [row['train_loss'] for row in summary(train(scripts, digits, tmp_path, *options))]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert losses[0] < 1.5 if checkpoint in options else losses[-1] < 0.9 * losses[0]


def test_the_cifar10_recipe_trains(scripts, tmp_path):
    write_cifar10(tmp_path / 'data', train=60, test=10)
    run(scripts, 'train.py', '-c', recipe_path('smpconv_resnet_cifar10'), '--data-dir', tmp_path / 'data', *ON_CPU,
        '--no-prefetcher', '--epochs', '1', '--warmup-epochs', '1', '--batch-size', '20', '--output', tmp_path,
        '--experiment', 'run', '--device-modules', 'timm_smpconv.training.recipes.cifar10', 'small_cifar10',
        SMALL_CIFAR10=str(tmp_path / 'data'))
    losses = [row['train_loss'] for row in summary(tmp_path / 'run')]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_its_checkpoint_is_converted(digits, trained, tmp_path):
    out = tmp_path / 'converted'
    command = [str(trained / 'last.pth.tar'), '--model', 'smpconv_mobile31', '--tag', 'digits', '--out', str(out)]
    assert convert.main(command) == 0
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert model.pretrained_cfg['crop_pct'] == 1 and tuple(model.pretrained_cfg['input_size']) == (3, SIZE, SIZE)
    _, batch = images(digits / 'validation')
    with torch.inference_mode():
        assert torch.equal(model(batch), load(trained / 'last.pth.tar')(batch))


def test_validate(scripts, digits, trained):
    args = [*MODEL, '--data-dir', digits, '--crop-pct', '1.0', *ON_CPU, '--no-prefetcher', '--checkpoint']
    expected = summary(trained)[-1]
    merged, unmerged = (
        results(run(scripts, 'validate.py', *args, trained / 'last.pth.tar', '--use-ema', *more))
        for more in (['--reparam'], []))
    assert merged['top1'] == unmerged['top1'] == pytest.approx(expected['eval_top1'], abs=1e-3)
    assert merged['top1'] > 30 and merged['param_count'] != unmerged['param_count']
    last = results(run(scripts, 'validate.py', *args, trained / 'last.pth.tar', '--reparam'))
    paths, batch = images(digits / 'validation')
    with torch.inference_mode():
        predicted = load(trained / 'last.pth.tar', use_ema=False)(batch).argmax(1)
    right = sum(int(path.parent.name) == label for path, label in zip(paths, predicted.tolist()))
    assert last['top1'] == pytest.approx(100 * right / len(paths), abs=1e-3)


def test_benchmark(scripts):
    found = results(run(
        scripts, 'benchmark.py', *MODEL, '--device', 'cpu', '-b', '2', '--num-bench-iter', '10', '--num-warm-iter', '1',
        '--bench', 'inference', '--reparam'))
    merged = reparameterize_model(timm.create_model('smpconv_mobile31', num_classes=10).eval())
    assert found['param_count'] == round(sum(p.numel() for p in merged.parameters()) / 1e6, 2)
    assert found['infer_samples_per_sec'] > 0


def test_inference(scripts, digits, trained, tmp_path):
    pytest.importorskip('pandas', reason="timm's inference.py needs pandas")
    run(scripts, 'inference.py', *MODEL, '--data-dir', digits / 'validation', '--crop-pct', '1.0', *ON_CPU,
        '--checkpoint', trained / 'last.pth.tar', '--results-dir', tmp_path, '--results-format', 'csv')
    _, batch = images(digits / 'validation')
    with torch.inference_mode():
        probabilities = load(trained / 'last.pth.tar')(batch).softmax(1).amax(1).tolist()
    (file,) = tmp_path.glob('*.csv')
    with Path(file).open(newline='') as rows:
        found = sorted(float(row['prob']) for row in csv.DictReader(rows))
    assert found == pytest.approx(sorted(probabilities), rel=1e-4)


def test_onnx_export(scripts, trained, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    file, checkpoint = tmp_path / 'model.onnx', trained / 'last.pth.tar'
    run(scripts, 'onnx_export.py', file, *MODEL, '--checkpoint', checkpoint, '--reparam', '--dynamo', '--opset', '18')
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    image = torch.randn(1, 3, SIZE, SIZE)
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.inference_mode():
        assert difference(torch.from_numpy(logits), load(checkpoint)(image)) < 1e-4


def test_avg_checkpoints(scripts, trained, tmp_path):
    out = tmp_path / 'average.pth'
    run(
        scripts, 'avg_checkpoints.py', '--input', trained, '--filter', 'checkpoint-*.pth.tar',
        '--output', out, '-n', '4')
    states = [state_dict(path, 'state_dict_ema') for path in checkpoints(trained).values()]
    for key, value in load(out).state_dict().items():
        if value.is_floating_point():
            expected = torch.stack([state[key].double() for state in states]).mean(0)
            assert len(states) == 4 and difference(value, expected) < 1e-6, key
