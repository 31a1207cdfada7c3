"""Training of the sequence networks: readers on folders in the original formats, schedule, and the real command."""
import csv
import gzip
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import sklearn.model_selection
import timm
import torch
from conftest import difference
from data_folders import accept_cifar10, crops, write_characters, write_cifar10, write_mnist, write_wav, write_words

from timm_smpconv.__main__ import main
from timm_smpconv.training import sequences
from timm_smpconv.training.recipes import recipe_path
from timm_smpconv.training.sequences.data import mfcc

SMALL = dict(depth=1, dim=4, points=3, kernel_size=20)
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

pytestmark = [pytest.mark.filterwarnings(f'ignore:{message}') for message in (  # of Lightning 2.6
    r'\s*(By default only one Jsonargparse|.* was deprecated in v4\.49)', '.isinstance.treespec, LeafSpec',
    'Starting from v1.9.0, `tensorboardX`', 'The number of training batches', 'The dirpath has changed')]


def parts(data):
    """The three data sets as tensors, {name: (x, labels)}."""
    data.prepare_data()
    data.setup('fit')
    assert data.parts.keys() == {'train', 'validation', 'test'}
    return {
        name: (torch.stack([x for x, _ in part]), torch.tensor([int(label) for _, label in part]))
        for name, part in data.parts.items()}


@pytest.fixture
def mnist(tmp_path):
    return tmp_path, write_mnist(tmp_path)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    written = write_cifar10(tmp_path)
    accept_cifar10(tmp_path, monkeypatch.setattr)
    return tmp_path, written


def test_mnist(mnist):
    folder, (_, (images, labels)) = mnist
    for _ in range(2):  # the second time from unpacked files
        found = parts(sequences.SequentialMNIST(folder))
        expected = torch.from_numpy((images / 255 - 0.1307) / 0.3081)[:, None]
        for name in ('validation', 'test'):
            assert difference(found[name][0], expected) < 1e-6 and found[name][1].tolist() == labels.tolist()
        assert found['train'][0].shape == (20, 1, 28, 28) and found['train'][1].tolist() == [*range(10)] * 2


def draws(folder, image, count=1000):
    """Training images made from one image."""
    data = sequences.SequentialMNIST(folder)
    data.prepare_data()
    data.setup('fit')
    data.parts['train'].data[:] = torch.from_numpy(image)
    return torch.cat([data.parts['train'][0][0] for _ in range(count)])


def test_mnist_is_erased(mnist):
    black = draws(mnist[0], np.zeros((28, 28), np.uint8))  # which no other transform changes
    erased = (black == 0).sum((1, 2))
    assert set(erased.tolist()) == {0, 121}  # 4/28 of 784 pixels: 11 × 11
    assert 0.4 < (erased > 0).float().mean() < 0.6
    assert difference(black[erased == 0], torch.full_like(black[erased == 0], -0.1307 / 0.3081)) < 1e-6


def test_mnist_is_rotated_shifted_and_scaled(mnist):
    image = np.zeros((28, 28), np.uint8)
    image[12:16, 20:24] = 255  # its middle is 8 pixels to the right of the image's
    found = draws(mnist[0], image)
    found = (found[(found == 0).sum((1, 2)) == 0] * 0.3081 + 0.1307).double().clamp(min=0)
    grid = torch.arange(28.) - 13.5
    mass = found.sum((1, 2))
    x, y = (found.sum(1) * grid).sum(1) / mass, (found.sum(2) * grid).sum(1) / mass
    unchanged = (x - 8).hypot(y) < 1e-3
    assert 0.1 < unchanged.double().mean() < 0.25  # an eighth, and a few shifts by less than half a pixel
    angle, distance = torch.rad2deg(torch.atan2(y, x)), x.hypot(y)
    # 30 degrees at 8 pixels, or 6 of a scaled image, and 2 pixels along each axis.
    assert 30 < angle.abs().max() < 30 + math.degrees(math.atan(2.9 / 6)) and abs(angle.mean()) < 3
    assert 0.75 * 8 - 2.9 < distance.min() < 5.5 and 9 < distance.max() < 8 + 2.9
    area = mass / 16
    assert 0.45 < area.min() < 0.65 and area.max() < 1.3  # 0.75² = 0.56, in whole pixels


