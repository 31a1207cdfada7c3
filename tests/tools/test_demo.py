"""The command line and the demo, as a user starts them."""
import errno
import os
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import SMALL, TOLERANCE, difference, full_disk, interrupt
from PIL import Image
from safetensors.torch import load_file

from timm_smpconv import SMPKernel
from timm_smpconv.__main__ import main
from timm_smpconv.tools.demo import demo
from timm_smpconv.tools.demo.digits import digits

FILES = ['kernels.png', 'merged.safetensors', 'model.safetensors', 'points.gif']


@pytest.fixture
def small(monkeypatch):
    """A small network and few images."""
    few = {training: tuple(part[:32] for part in digits(training)) for training in (True, False)}

    def create_model(name, **kwargs):
        if 'tcn' in name:
            return timm.create_model(name, depth=2, dim=4, points=5, **kwargs)
        if 'resnet' in name:
            return timm.create_model(name, dims=(4, 6), kernel_size=7, **kwargs)
        return timm.create_model('smpconv_tiny', **{**SMALL, 'depths': (1, 1, 1, 1), **kwargs})

    monkeypatch.setattr(demo, 'digits', few.get)
    monkeypatch.setattr(demo, 'timm', SimpleNamespace(create_model=create_model))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)  # four minutes beside other tests
def test_demo_learns_merges_and_writes(tmp_path, capfd):
    assert main(['demo', '--epochs', '3', '--out', str(tmp_path / 'out')]) == 0
    out, err = capfd.readouterr()
    assert names(tmp_path / 'out') == FILES
    with Image.open(tmp_path / 'out' / 'kernels.png') as picture:
        assert picture.size[0] > 500 and len(picture.convert('L').getcolors()) > 50
    with Image.open(tmp_path / 'out' / 'points.gif') as picture:
        assert picture.n_frames == 44 and (tmp_path / 'out' / 'points.gif').stat().st_size < 600_000
    assert '132/132' in err and 'epoch 3/3' in err  # 1,437 images in whole batches of 32
    relative = float(out.split(' relative)')[0].split('(')[-1])
    assert relative < 1e-5
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(('unmerged', 'merged '))}
    assert rows['unmerged'][1] == rows['merged'][1]
    assert float(rows['merged'][1].rstrip('%')) >= 90  # on images it has not seen: 96 %, and 97 after all nine epochs
    (first,) = [line for line in (out + err).splitlines() if line.strip().startswith('epoch 1: held-out accuracy')]
    assert float(first.split()[-1].rstrip('%')) > 50  # 83 %, and 9 % with the average of BatchNorm statistics

    # The printed lines load what was written, and both are the same network.
    calls = [line.strip() for line in out.splitlines() if line.strip().startswith('timm.create_model(')]
    models = [eval(call, {'timm': timm}).eval() for call in calls]
    x = torch.randn(2, 1, 48, 48)
    assert torch.allclose(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)
    radii = torch.cat([v.flatten() for k, v in models[0].state_dict().items() if k.endswith('radius')])
    assert radii.min() >= 1e-3 and radii.max() <= 1


@pytest.mark.slow
def test_the_seed_decides(small, tmp_path):
    def trained(seed, folder):
        torch.rand(seed + 1)  # the state of the generator before does not matter
        assert main(['demo', '--epochs', '1', '--seed', str(seed), '--out', str(tmp_path / folder)]) == 0
        return load_file(tmp_path / folder / 'model.safetensors')

    first, again, other = trained(3, 'first'), trained(3, 'again'), trained(4, 'other')
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert not torch.equal(first['stem.0.conv.weight'], other['stem.0.conv.weight'])


def test_an_interrupt_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, '_accuracy', interrupt)
    assert main(['demo', '--epochs', '1', '--out', str(tmp_path / 'out')]) == 130
    assert capsys.readouterr().err.endswith('\ntimm-smpconv demo: interrupted\n')
    assert not names(tmp_path)


