"""`load_state_dict` of a model, of a layer, and of what holds one; merged and unmerged checkpoints."""
import copy

import pytest
import torch
from conftest import small_model
from test_checkpoint import load_small, same
from timm.utils import reparameterize_model

from timm_smpconv import CheckpointError, RepSMPConv2d
from timm_smpconv.layers.rep_conv import RepSMPConv1d
from timm_smpconv.weights import checkpoint
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn

HOLDERS = {
    'net': small_model,
    'features_only': lambda: small_model(features_only=True),
    'copy of features_only': lambda: copy.deepcopy(small_model(features_only=True)),
    'data parallel': lambda: torch.nn.DataParallel(small_model()),
    'within': lambda: torch.nn.Sequential(small_model(), torch.nn.Linear(10, 2)),
    'a layer': lambda: RepSMPConv2d(4, 7),
    'a layer of sequences': lambda: RepSMPConv1d(4, 4, 7),
    'a layer within': lambda: torch.nn.Sequential(RepSMPConv2d(4, 7), torch.nn.Conv2d(4, 2, 1)),
}


@pytest.fixture(scope='module', params=HOLDERS)
def holder(request):
    """A model, or what holds one."""
    return HOLDERS[request.param]()


def changed(state, end, change):
    """The state with its last entry of that name changed."""
    key = [k for k in state if k.endswith(end)][-1]
    return dict(state, **{key: change(state[key])}), key


@pytest.mark.parametrize('strict', [True, False])
def test_points_that_are_not_finite_are_never_loaded(strict, holder):
    before = copy.deepcopy(holder.state_dict())
    for end in 'kernel.radius', 'kernel.coords':
        for number in float('nan'), float('inf'), -float('inf'):
            state, key = changed(before, end, lambda v, number=number: torch.where(v == v.flatten()[-1], number, v))
            with pytest.raises(RuntimeError, match=f'{key} must be finite everywhere, got {number}'):
                holder.load_state_dict(state, strict=strict)
            assert torch.equal(holder.state_dict()[key], before[key])


@pytest.mark.parametrize('strict', [True, False])
def test_points_out_of_range_are_loaded(strict, holder):
    for end in 'kernel.radius', 'kernel.coords':
        for number in 0., -1., 5.:
            state, _ = changed(holder.state_dict(), end, lambda v, number=number: torch.full_like(v, number))
            holder.load_state_dict(state, strict=strict)
            assert same(holder.state_dict(), state)


def test_real_dtypes_that_differ_are_converted(model):
    expected = model.state_dict()
    for dtype in torch.float64, torch.float32:
        # A counter averaged by timm's avg_checkpoints.py is a float.
        model.load_state_dict(checkpoint_filter_fn({k: v.to(dtype) for k, v in expected.items()}, model))
        assert same(model.state_dict(), expected)
    state = {k: v.int() if 'num_batches' in k else v.bfloat16() for k, v in expected.items()}
    model.load_state_dict(checkpoint_filter_fn(state, model))
    assert same(model.state_dict(), {k: v.bfloat16().to(v.dtype) for k, v in expected.items()})


def test_a_model_without_values_takes_a_state_dict(model):
    empty = small_model(device='meta', shake=False)
    empty.load_state_dict(empty.state_dict())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert same(empty.state_dict(), model.state_dict())


def test_merged_and_unmerged_checkpoints_are_not_mixed_up(tmp_path, model):
    merged = reparameterize_model(model)
    unmerged_file, merged_file = tmp_path / 'unmerged.pth', tmp_path / 'merged.pth'
    torch.save(model.state_dict(), unmerged_file)
    torch.save(merged.state_dict(), merged_file)
    into_unmerged = 'state_dict is merged but the model is not: create the model with inference_mode=True'
    into_merged = 'state_dict is not merged but the model is: load it into a model created without inference_mode'
    for num_classes in (10, 4):
        with pytest.raises(CheckpointError, match=into_unmerged):
            load_small(dict(file=str(merged_file)), num_classes=num_classes)
        with pytest.raises(CheckpointError, match=into_merged):
            load_small(dict(file=str(unmerged_file)), num_classes=num_classes, inference_mode=True)


def test_one_load_of_a_checkpoint_checks_and_renames_it_once(file, monkeypatch):
    renamed, states = [], []
    rename, state_dict = checkpoint._rename, torch.nn.Module.state_dict
    monkeypatch.setattr(checkpoint, '_rename', lambda key: renamed.append(key) or rename(key))
    monkeypatch.setattr(
        torch.nn.Module, 'state_dict', lambda module, *args, **kwargs: (
            states.append(module) if not kwargs else None, state_dict(module, *args, **kwargs))[1])
    model = small_model(shake=False)
    filtered = checkpoint_filter_fn(torch.load(file), model)
    model.load_state_dict(filtered)
    assert len(renamed) == len(filtered) and states == [model]
