"""The recipes against the authors' schedule and the paper's figures, through timm's own factories."""
import math
import types
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import MODELS
from data_folders import accept_cifar10, crops, write_cifar10
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.auto_augment import AugmentOp
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from timm_smpconv.__main__ import main
from timm_smpconv.training.recipes import recipe_names, recipe_path

PAPER = {  # epochs, stochastic depth (appendix, 1.2 and 2.1)
    'smpconv_tiny': (300, 0.1), 'smpconv_base': (300, 0.5),
    'smpconv_mobile31': (120, 0.), 'smpconv_mobile51': (120, 0.)}

# Appendix, Table 1, in its order. Where the authors' commands have another value, theirs is second. Then, from the
# commands alone: dropout of the input, initial radius, bias.
TABLE = {
    'smpconv_tcn_smnist': dict(
        lr=1e-4, epochs=200, warmup=5, dropout=0, batch=64, kernel=784, more=(0.1, 0.002, False)),
    'smpconv_tcn_pmnist': dict(
        lr=1e-4, epochs=200, warmup=5, dropout=0, batch=64, kernel=784, more=(0.1, 0.002, False)),
    'smpconv_tcn_scifar10': dict(
        lr=2e-4, epochs=200, warmup=5, dropout=0, batch=64, kernel=1024, more=(0, 0.002, True)),
    'smpconv_tcn_ct': dict(lr=1e-4, epochs=300, warmup=5, dropout=0, batch=64, kernel=182, more=(0, 0.012, True)),
    'smpconv_tcn_sc': dict(
        lr=(1e-3, 2e-3), epochs=300, warmup=5, dropout=0.2, batch=(64, 32), kernel=(101, 161), more=(0, 0.012, True)),
    'smpconv_tcn_scraw': dict(
        lr=1e-3, epochs=160, warmup=10, dropout=0.1, batch=(64, 32), kernel=16000, more=(0, 0.0002, False)),
}


def settings(name):
    return yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))


def authors_schedule(base, final, epochs, updates, warmup_epochs):
    """The learning rate at every update: linear from 0, then half a cosine."""
    warmup = warmup_epochs * updates
    rest = epochs * updates - warmup
    return [base * i / (warmup - 1) for i in range(warmup)] + [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def test_there_is_one_for_every_model():
    assert recipe_names() == sorted(MODELS) == sorted([*PAPER, *TABLE, 'smpconv_resnet_cifar10'])


@pytest.mark.parametrize('name', recipe_names())
def test_train_py_can_read_it_in_any_locale(name):
    with recipe_path(name).open(encoding='ascii') as file:  # as train.py opens it in the C locale
        assert yaml.safe_load(file) == settings(name)


RATES = {  # peak, epochs, updates of an epoch: ImageNet's 1,281,167 images at batch 2048; 50,000 in whole batches of 64
    **{name: (4e-3, epochs, 625) for name, (epochs, _) in PAPER.items()}, 'smpconv_resnet_cifar10': (5e-3, 210, 781)}


@pytest.mark.parametrize('name', RATES)
def test_the_learning_rate(name):
    recipe, (peak, epochs, updates) = settings(name), RATES[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe['lr'])
    scheduler, last = create_scheduler_v2(
        optimizer, **scheduler_kwargs(types.SimpleNamespace(**recipe)), updates_per_epoch=updates)
    assert last == epochs
    expected = authors_schedule(peak, 1e-6, epochs, updates, 10)
    # The rate depends on the number of the update alone: all of the warm-up and the last epoch, every 23rd between.
    end = len(expected)
    for i in [*range(11 * updates), *range(11 * updates, end - updates, 23), *range(end - updates, end)]:
        scheduler.step_update(i)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected[i], rel=5e-3, abs=1e-12), i


@pytest.mark.parametrize('name', PAPER)
def test_the_figures_of_the_paper(name):
    recipe = settings(name)
    assert recipe['batch_size'] * recipe['grad_accum_steps'] * 4 == 2048
    expected = dict(
        model=name, device_modules=['timm_smpconv.training.augmentation'], opt='smpadamw', opt_eps=1e-8,
        weight_decay=0.05, lr=4e-3,
        aa='rand-m9-mstd0.5-inc1', smoothing=0.1, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.5, reprob=0.25,
        remode='pixel', recount=1, model_ema=True, model_ema_decay=0.9999, train_interpolation='random', hflip=0.0,
        sync_bn=True, drop_path=PAPER[name][1], crop_pct=0.875, interpolation='bicubic', scale=[0.08, 1.0])
    assert {key: recipe[key] for key in expected} == expected


def taken(value):
    """The value that a recipe takes: the one of the authors' command, where there are two."""
    return value[-1] if isinstance(value, tuple) else value


