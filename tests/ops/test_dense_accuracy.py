"""Where an FFT over channels is not as good as a direct convolution, and what happens there; against float64."""
import pytest
import torch
import torch.nn.functional as F
from conftest import difference

from timm_smpconv import SMPConv1d, causal_conv1d, large_conv2d, use_backend
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


@pytest.mark.parametrize('grad', [False, True])
def test_a_large_sample_does_not_disturb_earlier_ones(grad, transformed):
    x, weight = sequences()
    x[1, 0, -1] = 1e6
    y = causal_conv1d(x.requires_grad_(grad), weight)
    expected = direct(x, weight)
    assert transformed == [2]
    assert difference(y[..., :-1], expected[..., :-1]) < 1e-6
    assert difference(y[..., -1:], expected[..., -1:]) < 1e-6


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


@pytest.mark.parametrize('front,behind', [(500, 0), (0, 500), (250, 250), (600, 0)])
def test_gradients_of_taps_that_meet_zeros_alone_are_zero(front, behind):
    x, weight = sequences(4)
    x[..., :front] = 0
    if behind:
        x[..., -behind:] = 0
    x[:, 3] = 0
    grad = torch.randn_like(x)
    grad[..., :-150] = 0
    weight.requires_grad_()
    actual = torch.autograd.grad(causal_conv1d(x, weight, backend='fft'), weight, grad)[0]
    expected = torch.autograd.grad(direct(x, weight), weight, grad.double())[0]
    assert (expected == 0).sum() > expected.numel() / 10
    assert torch.equal(actual == 0, expected == 0)
    assert difference(actual, expected) < 1e-5 or not expected.any()


def test_gradients_of_taps_that_meet_zeros_alone_are_zero_in_two_dimensions():
    x, grad = torch.zeros(2, 8, 24, 20), torch.zeros(2, 8, 24, 20)
    x[:, :, 3:9, 11:] = torch.randn(2, 8, 6, 9)
    grad[:, :, 15:, :5] = torch.randn(2, 8, 9, 5)
    weight = torch.randn(8, 8, 25, 21, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(large_conv2d(x, weight, backend=name), weight, grad)[0] for name in ('fft', 'native'))
    assert torch.equal(actual == 0, expected == 0) and (expected == 0).any()
    assert difference(actual, expected) < 1e-5


def test_points_out_of_what_a_sequence_shows_do_not_move():
    x = torch.zeros(4, 4, LENGTH)
    x[..., -100:] = torch.randn(4, 4, 100)
    layer = SMPConv1d(4, 4, LENGTH, causal=True, bias=False)
    with torch.no_grad():
        layer.kernel.coords.uniform_(-1, 1)
    with use_backend('fft'):
        layer(x)[..., -1].sum().backward()
    oldest = layer.kernel.coords[..., 0] < 1 - 2 * 110 / LENGTH  # what they weigh is older than all samples shown
    assert oldest.any() and not layer.kernel.weight.grad.movedim(1, 2)[oldest].any()
    assert layer.kernel.weight.grad.movedim(1, 2)[~oldest].any()
