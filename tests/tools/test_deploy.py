"""`timm-smpconv deploy`: right files are found right, and wrong ones wrong.

The oracles are the network itself, in this process, on images as timm prepares them, and the labels of these, which it
was trained to tell.
"""
import ctypes
import functools
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import nncf
import numpy as np
import onnx
import openvino
import pytest
import torch
from conftest import TOLERANCE, difference, small_model
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from timm.utils import reparameterize_model

import timm_smpconv
from timm_smpconv.__main__ import main
from timm_smpconv.ops.dispatch import cpu
from timm_smpconv.tools.deploy import verify
from timm_smpconv.tools.deploy.engines import ENGINES, engine as of_engines

SIZE, STEPS = 32, 100
CLASSES = ['ant', 'bee', 'cat']
OPTIONS = ['--image-size', str(SIZE), '--batch', '1', '4', '--max-drop', '10']


def blobs(label, rng):
    """An image of random blobs, brighter in one of its three colours."""
    pixels = rng.integers(0, 128, (rng.integers(3, 9), 6, 3))
    pixels[..., label] += 127
    return Image.fromarray(pixels.astype('uint8')).resize((96, 80))


@functools.cache
def trained():
    """The weights of a network that tells the blobs apart, which rounding does not make worse."""
    rng, model = np.random.default_rng(1), untrained()
    optimizer = timm_smpconv.SMPAdamW(model.train().parameters(), lr=5e-3)
    labels = torch.arange(60) % len(CLASSES)
    images = torch.cat([prepared(blobs(label, rng), model) for label in labels])
    for step in range(STEPS):
        part = (torch.arange(15) + 15 * step) % len(labels)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    return model.state_dict()


def untrained():
    return small_model(shake=False, num_classes=len(CLASSES), depths=(1, 1, 1, 1))


def network():
    """What `deploy test_deploy:network` deploys."""
    model = untrained()
    model.load_state_dict(trained())
    return model


def prepared(image, model):
    """An image as timm prepares it, (1, 3, H, W)."""
    transform = create_transform(**resolve_data_config({'input_size': (3, SIZE, SIZE)}, model=model))
    return transform(image)[None]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for part, (label, name), i in itertools.product(('train', 'validation'), enumerate(CLASSES), range(10)):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        blobs(label, rng).save(folder / part / name / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def deployed(images, tmp_path_factory):
    """A folder as the command writes it; tests copy it."""
    out = tmp_path_factory.mktemp('deployed') / 'out'
    assert main([
        'deploy', 'test_deploy:network', '--out', str(out), '--data', str(images), *OPTIONS, '--preprocess', 'in-graph',
        '--engines', 'torch-prepacked', 'torch-export', 'onnxruntime', 'openvino', 'coreml', '--precisions', 'float32',
        'int8']) == 0
    return out


def rows(folder):
    return {(row['engine'], row['precision']): row for row in json.loads((folder / 'report.json').read_text())['rows']}


def test_right_files(deployed, images):
    found = rows(deployed)
    assert found['', 'float32']['top1'] > 90  # it learned to tell them
    assert found['coreml', 'float32']['why'] == 'it runs on macOS only' or sys.platform == 'darwin'
    files = {path.name for path in deployed.iterdir()}
    assert files == {
        'README.md', 'check.safetensors', 'report.json', 'model.safetensors', 'model.pt2', 'model.onnx',
        'model_int8.onnx', 'model.xml', 'model.bin', 'model_int8.xml', 'model_int8.bin'}
    for (engine, precision), row in found.items():
        assert not row['failed'], row
        if engine and not row['why']:
            assert row['off'] < (1e-5 if precision == 'float32' else 0.5) and row['ms'].keys() == {'1', '4'}, row
    weights = sum(p.numel() for p in reparameterize_model(network()).parameters())
    assert weights < (deployed / 'model_int8.bin').stat().st_size < 2 * weights
    assert 4 * weights <= (deployed / 'model.bin').stat().st_size


def test_files_explain_themselves(deployed):
    report = json.loads((deployed / 'report.json').read_text())['network']
    texts = {p.key: p.value for p in onnx.load(deployed / 'model_int8.onnx').metadata_props}
    model = openvino.Core().read_model(deployed / 'model_int8.xml')
    for found in texts, {key: model.get_rt_info(['timm_smpconv', key]).astype(str) for key in texts}:
        assert json.loads(found['classes']) == CLASSES and json.loads(found['input_size']) == [3, SIZE, SIZE]
        assert found['interpolation'] == 'bicubic' and json.loads(found['crop_pct']) == 0.875
        assert json.loads(found['mean']) == pytest.approx([0.485, 0.456, 0.406]) and len(found['sha256']) == 64
        assert json.loads(found['versions'])['torch'] and found['model'] == report['model']
    assert report['sha256'] == texts['sha256']


def test_the_lines_of_the_readme_run(deployed, images, monkeypatch):
    monkeypatch.chdir(deployed)
    shutil.copy(next(images.glob('validation/*/*.png')), 'photo.png')
    first, *blocks = re.findall(r'^```python\n(.*?)^```$', Path('README.md').read_text(), re.DOTALL | re.MULTILINE)
    model = network()
    expected = model(prepared(Image.open('photo.png'), model))
    for block in blocks:
        names = {}
        exec(first, names)
        exec(block, names)
        assert difference(names['output'], expected) < (0.3 if 'int8' in block else TOLERANCE[torch.float32]), block
    assert len(blocks) == 6
    Path('photo.png').unlink()


def swap_a_weight(folder):
    model = onnx.load(folder / 'model.onnx')
    weights = [w for w in model.graph.initializer if len(w.dims) == 4]
    weight = max(weights, key=lambda w: w.dims[0])
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), weight.name))
    onnx.save(model, folder / 'model.onnx')