def test_cifar10(cifar10):
    folder, ((images, _), (test_images, labels)) = cifar10
    data = sequences.SequentialCIFAR10(folder)
    found = parts(data)
    expected = torch.from_numpy((test_images / 255 - IMAGENET[0]) / IMAGENET[1]).permute(0, 3, 1, 2)
    for name in ('validation', 'test'):
        assert difference(found[name][0], expected) < 1e-6 and found[name][1].tolist() == labels
    assert found['train'][1].tolist() == [*range(10)] * 2
    expected = (crops(images[3]) / 255 - IMAGENET[0]) / IMAGENET[1]
    expected, which = torch.from_numpy(expected).permute(0, 3, 1, 2).float(), set()
    for _ in range(120):
        errors = (expected - data.parts['train'][3][0]).abs().amax((1, 2, 3))
        assert errors.min() < 1e-5
        which.add(int(errors.argmin()))
    assert len(which) > 60 and min(which) < 81 <= max(which)


def authors_split(x, labels):
    """Split and normalisation as the authors call them, on tensors, with a loop over time."""
    def split(tensor):
        train, rest, _, rest_labels = sklearn.model_selection.train_test_split(
            tensor, labels, train_size=0.7, random_state=0, shuffle=True, stratify=labels)
        return [train, *sklearn.model_selection.train_test_split(
            rest, train_size=0.5, random_state=1, shuffle=True, stratify=rest_labels)]

    train = split(x)[0]
    x = torch.stack([
        (x[..., n] - train[..., n].reshape(-1).mean()) / (train[..., n].reshape(-1).std() + 1e-5)
        for n in range(x.shape[-1])], -1)
    return dict(zip(('train', 'validation', 'test'), zip(split(x), split(labels))))


def check(data, x, labels):
    expected = authors_split(x.double(), torch.tensor(labels))
    for name, (series, numbers) in parts(data).items():
        assert series.dtype == torch.float32
        assert torch.equal(numbers, expected[name][1])
        assert difference(series, expected[name][0]) < 1e-4


def test_character_trajectories(tmp_path):
    series, labels = write_characters(tmp_path)
    padded = torch.zeros(60, 3, 182)
    for row, channels in enumerate(series):
        for n in range(182):
            padded[row, :, n] = torch.from_numpy(channels[:, min(n, channels.shape[1] - 1)])
    numbers = {'3': 0, '2': 1, '1': 2}  # in order of appearance
    check(sequences.CharacterTrajectories(tmp_path), padded, [numbers[label] for label in labels])


def test_speech_commands(tmp_path):
    clips, labels = write_words(tmp_path)
    samples = torch.from_numpy(clips) / 2 ** 15
    check(sequences.SpeechCommands(tmp_path, mfcc=False), samples[:, None], labels)
    check(sequences.SpeechCommands(tmp_path), torch.from_numpy(plain_mfcc(samples.double().numpy())), labels)


def plain_mfcc(x):
    """MFCCs after HTK's definition: (N, L) → (N, 20, L // 100 + 1)."""
    padded = np.pad(x, ((0, 0), (100, 100)), mode='reflect')
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    frames = np.stack([padded[:, n:n + 200] for n in range(0, x.shape[1] + 1, 100)], 1) * window
    power = np.abs(np.fft.rfft(frames)) ** 2  # (N, T, 101)
    hertz = np.linspace(0, 8000, 101)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66) / 2595) - 1)
    bands = np.stack([
        np.clip(np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)), 0, None)
        for low, middle, high in zip(edges, edges[1:], edges[2:])], 1)
    return scipy.fft.dct(np.log(power @ bands + 1e-6), type=2, norm='ortho')[..., :20].swapaxes(1, 2)


@pytest.mark.parametrize('length', [16_000, 1234])
def test_mfcc(length):
    x = torch.randn(3, length) * torch.tensor([1., 1e-2, 0.])[:, None]
    assert difference(mfcc(x), torch.from_numpy(plain_mfcc(x.double().numpy()))) < 1e-4


def read(data):
    data.prepare_data()
    data.setup('fit')


