"""The recipes against the authors' schedule and the paper's figures, through timm's own factories."""
import math
import types

import pytest
import torch
import yaml
from conftest import IMAGENET_MODELS
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from timm_smpconv.__main__ import main
from timm_smpconv.recipe import recipe_names, recipe_path

PAPER = {  # epochs, stochastic depth (appendix, 1.2 and 2.1)
    'smpconv_tiny': (300, 0.1), 'smpconv_base': (300, 0.5),
    'smpconv_mobile31': (120, 0.), 'smpconv_mobile51': (120, 0.)}


def settings(name):
    return yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))


def authors_schedule(base, final, epochs, updates, warmup_epochs):
    """The learning rate at every update: linear from 0, then half a cosine."""
    warmup = warmup_epochs * updates
    rest = epochs * updates - warmup
    return [base * i / (warmup - 1) for i in range(warmup)] + [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def test_there_is_one_for_every_model():
    assert set(recipe_names()) == set(IMAGENET_MODELS) == set(PAPER)


@pytest.mark.parametrize('name', PAPER)
def test_train_py_can_read_it_in_any_locale(name):
    with recipe_path(name).open(encoding='ascii') as file:  # as train.py opens it in the C locale
        assert yaml.safe_load(file) == settings(name)


@pytest.mark.parametrize('name', PAPER)
def test_the_learning_rate(name):
    recipe, updates = settings(name), 625  # ImageNet's 1,281,167 images at batch 2048
    epochs, _ = PAPER[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe['lr'])
    scheduler, last = create_scheduler_v2(
        optimizer, **scheduler_kwargs(types.SimpleNamespace(**recipe)), updates_per_epoch=updates)
    assert last == epochs
    expected = authors_schedule(4e-3, 1e-6, epochs, updates, 10)
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
        model=name, device_modules=['timm_smpconv'], opt='smpadamw', opt_eps=1e-8, weight_decay=0.05, lr=4e-3,
        aa='rand-m9-mstd0.5-inc1', smoothing=0.1, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.5, reprob=0.25,
        remode='pixel', recount=1, model_ema=True, model_ema_decay=0.9999, train_interpolation='random', hflip=0.0,
        sync_bn=True, drop_path=PAPER[name][1], crop_pct=0.875, interpolation='bicubic', scale=[0.08, 1.0])
    assert {key: recipe[key] for key in expected} == expected


def test_the_command_prints_paths_and_names(capsys):
    assert main(['recipe', 'smpconv_tiny']) == 0
    assert capsys.readouterr().out.strip() == str(recipe_path('smpconv_tiny'))
    assert main(['recipe']) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(['recipe', 'smpconv_tinny']) == 2
    assert (
        "name must be one of smpconv_base, smpconv_mobile31, smpconv_mobile51, smpconv_tiny, got 'smpconv_tinny'"
    ) in capsys.readouterr().err


def test_the_strongest_augmentation_runs():
    # Magnitude 9 with deviation 0.5 reaches 10, where Pillow 13 refuses to keep 0 bits.
    image = AugmentOp('PosterizeIncreasing', prob=1., magnitude=10)(Image.new('RGB', (8, 8), 'white'))
    assert image.size == (8, 8)
