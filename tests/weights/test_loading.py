"""`load_state_dict` of a model, of a layer, and of what holds one: it loads what fits, or nothing."""
import copy

import pytest
import torch
from conftest import small_model
from test_checkpoint import load_small, same, without
from timm.utils import reparameterize_model

from timm_smpconv import CheckpointError, RepSMPConv2d
from timm_smpconv.layers.rep_conv import RepSMPConv1d

BAD_VALUES = {
    'shape': (lambda v: torch.zeros(3, 3), r'\(3, 3\) instead of'),
    'int8': (torch.Tensor.char, 'must have a floating point dtype, got torch.int8'),
    'bool': (torch.Tensor.bool, 'must have a floating point dtype, got torch.bool'),
    'complex': (lambda v: v.cfloat(), 'must have a floating point dtype, got torch.complex64'),
    'quantised': (
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        'must have a floating point dtype, got torch.qint8'),
    'sparse': (torch.Tensor.to_sparse, 'must be a dense tensor, got torch.sparse_coo'),
    'nested': (lambda v: torch.nested.as_nested_tensor([v.flatten(), v.flatten()[:2]]), 'a dense tensor, got nested'),
    'meta': (lambda v: v.to('meta'), 'must hold values, got a tensor on the meta device'),
    'list': (torch.Tensor.tolist, 'must be a tensor, got list'),
}


def spoilt(state, end, change):
    """The state with its last entry of that name changed, and all others unlike those of any model."""
    key = [k for k in state if k.endswith(end)][-1]
    state = {k: v + 1 for k, v in state.items()}
    return dict(state, **{key: change(state[key])}), key


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


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors', 'ignore:torch.quantize_per_tensor')
@pytest.mark.parametrize('kind', BAD_VALUES)
def test_nothing_is_loaded_from_a_state_dict_with_a_bad_value(kind, holder):
    change, message = BAD_VALUES[kind]
    before = copy.deepcopy(holder.state_dict())
    for end in 'kernel.weight', 'kernel.radius', 'bn.running_var':
        state, key = spoilt(before, end, change)
        for strict in True, False:
            with pytest.raises(CheckpointError, match=message) as caught:
                holder.load_state_dict(state, strict=strict)
            assert key in str(caught.value)
            assert same(holder.state_dict(), before)


@pytest.mark.parametrize('strict', [True, False])
def test_points_that_are_not_finite_are_never_loaded(strict, holder):
    before = copy.deepcopy(holder.state_dict())
    for end in 'kernel.radius', 'kernel.coords':
        for number in float('nan'), float('inf'), -float('inf'):
            state, _ = spoilt(before, end, lambda v, number=number: torch.where(v == v.flatten()[-1], number, v))
            with pytest.raises(CheckpointError, match='must be finite everywhere, got'):
                holder.load_state_dict(state, strict=strict)
            assert same(holder.state_dict(), before)


@pytest.mark.parametrize('strict', [True, False])
def test_points_out_of_range_are_loaded(strict, holder):
    for end in 'kernel.radius', 'kernel.coords':
        for number in 0., -1., 5.:
            state, _ = spoilt(holder.state_dict(), end, lambda v, number=number: torch.full_like(v, number))
            holder.load_state_dict(state, strict=strict)
            assert same(holder.state_dict(), state)


@pytest.mark.parametrize('change', [
    lambda sd, key: without(sd, key), lambda sd, key: dict(sd, extra=sd[key]),
    lambda sd, key: dict(without(sd, key), **{key.upper(): sd[key]})])
def test_nothing_is_loaded_strictly_if_a_key_is_missing_or_unexpected(change, model):
    for holder in model, small_model(features_only=True), RepSMPConv2d(4, 7), RepSMPConv1d(4, 4, 7):
        before = copy.deepcopy(holder.state_dict())
        state, key = spoilt(before, 'kernel.weight', torch.clone)
        with pytest.raises(CheckpointError, match=f'exactly the keys of the model, got .*({key}|extra)'):
            holder.load_state_dict(change(state, key))
        assert same(holder.state_dict(), before)


def test_real_dtypes_that_differ_are_converted(model):
    expected = model.state_dict()
    for dtype in torch.float64, torch.float32:
        # A counter averaged by timm's avg_checkpoints.py is a float.
        model.load_state_dict({k: v.to(dtype) for k, v in expected.items()})
        assert same(model.state_dict(), expected)
    model.load_state_dict({k: v.int() if 'num_batches' in k else v.bfloat16() for k, v in expected.items()})
    assert same(model.state_dict(), {k: v.bfloat16().to(v.dtype) for k, v in expected.items()})
    for wrong in torch.bool, torch.complex64:
        state, key = spoilt(expected, 'num_batches_tracked', lambda v, wrong=wrong: v.to(wrong))
        with pytest.raises(CheckpointError, match=f'{key} must have an integer or floating point dtype, got {wrong}'):
            model.load_state_dict(state)


def test_a_model_without_values_takes_a_state_dict(model):
    empty = small_model(device='meta', shake=False)
    empty.load_state_dict(empty.state_dict())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert same(empty.state_dict(), model.state_dict())


def test_strict_false_loads_what_is_there(model):
    result = model.load_state_dict({'head.fc.bias': torch.ones(10), 'other': torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ['other'] and 'stem.0.conv.weight' in result.missing_keys
    assert model.head.fc.bias.tolist() == [1.] * 10


def test_the_authors_layout_without_the_filter_says_what_to_do(authors, model):
    with pytest.raises(CheckpointError, match='layout of the authors: load it through checkpoint_filter_fn'):
        model.load_state_dict(authors)


def test_merged_and_unmerged_checkpoints_are_not_mixed_up(tmp_path, model):
    merged = reparameterize_model(model)
    unmerged_file, merged_file = tmp_path / 'unmerged.pth', tmp_path / 'merged.pth'
    torch.save(model.state_dict(), unmerged_file)
    torch.save(merged.state_dict(), merged_file)
    into_unmerged = 'state_dict is merged but the model is not: create the model with inference_mode=True'
    into_merged = 'state_dict is not merged but the model is: load it into a model created without inference_mode'
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=into_unmerged):
            model.load_state_dict(merged.state_dict(), strict=strict)
        with pytest.raises(CheckpointError, match=into_merged):
            merged.load_state_dict(model.state_dict(), strict=strict)
    for within in torch.nn.Sequential(model), torch.nn.Sequential(*model.stages):  # parts of something larger
        state = torch.nn.Sequential(merged if len(within) == 1 else torch.nn.Sequential(*merged.stages)).state_dict()
        state = state if len(within) == 1 else {k.removeprefix('0.'): v for k, v in state.items()}
        before = copy.deepcopy(within.state_dict())
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=into_unmerged):
                within.load_state_dict(state, strict=strict)
            assert len(within) > 1 or same(within.state_dict(), before)
    for num_classes in (10, 4):
        with pytest.raises(CheckpointError, match=into_unmerged):
            load_small(dict(file=str(merged_file)), num_classes=num_classes)
        with pytest.raises(CheckpointError, match=into_merged):
            load_small(dict(file=str(unmerged_file)), num_classes=num_classes, inference_mode=True)