@pytest.mark.parametrize('kind, needs', [
    ('SequentialMNIST', 'MNIST/raw/ with train-images-idx3-ubyte'),
    ('SequentialCIFAR10', 'cifar-10-batches-py/ with data_batch_1'),
    ('CharacterTrajectories', 'CharacterTrajectories_TRAIN.ts and CharacterTrajectories_TEST.ts'),
    ('SpeechCommands', 'the folders yes, no, up, down, left, right, on, off, stop, go')])
def test_an_empty_folder(tmp_path, kind, needs):
    with pytest.raises(sequences.DataError, match=f"^data_dir must hold {needs}.*, got '{tmp_path}': ") as error:
        read(getattr(sequences, kind)(tmp_path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('damage, reason', [
    (lambda raw: (raw / 't10k-labels-idx1-ubyte.gz').unlink(),
     'there is no t10k-labels-idx1-ubyte and no t10k-labels-idx1-ubyte.gz'),
    (lambda raw: (raw / 'train-images-idx3-ubyte.gz').write_bytes(
        (raw / 'train-images-idx3-ubyte.gz').read_bytes()[:-100]), 'train-images-idx3-ubyte.gz is damaged: Compressed'),
    (lambda raw: (raw / 'train-images-idx3-ubyte').write_bytes(
        gzip.decompress((raw / 'train-images-idx3-ubyte.gz').read_bytes())[:-1]),
     'train-images-idx3-ubyte is damaged: it has 15695 bytes, and 15696 by its header'),  # 16 + 20 · 28 · 28
    (lambda raw: (raw / 'train-labels-idx1-ubyte').write_bytes(
        gzip.decompress((raw / 't10k-labels-idx1-ubyte.gz').read_bytes())), r'\(20, 28, 28\) images and 10 labels'),
    (lambda raw: (raw / 'train-images-idx3-ubyte').write_bytes(b''),
     r'train-images-idx3-ubyte is not an idx file of bytes in 3 dimension'),
], ids=['missing', 'short gzip', 'short', 'other labels', 'empty'])
def test_damaged_mnist(mnist, damage, reason):
    raw = mnist[0] / 'MNIST' / 'raw'
    damage(raw)
    left = {file.name: file.read_bytes() for file in raw.iterdir()}
    for _ in range(2):  # nothing half unpacked passes for whole the next time
        with pytest.raises(sequences.DataError, match=f'^data_dir must hold MNIST/raw/.*: {reason}'):
            read(sequences.SequentialMNIST(mnist[0]))
    for file in set(raw.iterdir()) - {raw / name for name in left}:
        assert file.read_bytes() == gzip.decompress(left[f'{file.name}.gz'])


def test_mnist_is_unpacked_whole(mnist, monkeypatch):
    raw = mnist[0] / 'MNIST' / 'raw'
    left = set(raw.iterdir())

    def interrupted(path, content):
        with path.open('wb') as file:
            file.write(content[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequences.SequentialMNIST(mnist[0]).prepare_data()
    assert set(raw.iterdir()) == left
    read(sequences.SequentialMNIST(mnist[0]))


@pytest.mark.parametrize('damage, reason', [
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), 'data_batch_3 is damaged: its MD5 is not [0-9a-f]{32}$'),
    (Path.unlink, 'there is no data_batch_3$')])
def test_damaged_cifar10(cifar10, damage, reason):
    damage(cifar10[0] / 'cifar-10-batches-py' / 'data_batch_3')
    with pytest.raises(sequences.DataError, match=f'^data_dir must hold cifar-10-batches-py/.*: {reason}'):
        read(sequences.SequentialCIFAR10(cifar10[0]))


@pytest.mark.parametrize('old, new, reason', [
    (',', ',?,', 'series 0 of CharacterTrajectories_TEST.ts is empty, or holds NaN or infinity'),
    (',', ',nonsense,', 'nonsense'),
    ('@data', '', 'TEST.ts is no .ts file of labelled series: '),
    ('@classLabel true 1 2 3', '@classLabel false', 'TEST.ts is no .ts file of labelled series: '),
])
def test_damaged_character_trajectories(tmp_path, old, new, reason):
    write_characters(tmp_path)
    file = tmp_path / 'CharacterTrajectories_TEST.ts'
    file.write_text(file.read_text(encoding='utf-8').replace(old, new, 1), encoding='utf-8')
    with pytest.raises(sequences.DataError, match=f'^data_dir must hold CharacterTrajectories_TRAIN.ts.*{reason}'):
        read(sequences.CharacterTrajectories(tmp_path))


def test_one_character_too_few(tmp_path):
    write_characters(tmp_path, train=4, test=1, classes=3)
    with pytest.raises(sequences.DataError, match='least populated class'):
        read(sequences.CharacterTrajectories(tmp_path))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize('damage, reason', [
    (cut, 'yes/00000001_nohash_0.wav is damaged: Reached EOF'),
    (lambda file: write_wav(file, np.zeros(16_000), rate=8000), 'yes/00000001_nohash_0.wav has 8000 Hz'),
    (lambda file: [path.unlink() for path in file.parent.iterdir()], 'there is no WAV file in yes'),
    (lambda file: [path.unlink() for path in file.parent.parent.glob('*/00000001*')], 'no WAV file has 16,000 samples'),
])
def test_damaged_speech_commands(tmp_path, damage, reason):
    write_words(tmp_path, clips=1)
    damage(tmp_path / 'yes' / '00000001_nohash_0.wav')
    with pytest.raises(sequences.DataError, match=f'^data_dir must hold the folders yes, no.*{reason}'):
        read(sequences.SpeechCommands(tmp_path))


@pytest.mark.parametrize('kind, write, size, found', [
    (sequences.SequentialMNIST, write_mnist, 70_000, 30),
    (sequences.CharacterTrajectories, write_characters, 2858, 60),
    (sequences.SpeechCommands, write_words, 34_975, 70)])
def test_other_data_than_the_papers_are_warned_of(tmp_path, caplog, kind, write, size, found):
    write(tmp_path)
    with caplog.at_level(logging.WARNING, 'timm_smpconv.training.sequences.data'):
        read(kind(tmp_path))
    assert f'{kind.__name__} has {size} series in the data of the paper, got {found} in {tmp_path}' in caplog.text


def authors_rates(lr, warmup, total):
    """Rates of three parameter groups at every update, by torch's schedulers as the authors combine them."""
    optimizer = torch.optim.Adam([
        {'params': [torch.zeros(1, requires_grad=True)], 'lr': scale * lr} for scale in (1, 1, 0.1)])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=1e-6)
    linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: update / warmup)
    for update in range(total):
        yield [group['lr'] for group in optimizer.param_groups]
        optimizer.step()
        (linear if update <= warmup else cosine).step()