def forget_to_merge(folder):
    class Pixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, image):
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
            return self.network((image / 255 - mean) / std)

    torch.onnx.export(
        Pixels().eval(), (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),), folder / 'model.onnx', dynamo=True,
        input_names=['image'], dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=9)},), verbose=False)


def fix_the_batch(folder):
    model = onnx.load(folder / 'model.onnx')
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, folder / 'model.onnx')


def calibrate_on_noise(folder):
    """On pixels that are nearly black, so that ranges are far too small."""
    noise = [np.random.default_rng(i).integers(0, 3, (1, 3, SIZE, SIZE)).astype('uint8') for i in range(8)]
    model = nncf.quantize(openvino.convert_model(folder / 'model.onnx'), nncf.Dataset(noise), subset_size=8)
    openvino.save_model(model, folder / 'model_int8.xml')


@pytest.mark.parametrize('damage,file,said', [
    (None, None, None),
    (swap_a_weight, 'model.onnx', r'outputs differ by .* of the largest, more than 0\.0001'),
    pytest.param(forget_to_merge, 'model.onnx', r'not merged: \d+ convolutions, \d+ in', marks=pytest.mark.slow),
    (fix_the_batch, 'model.onnx', 'batch 4: InvalidArgument'),
    pytest.param(calibrate_on_noise, 'model_int8.xml', '.*top-1: .* percent lost, more than', marks=pytest.mark.slow),
])
def test_broken_files(damage, file, said, deployed, tmp_path, capsys):
    shutil.copytree(deployed, tmp_path, dirs_exist_ok=True)
    report = json.loads((tmp_path / 'report.json').read_text())
    report['rows'] = [row for row in report['rows'] if row['engine'] in ('onnxruntime', 'openvino')]  # for speed
    (tmp_path / 'report.json').write_text(json.dumps(report))
    if damage:
        damage(tmp_path)
    assert main(['deploy', '--check', str(tmp_path), '--json', str(tmp_path / 'check.json')]) == int(damage is not None)
    table = capsys.readouterr().out
    checked = json.loads((tmp_path / 'check.json').read_text())['rows']
    assert {row['file'] for row in checked if row['failed']} == ({file} if damage else set())
    assert all(row['ms'].keys() == {'1', '4'} for row in checked if not row['failed'])  # the others went on
    assert all((tmp_path / row['file']).exists() for row in checked)  # they may be right on another machine
    if damage:
        assert re.search(rf'^{file} .* wrong: {said}', table, re.MULTILINE), table
        assert f'batch 1: {file} ' not in table


def mask():
    """A segmentation network of one class."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1))


def flat():
    """A network that returns one number for an image, without a dimension for it."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 1, 224), torch.nn.Flatten(0))


def few(out, *arguments, engines=('torch-export', 'onnxruntime')):
    """Deploy a tiny network on no image of the user's."""
    return main([
        'deploy', 'test_deploy:mask', '--task', 'segmentation', '--out', str(out), '--image-size', '32', '--batch', '2',
        '--precisions', 'float32', '--engines', *engines, *arguments])


