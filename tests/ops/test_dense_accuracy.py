"""Where an FFT over channels is not as good as a direct convolution, and what happens there; against float64."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import difference, shake_norms, wake_weights
from timm.utils import reparameterize_model

from timm_smpconv import causal_conv1d, large_conv2d, use_backend
from timm_smpconv.ops import dense
from timm_smpconv.ops.backends import spectra

LENGTH, CHANNELS = 600, 8


def sequences(batch=3):
    return torch.randn(batch, CHANNELS, LENGTH), torch.randn(CHANNELS, CHANNELS, LENGTH) * 0.02


def direct(x, weight):
    return F.conv1d(F.pad(x.double(), (weight.shape[2] - 1, 0)), weight.double())


@pytest.fixture
def transformed(monkeypatch):
    """How many sequences or images went through an FFT."""
    counts, conv = [], spectra.conv

    def counting(x, *args):
        counts.append(len(x))
        return conv(x, *args)

    monkeypatch.setattr(spectra, 'conv', counting)
    return counts


def largest_seen(x, k):
    """The largest magnitude in all channels that each output sees, (B, C, L), by shifting."""
    loud = x.abs().amax(1, keepdim=True)
    shifted = [F.pad(loud, (d, 0))[..., :x.shape[2]] for d in range(min(k, x.shape[2]))]
    return torch.stack(shifted).amax(0).expand_as(x)


def a_loud_half(ratio):
    x, _ = sequences()
    x[1, :, LENGTH // 2:] *= ratio
    return x


def steps(ratio):
    """Up and down, down alone, with silence, and as loud everywhere."""
    x, _ = sequences(4)
    for row, scales in enumerate(((1, ratio, ratio ** 0.5, ratio), (ratio, ratio, 1, 1), (1, 0, ratio, 0))):
        x[row] *= torch.tensor(scales).repeat_interleave(LENGTH // 4)
    return x


@pytest.mark.parametrize('ratio', [30., 1e3, 1e6])
@pytest.mark.parametrize('make', [a_loud_half, steps])
@pytest.mark.parametrize('taps,groups', [(LENGTH, 1), (LENGTH + 100, 1), (97, 1), (1, 1), (LENGTH, 4), (97, CHANNELS)])
@pytest.mark.parametrize('recorded', [False, True])
def test_errors_are_relative_to_what_an_output_sees(ratio, make, taps, groups, recorded, monkeypatch):
    monkeypatch.setattr(dense, 'choose_over_channels', lambda *args: 'fft')
    x, weight = make(ratio).requires_grad_(recorded), torch.randn(CHANNELS, CHANNELS // groups, taps)
    y = causal_conv1d(x, weight, groups=groups)
    expected = F.conv1d(F.pad(x.double(), (taps - 1, 0)), weight.double(), groups=groups)
    seen = torch.cat([largest_seen(part, taps) for part in x.detach().chunk(groups, 1)], 1)
    error = (y - expected).abs() / weight.norm(dim=(1, 2))[:, None]
    assert (error[seen > 0] / seen[seen > 0]).max() < 1e-5
    if ratio > 30 and make is a_loud_half and taps >= LENGTH and groups == 1:
        assert difference(y[1, :, :300], expected[1, :, :300]) < 3e-6
        by_fft = causal_conv1d(x, weight, backend='fft')
        assert difference(by_fft[1, :, :300], expected[1, :, :300]) > 1e-4  # what this is for


def test_a_network_of_sequences_says_the_same_whatever_comes_later():
    model = wake_weights(shake_norms(timm.create_model('smpconv_tcn_ct', seq_len=LENGTH, dim=CHANNELS, global_pool='')))
    model = reparameterize_model(model.eval())
    x = torch.randn(2, 3, LENGTH)
    expected = copy.deepcopy(model).double()(x.double())[0, :, :300]
    x[0, :, 300:] *= 1e3
    with torch.no_grad():
        assert difference(model(x)[0, :, :300], expected) < 1e-5
        with use_backend('fft'):
            assert difference(model(x)[0, :, :300], expected) > 1e-4


@pytest.mark.parametrize('again', ['fft', 'native'])
def test_gradients_of_outputs_that_are_computed_again(again, monkeypatch):
    x, weight = steps(1e3), sequences()[1]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    names = iter(['fft', *[again] * 6])
    monkeypatch.setattr(dense, '_fastest', lambda x, call: next(names))
    y, expected = causal_conv1d(x, weight), direct(x, weight)
    assert next(names) == again and len(list(names)) < 5  # at least one was taken
    cotangent = torch.randn_like(expected)
    for a, e in zip(
            torch.autograd.grad(y, leaves, cotangent.float()), torch.autograd.grad(expected, leaves, cotangent)):
        assert difference(a, e) < 1e-5


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite_where_a_direct_convolution_takes_too_much_memory(value, monkeypatch):
    monkeypatch.setattr(dense, '_fits', lambda x, weight: False)
    x, weight = sequences()
    expected = direct(x, weight)
    x[0, 2, 400] = value
    y = causal_conv1d(x, weight)
    assert difference(y[..., :400], expected[..., :400]) < 1e-5 and not y[0, :, 400:].isfinite().any()


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_a_value_that_is_not_finite_stays_in_the_samples_that_see_it(value, transformed):
    x, weight = sequences()
    x[0, 2, 400] = value
    y = causal_conv1d(x, weight)
    assert y[0, :, :400].isfinite().all() and not y[0, :, 400:].isfinite().any() and y[1:].isfinite().all()
    assert transformed == [2]
    image, kernel = torch.randn(2, 8, 24, 24), torch.randn(8, 8, 25, 25)
    image[1, 0, 0, 0] = value
    y = large_conv2d(image, kernel)
    assert y[0].isfinite().all() and y[1, :, 13:].isfinite().all() and not y[1, :, :13, :13].isfinite().any()


def test_all_gradients_where_a_batch_is_computed_in_two_ways(transformed):
    x, weight = sequences()
    x[1, 3, 7], bias = 1e4, torch.randn(CHANNELS, requires_grad=True)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias]
    y, expected = causal_conv1d(x, weight, bias), direct(x, weight) + bias.double()[:, None]
    assert transformed == [2]
    cotangent = torch.randn_like(expected)
    for a, e in zip(
            torch.autograd.grad(y, leaves, cotangent.float()), torch.autograd.grad(expected, leaves, cotangent)):
        assert difference(a, e) < 1e-5


def test_ordinary_values_are_all_transformed(transformed):
    x = torch.randn(3, CHANNELS, LENGTH)
    impulses = torch.eye(LENGTH)[:CHANNELS].expand(3, -1, -1)
    for values in x, x.relu(), torch.zeros_like(x), impulses:
        causal_conv1d(values, sequences()[1])
    assert transformed == [3] * 4