@pytest.mark.parametrize('lr, batches, epochs, warmup', [(1e-4, 32, 30, 5), (5e-3, 7, 9, 3), (2e-3, 1, 4, 1)])
def test_the_learning_rate_is_the_authors(lr, batches, epochs, warmup):
    module = sequences.SequenceClassifier('smpconv_tcn_smnist', SMALL, lr=lr, warmup_epochs=warmup)
    module.trainer = SimpleNamespace(
        estimated_stepping_batches=batches * epochs, num_training_batches=batches, accumulate_grad_batches=1)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured['optimizer'], configured['lr_scheduler']['scheduler']
    assert configured['lr_scheduler']['interval'] == 'step' and module.min_lr == 1e-6
    radii = {id(p) for name, p in module.model.named_parameters() if name.endswith('.radius')}
    for update, (rate, _, radius_rate) in enumerate(authors_rates(lr, warmup * batches, epochs * batches)):
        for group in optimizer.param_groups:
            of_radii = [id(p) in radii for p in group['params']]
            assert all(of_radii) or not any(of_radii)
            expected, scale = (radius_rate, group['radius_lr_scale']) if any(of_radii) else (rate, 1)
            assert group['lr'] * scale == pytest.approx(expected, rel=1e-9), update
        optimizer.step()
        scheduler.step()


