"""The command line and the demo, as a user starts them."""
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_smpconv.__main__ import main
from timm_smpconv.digits import digits
from timm_smpconv.plot import draw_kernels

COMMAND = [sys.executable, '-m', 'timm_smpconv']


def test_demo_learns_merges_and_writes(tmp_path, capfd):
    assert main(['demo', '--out', str(tmp_path / 'out')]) == 0
    out, err = capfd.readouterr()
    files = ['kernels.png', 'merged.safetensors', 'model.safetensors']
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == files
    with Image.open(tmp_path / 'out' / 'kernels.png') as picture:
        assert picture.size[0] > 500 and len(picture.convert('L').getcolors()) > 50
    assert '396/396' in err and 'epoch 9/9' in err  # 1,437 images in whole batches of 32
    relative = float(out.split(' relative)')[0].split('(')[-1])
    assert relative < 1e-5
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(('unmerged', 'merged '))}
    assert rows['unmerged'][1] == rows['merged'][1]
    assert float(rows['merged'][1].rstrip('%')) >= 97  # accuracy on images it has not seen

    # The printed lines load what was written, and both are the same network.
    calls = [line.strip() for line in out.splitlines() if line.strip().startswith('timm.create_model(')]
    models = [eval(call, {'timm': timm}).eval() for call in calls]
    x = torch.randn(2, 1, 48, 48)
    assert torch.allclose(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)
    radii = torch.cat([v.flatten() for k, v in models[0].state_dict().items() if k.endswith('radius')])
    assert radii.min() >= 1e-3 and radii.max() <= 1


def test_the_seed_decides(tmp_path, monkeypatch):
    few = {training: tuple(part[:128] for part in digits(training)) for training in (True, False)}
    monkeypatch.setattr('timm_smpconv.demo.digits', few.get)

    def trained(seed, folder):
        torch.rand(seed + 1)  # where the generator stands before does not matter
        assert main(['demo', '--epochs', '1', '--seed', str(seed), '--out', str(tmp_path / folder)]) == 0
        return load_file(tmp_path / folder / 'model.safetensors')

    first, again, other = trained(3, 'first'), trained(3, 'again'), trained(4, 'other')
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert not torch.equal(first['stem.0.conv.weight'], other['stem.0.conv.weight'])


def test_an_interrupt_ends_cleanly(tmp_path):
    environment = dict(os.environ, PYTHONUNBUFFERED='1')
    process = subprocess.Popen(
        [*COMMAND, 'demo', '--out', str(tmp_path / 'out')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # in the background shells ignore it
    assert 'from scratch on 1,437 handwritten digits' in process.stdout.readline()
    process.stderr.read(1)  # of the progress of the training
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith('timm-smpconv demo: interrupted, nothing was written\n') and 'Traceback' not in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('arguments,message', [
    (['demo', '--epochs', '0'], "argument --epochs: must be an integer from 1 to 10000, got '0'"),
    (['demo', '--epochs', 'x'], "argument --epochs: must be an integer from 1 to 10000, got 'x'"),
    (['demo', '--seed', '-1'], "argument --seed: must be an integer from 0 to 4294967295, got '-1'"),
    (['demo', '--model', 'resnet50'], "argument --model: invalid choice: 'resnet50'"),
    ([], 'the following arguments are required: command'),
])
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('out', ['out', 'out/below'])
def test_an_output_that_is_a_file_is_refused_before_training(out, tmp_path, capsys):
    (tmp_path / 'out').touch()
    assert main(['demo', '--out', str(tmp_path / out)]) == 1
    captured = capsys.readouterr()
    assert '--out must be a folder that can be written' in captured.err and captured.out == ''
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_picture_shows_a_point_where_its_kernel_is(tmp_path):
    kernel = (torch.tensor([[[0.5, 0.5]]]), torch.tensor([[0.3]]), torch.ones(1, 1, 1), (9, 9))
    figure = draw_kernels([('before', [kernel])], ['one'])
    axis = figure.axes[0]
    image, points = axis.images[0], axis.collections[0]
    row, column = divmod(int(image.get_array().argmax()), 9)
    left, right, bottom, top = image.get_extent()
    x = left + (column + 0.5) * (right - left) / 9
    y = top - (row + 0.5) * (top - bottom) / 9
    assert (x, y) == pytest.approx(tuple(points.get_offsets()[0]))
