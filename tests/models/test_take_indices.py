"""`feature_take_indices` against slicing, in Python and in TorchScript."""
import pytest
import torch

from timm_smpconv.models._base import feature_take_indices


@pytest.mark.parametrize('compiled', [lambda f: f, torch.jit.script], ids=['eager', 'script'])
def test_take_indices_against_slicing(compiled):
    take, every = compiled(feature_take_indices), list(range(4))
    assert take(4, None) == (every, 3)
    for last in (1, 3, 4):
        assert take(4, last) == (every[-last:], 3)
    for indices in ([0, 2], [-1], [3, 1], [-4, 3]):
        assert take(4, indices) == ([every[i] for i in indices], max(every[i] for i in indices))


@pytest.mark.parametrize('indices,message', [
    (0, 'indices must be from 1 to 4, got 0'), (5, 'indices must be from 1 to 4, got 5'),
    ([0, 4], 'indices must be from -4 to 3, got 4'), ([-5], 'indices must be from -4 to 3, got -5'),
    ([], 'indices must name at least one feature, got an empty list')])
def test_bad_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        feature_take_indices(4, indices)