def test_what_decays():
    module = sequences.SequenceClassifier('smpconv_tcn_scifar10', SMALL)  # with biases
    module.trainer = SimpleNamespace(estimated_stepping_batches=10, num_training_batches=5, accumulate_grad_batches=2)
    names = {id(param): name for name, param in module.model.named_parameters()}
    groups = module.configure_optimizers()['optimizer'].param_groups
    decayed = {names[id(p)] for group in groups if group['weight_decay'] for p in group['params']}
    assert {group['weight_decay'] for group in groups} == {0, 1e-5}
    expected = {
        name for name, param in module.model.named_parameters()
        if param.ndim > 1 and not name.endswith(('.coords', '.radius'))}
    assert decayed == expected and any(name.endswith('kernel.weight') for name in decayed)


@pytest.mark.parametrize('argument, value, rule', [
    ('lr', 0, 'positive and finite'), ('lr', math.nan, 'positive and finite'), ('min_lr', -1e-6, 'positive and finite'),
    ('warmup_epochs', -1, 'at least 0')])
def test_wrong_rates_are_refused(argument, value, rule):
    with pytest.raises(ValueError, match=f'{argument} must be {rule}, got {value}'):
        sequences.SequenceClassifier('smpconv_tcn_smnist', SMALL, **{argument: value})


def test_without_warm_up_the_cosine_starts_at_the_peak():
    rates = [sequences.rate_factor(update, warmup=0, total=10, end=0.1) for update in range(11)]
    assert rates[:2] == [1, 1] and rates[-1] > 0.1  # the authors' cosine starts after one update
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)


def command(name, *args, verb='fit'):
    """Run the real command in this process; the current folder takes its output."""
    return main(['sequence', verb, '--config', str(recipe_path(name)), *map(str, args)])


@pytest.mark.parametrize('args, message', [
    (['--data-dir', '.', '--model.learning_rate', '1'], 'learning_rate'),
    ([], '--data-dir must be the folder of the data, got none'), (['--data-dir'], 'data')])
def test_wrong_arguments(capsys, args, message):
    with pytest.raises(SystemExit, match='2'):
        command('smpconv_tcn_ct', *args)
    assert message in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'timm_smpconv.training.sequences', None)
    assert main(['sequence', '--help']) == 1
    assert 'it comes with the extra "sequences"' in capsys.readouterr().err


TINY = '{depth: 1, dim: 4, points: 3, kernel_size: 20}'
ON_CPU = ['--trainer.accelerator', 'cpu', '--trainer.enable_progress_bar', 'false']