@pytest.mark.parametrize('arguments,message', [
    (['demo', '--epochs', '0'], "argument --epochs: must be an integer from 1 to 10000, got '0'"),
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
    assert f'{tmp_path / out} must be a folder or a new one, got a file at {tmp_path}/out' in captured.err
    assert captured.out == ''
    assert names(tmp_path) == ['out']


def test_a_folder_in_the_place_of_a_file_is_refused_before_training(tmp_path, capsys):
    (tmp_path / 'merged.safetensors').mkdir()
    (tmp_path / 'model.safetensors').write_text('earlier')
    assert main(['demo', '--out', str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert f'{tmp_path}/merged.safetensors must be a file or not exist, got a folder' in captured.err
    assert captured.out == '' and (tmp_path / 'model.safetensors').read_text() == 'earlier'
    assert names(tmp_path) == ['merged.safetensors', 'model.safetensors']


def test_a_full_disk(small, tmp_path, capsys):
    (tmp_path / 'model.safetensors').write_text('earlier')
    with full_disk(20_000):
        assert main(['demo', '--epochs', '1', '--out', str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert os.strerror(errno.EFBIG) in last
    assert names(tmp_path) == ['model.safetensors'] and (tmp_path / 'model.safetensors').read_text() == 'earlier'


@pytest.mark.parametrize('out', ['.', 'link', 'out'])
def test_where_files_are_written_and_who_may_read_them(small, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to('real')
    umask = os.umask(0o027)
    try:
        assert main(['demo', '--epochs', '1', '--out', out]) == 0
    finally:
        os.umask(umask)
    for name in FILES:
        assert (tmp_path / out / name).stat().st_mode & 0o777 == 0o640
    assert set(names(tmp_path / out)) - {'link', 'real'} == set(FILES)


@pytest.mark.parametrize('name', ['smpconv_tcn_pmnist', 'smpconv_resnet_cifar10'])
def test_other_families(small, name, tmp_path, capsys):
    """Narrow networks on few digits: what is written loads by the printed lines, and both are the same network."""
    assert main(['demo', '--model', name, '--epochs', '1', '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    calls = [line.strip() for line in out.splitlines() if line.strip().startswith('timm.create_model(')]
    models = [eval(call, {'timm': demo.timm}).eval() for call in calls]
    x = torch.randn(2, 1, 8, 8)
    assert difference(models[1](x), models[0](x)) < TOLERANCE[torch.float32]
    assert ('8x8, read row by row' in out) == ('tcn' in name)
    assert names(tmp_path) == FILES


@pytest.mark.parametrize('name', timm.list_models('smpconv_tcn*'))
def test_points_reach_samples_of_the_short_sequences(name):
    setup = demo._setup(name)
    model = timm.create_model(name, **demo._model_args(setup))
    for kernel in (m for m in model.modules() if isinstance(m, SMPKernel)):
        assert kernel.size == [64] and (kernel()[:, 0] != 0).sum(1).float().mean() > 8  # of about 12 behind them


def test_motion_follows_the_points():
    """Points that an optimizer moves, seen at evenly spaced moments of the training: first, last and between.

    Of two kernels the one is shown whose points moved further, by samples.
    """
    model = torch.nn.Module()
    model.near, model.far = SMPKernel(2, (21, 21), 3), SMPKernel(2, (41,), 3)
    motion = demo._Motion(model, 430)
    start = model.far.coords[0].clone()
    with torch.no_grad():
        for update in range(1, 431):
            model.far.coords += 1e-3
            model.near.coords += 1.5e-3
            motion.see(update)
    frames = motion.frames()
    assert len(frames) == 44 and [title for title, _ in frames[:2]] == [
        'far, channel 0\nupdate 0 of 430', 'far, channel 0\nupdate 10 of 430']
    for i, (_, picture) in enumerate(frames):
        assert torch.allclose(picture.points.coords, start + i * 1e-2, atol=1e-5)
    assert difference(frames[-1][1].kernel, model.far()[0, 0]) < TOLERANCE[torch.float32]


def test_motion_of_a_training_of_one_update():
    model = torch.nn.Sequential(SMPKernel(2, (5, 5), 3))
    motion = demo._Motion(model, 1)
    motion.see(1)
    assert [title for title, _ in motion.frames()] == ['0, channel 0\nupdate 0 of 1', '0, channel 0\nupdate 1 of 1']