def write_another(source, precision, file):
    model = torch.nn.Conv2d(3, 1, 1)
    torch.export.save(torch.export.export(
        model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim('batch', max=9)},)), file)


def test_a_wrong_file_of_the_command_itself(tmp_path, monkeypatch, capsys):
    (tmp_path / 'model.pt2').write_text('an earlier one')
    monkeypatch.setitem(ENGINES, 'torch-export', ENGINES['torch-export']._replace(write=write_another))
    assert few(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        'README.md', 'check.safetensors', 'report.json', 'model.onnx', 'model.pt2.wrong'}
    assert 'model.pt2.wrong' in capsys.readouterr().out and rows(tmp_path)['onnxruntime', 'float32']['ms']
    monkeypatch.undo()
    assert few(tmp_path, engines=['torch-export']) == 0
    assert (tmp_path / 'model.pt2').exists() and not (tmp_path / 'model.pt2.wrong').exists()


def test_a_file_of_two_rows_is_wrong_in_both(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, 'wrong', lambda found, precision, *_: 'off' if precision == 'float32' else None)
    assert few(tmp_path, '--precisions', 'float32', 'bfloat16', engines=['openvino']) == 1
    assert (tmp_path / 'model.xml.wrong').exists() and not (tmp_path / 'model.xml').exists()
    assert all(row['why'] for (engine, _), row in rows(tmp_path).items() if engine)


def test_images_that_are_of_no_use(images, tmp_path, capsys):
    shutil.copytree(images / 'train', tmp_path / 'images' / 'train')
    assert few(tmp_path / 'out', '--data', str(tmp_path / 'images')) == 2
    assert '--data must have folders train and validation, or neither, got train alone' in capsys.readouterr().err
    (tmp_path / 'images' / 'train' / 'bee' / '1.png').write_bytes(b'damaged')
    assert few(tmp_path / 'out', '--data', str(tmp_path / 'images' / 'train')) == 2
    assert 'images must be files that Pillow reads, got bee/1.png: ' in capsys.readouterr().err


def test_outputs_that_are_all_zero():
    found = verify.compare((torch.zeros(2, 3),), (torch.zeros(2, 3),), None, 'classification')
    assert found.off == 0 and found.same == 100