def metrics(version):
    """Epoch → its row of metrics.csv, joined from the lines of training and validation."""
    rows = {}
    with Path('lightning_logs', f'version_{version}', 'metrics.csv').open(newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(row['epoch']), {}).update(
                {key: float(value) for key, value in row.items() if value})
    return rows


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with data/ and last.ckpt: an epoch of training that started from a file which has gone since."""
    folder = tmp_path_factory.mktemp('trained')
    write_characters(folder / 'data')
    torch.save(timm.create_model('smpconv_tcn_ct', **SMALL).state_dict(), folder / 'start.pt')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ['--model.weights', 'start.pt', '--model.lr', 1e-3, '--trainer.max_epochs', 1]
        assert command('smpconv_tcn_ct', *tiny('data'), *options) == 0
    (folder / 'lightning_logs' / 'version_0' / 'checkpoints' / 'last.ckpt').rename(folder / 'last.ckpt')
    (folder / 'start.pt').unlink()
    return folder


def tiny(folder, model_args=TINY):
    return ['--data-dir', folder, '--data.num_workers', 0, '--model.model_args', model_args, *ON_CPU]


def error_of(capsys, name, *args):
    """The line with which the command ends, before it writes a file."""
    capsys.readouterr()
    try:
        status = command(name, *args)
    except SystemExit as exit:
        status = exit.code
    assert status in (1, 2) and not [path for path in Path().rglob('*') if path.is_file()]
    lines = capsys.readouterr().err.splitlines()
    assert not any('Traceback' in line for line in lines)
    return lines[-1]


def test_what_checkpoints_say(trained):
    found = torch.load(trained / 'last.ckpt', weights_only=True)['hyper_parameters']
    assert found == dict(
        name='smpconv_tcn_ct', model_args=SMALL, lr=1e-3, weight_decay=1e-5, warmup_epochs=5, min_lr=1e-6)


def test_options_win_over_a_checkpoint(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = []
    monkeypatch.setattr(
        sequences.SequenceClassifier, 'on_train_batch_start', lambda module, *_: rates.append(
            [(group['lr'], group['initial_lr'], group['weight_decay']) for group in module.optimizers().param_groups]))
    args = [
        *tiny(trained / 'data', TINY[:-1] + ', drop_rate: 0.5}'), '--model.weights', 'start.pt', '--model.lr', 0.02,
        '--model.min_lr', 0.002, '--model.weight_decay', 0.5, '--model.warmup_epochs', 0, '--trainer.max_epochs', 3]
    assert command('smpconv_tcn_ct', *args, '--ckpt_path', trained / 'last.ckpt') == 0
    assert len(rates) == 2  # 42 series in batches of 64: an update in each epoch
    for update, groups in enumerate(rates, start=1):
        assert {weight_decay for *_, weight_decay in groups} == {0, 0.5} and {peak for _, peak, _ in groups} == {0.02}
        cosine = 0.002 + (0.02 - 0.002) * (1 + math.cos(math.pi * (update - 1) / 3)) / 2
        found = [lr for lr, *_ in groups]  # that of radii ends at ten times min_lr, as it is scaled later
        assert (min(found), max(found)) == (pytest.approx(cosine), pytest.approx(0.02))
    last = torch.load('lightning_logs/version_0/checkpoints/last.ckpt', weights_only=True)
    assert last['hyper_parameters']['lr'] == 0.02 and last['hyper_parameters']['model_args']['drop_rate'] == 0.5


def test_evaluate_when_the_file_it_started_from_has_gone(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(
        'smpconv_tcn_ct', *tiny(trained / 'data'), '--ckpt_path', trained / 'last.ckpt', verb='test') == 0


@pytest.mark.parametrize('name, model_args, message', [
    ('smpconv_tcn_sc', TINY, 'ckpt_path must be a checkpoint of smpconv_tcn_sc, got one of smpconv_tcn_ct'),
    ('smpconv_tcn_ct', TINY[:-1] + ', global_pool: avg}', 'with global_pool = avg in model_args, got one with None'),
    ('smpconv_tcn_ct', TINY.replace('depth: 1', 'depth: 2'), 'of the same network: state_dict must have exactly the'),
    ('smpconv_tcn_ct', TINY.replace('dim: 4', 'dim: 5'), 'of the same network: state_dict must have the shapes'),
    ('smpconv_tcn_ct', TINY[:-1] + ', permuted: true}', 'missing (stem.permutation)'),
    ('smpconv_tcn_ct', TINY.replace('kernel_size: 20', 'kernel_size: 21'), 'must be 21, the length of the kernels'),
])
def test_checkpoints_of_other_networks(trained, tmp_path, monkeypatch, capsys, name, model_args, message):
    monkeypatch.chdir(tmp_path)
    args = [*tiny(trained / 'data', model_args), '--ckpt_path', trained / 'last.ckpt']
    assert message in error_of(capsys, name, *args)


def test_weights_are_no_checkpoint_of_a_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = trained / 'weights.pt'
    torch.save(timm.create_model('smpconv_tcn_ct', **SMALL).state_dict(), file)
    assert 'got other weights: give them as model.weights' in error_of(
        capsys, 'smpconv_tcn_ct', *tiny(trained / 'data'), '--ckpt_path', file)


@pytest.mark.parametrize('name, model_args, message', [
    ('smpconv_tcn_ct', ', in_chans: 2', 'series have 3 channels and 182 samples, and the model takes 2 channels'),
    ('smpconv_tcn_ct', ', seq_len: 181', 'takes 3 channels and at most 181 samples'),
    ('smpconv_tcn_ct', ', seq_len: 183, permuted: true', 'takes 3 channels and 183 samples'),
    ('smpconv_tcn_ct', ', num_classes: 2', 'there is a label 2, and the model has 2 classes'),
    ('smpconv_tcn_smnist', ', seq_len: 783', 'series have 1 channels and 784 samples, and the model takes 1 channels'),
    ('smpconv_tcn_smnist', ', num_classes: 9', 'there is a label 9, and the model has 9 classes'),
])
def test_data_that_do_not_fit_the_model(tmp_path, monkeypatch, capsys, name, model_args, message):
    write = write_characters if name == 'smpconv_tcn_ct' else write_mnist
    write(tmp_path / 'data')
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    error = error_of(capsys, name, *tiny('../data', TINY[:-1] + model_args + '}'))
    assert error.startswith('timm-smpconv sequence: data_dir must hold ') and message in error


@pytest.mark.parametrize('args, message', [
    (['--model.lr', '-1'], 'lr must be positive and finite, got -1.0'),
    (['--model.weights', 'none.pt'], 'none.pt'),
    (['--model.name', 'nix'], 'Unknown model (nix)'),
    (['--model.model_args.depht', '3'], "unexpected keyword argument 'depht'"),
    (['--data.batch_size', '0'], 'batch_size must be at least 1, got 0'),
    (['--trainer.max_epochs', '-1'], 'max_epochs must be at least 1, got -1'),
    (['--ckpt_path', 'nowhere'], "file must exist, got 'nowhere'"),
    (['--ckpt_path', __file__], 'file must be an undamaged weights-only checkpoint'),
    ([], 'data_dir must hold CharacterTrajectories_TRAIN.ts'),
])
def test_wrong_options(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, 'smpconv_tcn_ct', *tiny('.'), *args)


@pytest.mark.slow
def test_train_resume_test_and_load(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_characters(tmp_path / 'data', train=60, test=60)
    args = [
        '--data-dir', 'data', '--data.num_workers', 0, '--data.batch_size', 8, '--model.lr', 1e-2,
        '--model.warmup_epochs', 1, '--model.model_args', TINY, *ON_CPU]
    fit = [*args, '--trainer.max_epochs', 3, '--checkpoint.save_top_k', -1]
    assert command('smpconv_tcn_ct', *fit) == 0
    whole, folder = metrics(0), Path('lightning_logs', 'version_0', 'checkpoints')
    assert list(whole) == [0, 1, 2] and whole[2]['train_loss'] < whole[0]['train_loss']
    (first,) = folder.glob('epoch=0-*.ckpt')
    assert f'{whole[0]["val_accuracy"]:.4f}' in first.name
    assert command('smpconv_tcn_ct', *fit, '--ckpt_path', first) == 0
    assert list(metrics(1)) == [1, 2]
    last = [torch.load(Path('lightning_logs', f'version_{n}', 'checkpoints', 'last.ckpt')) for n in (0, 1)]
    assert last[0]['global_step'] == last[1]['global_step'] == 3 * 11  # 84 series in batches of 8
    assert last[0]['lr_schedulers'][0]['_last_lr'] == last[1]['lr_schedulers'][0]['_last_lr']

    capfd.readouterr()
    assert command('smpconv_tcn_ct', *args, '--ckpt_path', folder / 'last.ckpt', verb='test') == 0
    by_lightning = capfd.readouterr().out
    model = timm.create_model(
        'smpconv_tcn_ct', **SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / 'last.ckpt'))).eval()
    x, labels = parts(sequences.CharacterTrajectories('data'))['test']
    with torch.inference_mode():
        accuracy = (model(x).argmax(1) == labels).float().mean().item()
    assert f'{accuracy:.6f}'[:6] in by_lightning

    assert command('smpconv_tcn_ct', *args, '--model.weights', folder / 'last.ckpt', verb='test') == 0
    assert f'{accuracy:.6f}'[:6] in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('name, write', [
    ('smpconv_tcn_smnist', write_mnist), ('smpconv_tcn_pmnist', write_mnist), ('smpconv_tcn_scifar10', write_cifar10),
    ('smpconv_tcn_sc', write_words), ('smpconv_tcn_scraw', write_words)])
def test_two_epochs(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'data')
    if write is write_cifar10:
        accept_cifar10(tmp_path / 'data', monkeypatch.setattr)
    args = ['--data.num_workers', 0, '--model.model_args', TINY, *ON_CPU]
    assert command(name, '--data-dir', 'data', '--trainer.max_epochs', 2, *args) == 0
    assert len(metrics(0)) == 2 and all(math.isfinite(value) for row in metrics(0).values() for value in row.values())
    assert command(
        name, '--data-dir', 'data', *args, '--ckpt_path', 'lightning_logs/version_0/checkpoints/last.ckpt',
        verb='validate') == 0
