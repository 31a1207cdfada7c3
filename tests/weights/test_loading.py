"""`load_state_dict` of a model: dtypes, models without values, merged and unmerged checkpoints.

What is loaded into points: tests/layers/test_kernel.py.
"""
import pytest
import torch
from conftest import small_model
from test_checkpoint import load_small, same
from timm.utils import reparameterize_model

from timm_smpconv import CheckpointError
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn


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