@pytest.mark.parametrize('name', TABLE)
def test_table_1(name):
    recipe, row = settings(name), {key: taken(value) for key, value in TABLE[name].items() if key != 'more'}
    input_dropout, radius, bias = TABLE[name]['more']
    assert recipe['model'] == dict(
        name=name, model_args=dict(drop_rate=row['dropout'], input_drop_rate=input_dropout), lr=row['lr'],
        weight_decay=1e-5, warmup_epochs=row['warmup'], min_lr=1e-6)
    assert recipe['data']['init_args']['batch_size'] == row['batch']
    assert recipe['trainer'] == dict(max_epochs=row['epochs'])
    for value in (value for value in TABLE[name].values() if isinstance(value, tuple) and len(value) == 2):
        assert f'Table 1 has {value[0]:g}'.replace('0.001', '1e-3') in recipe_path(name).read_text(encoding='utf-8')

    model = timm.create_model(name, **recipe['model']['model_args'])
    for block in model.blocks:
        for conv in (block.conv1.large.conv, block.conv2.large.conv):
            assert tuple(conv.kernel.size) == (row['kernel'],) and conv.kernel.radius_range == (1e-4, 1)
            assert (conv.kernel.radius == radius).all() and (conv.bias is not None) == bias
            assert conv.kernel.coords.shape[1:] == (30, 1)


def test_the_cifar10_recipe():
    recipe = settings('smpconv_resnet_cifar10')
    expected = dict(
        model='smpconv_resnet_cifar10', drop=0.1, batch_size=64, opt='smpadam', weight_decay=1e-5, lr=5e-3,
        smoothing=0, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert {key: recipe[key] for key in expected} == expected
    model = timm.create_model('smpconv_resnet_cifar10', drop_rate=recipe['drop'])
    for name, kernel in model.named_modules():
        if name.endswith('.kernel'):
            assert tuple(kernel.size) == (33, 33) and kernel.radius_range == (1e-4, 1)
            assert (kernel.radius == 0.12).all() and kernel.coords.shape[1:] == (16, 2)


def test_images_of_cifar10_are_flipped_and_cropped_after_padding(tmp_path, monkeypatch):
    """Through timm's loader with the recipe's options, against all crops of the written images."""
    recipe = settings('smpconv_resnet_cifar10')
    (images, labels), (test_images, _) = write_cifar10(tmp_path)
    accept_cifar10(tmp_path, monkeypatch.setattr)
    __import__(recipe['device_modules'][0])  # as train.py does
    options = dict(
        input_size=(3, 32, 32), batch_size=10, use_prefetcher=False, num_workers=0, persistent_workers=False,
        mean=recipe['mean'], std=recipe['std'])
    train = create_loader(
        create_dataset(recipe['dataset'], root=tmp_path, split='train', is_training=True), is_training=True,
        **{key: recipe[key] for key in ('scale', 'ratio', 'hflip', 'color_jitter')}, interpolation='random', **options)
    mean, std = np.array(recipe['mean']), np.array(recipe['std'])
    every, seen = np.stack([crops(image) for image in images]), set()
    for _ in range(8):
        for batch, targets in train:
            for image, target in zip(batch, targets.tolist()):
                pixels = (image.permute(1, 2, 0).double().numpy() * std + mean) * 255
                of_target = every[[label == target for label in labels]]
                (found,) = np.argwhere(np.abs(of_target - pixels).max((2, 3, 4)) < 1e-3)
                seen.add(found[1])
    assert len(seen) > 60 and min(seen) < 81 <= max(seen)

    (batch, _), = create_loader(
        create_dataset(recipe['dataset'], root=tmp_path, split='validation'), crop_pct=recipe['crop_pct'], **options)
    pixels = (batch.permute(0, 2, 3, 1).double().numpy() * std + mean) * 255
    assert np.abs(pixels - test_images).max() < 1e-3


def test_the_command_prints_paths_and_names(capsys):
    assert main(['recipe', 'smpconv_tiny']) == 0
    assert capsys.readouterr().out.strip() == str(recipe_path('smpconv_tiny'))
    assert main(['recipe']) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(['recipe', 'smpconv_tinny']) == 2
    assert f"name must be one of {', '.join(recipe_names())}, got 'smpconv_tinny'" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['smpconv_tiny', 'smpconv_base', 'smpconv_mobile31', 'smpconv_mobile51'])
@pytest.mark.parametrize('magnitude,kept', [(0, 4), (5, 2), (9, 1), (10, 0)])
def test_every_strength_of_the_augmentation_runs(name, magnitude, kept):
    """Magnitude 9 with deviation 0.5 reaches 10, where Pillow 13 refuses to keep 0 bits. Pillow 12 masks them."""
    import_module(settings(name)['device_modules'][0])  # as train.py does
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = AugmentOp('PosterizeIncreasing', prob=1., magnitude=magnitude, hparams={})(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(image), pixels & (256 - 2 ** (8 - kept)))