@pytest.mark.parametrize('error,status', [(KeyboardInterrupt(), 130), (OSError(28, 'No space left on device'), 1)])
def test_an_end_before_the_end(error, status, tmp_path, monkeypatch):
    def write(source, precision, file):
        file.write_text('half')
        raise error

    monkeypatch.setitem(ENGINES, 'onnxruntime', ENGINES['onnxruntime']._replace(write=write))
    assert few(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ['model.pt2']


def test_a_library_that_does_not_load_is_a_row(tmp_path, monkeypatch):
    engine = ENGINES['onnxruntime']._replace(write=lambda *_: ctypes.CDLL('/nowhere.so'))
    monkeypatch.setitem(ENGINES, 'onnxruntime', engine)
    assert few(tmp_path) == 1
    assert rows(tmp_path)['onnxruntime', 'float32']['why'].startswith('not written: OSError: /nowhere.so')
    assert rows(tmp_path)['torch-export', 'float32']['ms']
    (tmp_path / 'check.safetensors').write_bytes(b'half')
    assert main(['deploy', '--check', str(tmp_path)]) == 1


def test_what_cannot_run_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(of_engines, 'find_spec', lambda name: None)
    monkeypatch.setattr(cpu, 'HERE', cpu.CPU('AVX2', frozenset([torch.float32])))
    precisions = ['--precisions', 'float32', 'bfloat16']
    with torch._inductor.config.patch({'cpp.cxx': (None, 'no-compiler')}):  # which monkeypatch cannot undo
        assert few(tmp_path, *precisions, engines=['torch', 'onnxruntime', 'ncnn']) == 0
    found = {key: row['why'] for key, row in rows(tmp_path).items()}
    assert found['torch', 'float32'] == '' and found['torch', 'bfloat16'] == 'this CPU has no bfloat16'
    assert found['torch-prepacked', 'float32'] == 'no convolution of this package'
    assert found['torch-compiled', 'float32'] == 'no C++ compiler: no-compiler'
    assert found['onnxruntime', 'float32'] == 'not installed: onnx, onnxscript, onnxruntime'
    assert found['ncnn', 'float32'] == 'not installed: ncnn, pnnx'
    table = capsys.readouterr().out
    assert all(why in table for why in found.values())
    assert table.count('this CPU has no bfloat16') == 1  # of five ways of PyTorch


@pytest.mark.parametrize('arguments,said', [
    (['deploy'], 'arguments must be MODEL --out DIR or --check DIR'),
    (['deploy', 'test_convnext', '--out', 'x', '--precisions', 'int8'], '--precisions int8 must go with --data'),
    (['deploy', 'test_convnext', '--out', 'x', '--std', '1'], '--std must be a number for each of 3 channels, got [1.'),
    (['deploy', 'test_convnext', '--out', 'x', '--data', '.'], '--data must be a folder with images'),
    (['deploy', 'nowhere:f', '--out', 'x'], 'MODEL must be a model of timm or module:function, got nowhere:f: No mod'),
    (['deploy', 'smpconv_tcn_ct', '--out', 'x', '--data', '.'], '--data must go with a network of images'),
    (['deploy', 'smpconv_tcn_ct', '--out', 'x', '--mean', '0'], 'options of images must go with a network of images'),
    (['deploy', 'test_deploy:flat', '--out', 'x'], 'the network must return tensors (B, classes) or maps, got [(26,)]'),
    (['deploy', '--check', 'x', '--max-drop', '1'], '--check must go with --batch, --threads and --json alone, got ma'),
])
def test_wrong_arguments(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize('arguments', [
    ['test_deploy:mask', '--task', 'segmentation', '--image-size', '32'],
    *(pytest.param(arguments, marks=pytest.mark.slow) for arguments in (
        ['test_convnext', '--features', '--image-size', '64'], ['smpconv_mobile31', '--features', '--image-size', '64'],
        ['smpconv_tcn_ct'])),
], ids=str)
def test_other_tasks(arguments, images, tmp_path):
    own = 'smpconv' not in arguments[0]  # whose initial weights make features that NNCF takes as zero
    data = ['--data', str(images), '--max-drop', '5'] if own else []
    assert main([
        'deploy', *arguments, '--out', str(tmp_path), *data, '--batch', '1', '3', '--engines', 'torch-export',
        'onnxruntime', 'openvino', '--precisions', 'float32', *(['int8'] if own else [])]) == 0
    for (engine, precision), row in rows(tmp_path).items():
        if engine and not row['why']:
            assert row['off'] < (1e-4 if precision == 'float32' else 0.5)
            assert (row['same'] is None) == ('--features' in arguments)
    assert main(['deploy', '--check', str(tmp_path)]) == 0
    names = {output.name for output in onnx.load(tmp_path / 'model.onnx').graph.output}
    assert ('features_3' in names) == ('--features' in arguments)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_engine_of_pytorch(tmp_path):
    """Compiled code needs a C++ compiler; where there is no bfloat16, its rows say so."""
    assert few(tmp_path, '--precisions', 'float32', 'bfloat16', engines=['torch']) == 0
    assert {row['why'] for row in rows(tmp_path).values()} <= {
        '', 'no convolution of this package', 'this CPU has no bfloat16'}


@pytest.mark.slow
def test_accuracy_control(images, tmp_path, monkeypatch):
    """NNCF's first result is that of noise; what it gives in place of it loses at most --max-drop."""
    quantize, calls = nncf.quantize, []

    def on_noise(model, dataset, **kwargs):
        calls.append(model)
        noise = [np.zeros((1, 3, SIZE, SIZE), 'float32')]
        return quantize(model, nncf.Dataset(noise), **kwargs)

    monkeypatch.setattr(nncf, 'quantize', on_noise)
    assert main([
        'deploy', 'test_deploy:network', '--out', str(tmp_path), '--data', str(images), *OPTIONS, '--engines',
        'openvino', '--precisions', 'int8']) == 0
    assert calls and rows(tmp_path)['openvino', 'int8']['drop'] <= 10


def test_a_folder_without_labels_or_parts(images, tmp_path):
    for i, file in enumerate(sorted(images.glob('*/*/*.png'))[:9]):
        shutil.copy(file, tmp_path / f'{i}.png')
    assert main([
        'deploy', 'test_deploy:mask', '--task', 'segmentation', '--out', str(tmp_path / 'out'), '--data', str(tmp_path),
        '--image-size', '32', '--engines', 'torch-export', '--precisions', 'float32', '--batch', '1']) == 0
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert report['images'] == 4 and report['rows'][1]['top1'] is None and report['rows'][1]['same'] == 100
