"""How accurate each backend is, entry by entry, against float64: zeros, wide ranges, and native's own error."""
from functools import partial

import pytest
import torch
from conftest import CPU_BACKENDS, exact_results, with_gradients

from timm_smpconv import depthwise_conv2d

STAGES = [(56, 31), (28, 29), (14, 27), (7, 13), (56, 5), (14, 5), (7, 5), (14, 47),
          pytest.param(56, 51, marks=pytest.mark.slow)]  # (H = W, K)


def results(x, weight, cotangent, backend=None):
    return with_gradients(partial(depthwise_conv2d, backend=backend), x, weight, cotangent)


def tensors(b, c, h, k):
    """As in a network: the input is behind a ReLU."""
    return torch.randn(b, c, h, h).relu(), torch.randn(c, 1, k, k) / k, torch.randn(b, c, h, h)


@pytest.mark.parametrize('backend', [None, *CPU_BACKENDS])
@pytest.mark.parametrize('b,h,k', [(1, 14, 27), (3, 7, 13), (2, 4, 5), (1, 2, 5), (2, 9, 3), (1, 16, 31)])
def test_a_weight_gradient_of_zeros_is_zero(b, h, k, backend):
    x, weight, cotangent = tensors(b, 6, h, k)
    x[:, 1] = 0  # a dead channel
    x[:, 2, h // 2:] = 0
    x[:, 3] *= torch.rand(h, h) < 0.1
    cotangent[:, 4, :, 1:] = 0
    dw = results(x, weight, cotangent, backend)[2]
    _, _, products = exact_results(x != 0, torch.zeros_like(weight), cotangent != 0)  # how many a tap sums
    assert (products == 0).any()
    assert torch.equal(dw == 0, products == 0)


def test_the_gradient_of_zeros_is_found_among_large_ones():
    """Noise is proportional to the channel's norms, whatever their scale."""
    x, weight, cotangent = tensors(2, 4, 14, 27)
    for scale in (1e-18, 1e-6, 1e15):
        x[:, :, :7] = 0
        dw = results(x * scale, weight, cotangent, 'fft')[2]
        _, _, products = exact_results(x != 0, torch.zeros_like(weight), cotangent != 0)
        assert torch.equal(dw == 0, products == 0)


@pytest.mark.parametrize('h,k', STAGES)
def test_rounding_errors_are_at_most_four_times_those_of_native(h, k):
    """The largest ratio measured is 2.7.

    Adam divides every entry by its own magnitude. So each tap's error is compared with that tap's own magnitude, too:
    corner taps, of one product an image, are the worst with 2e-6. That is a thousandth of the difference between the
    gradients of two batches.
    """
    inputs = tensors(2, 4, h, k)
    wanted, chosen, native = (f(*inputs, *a) for f, a in ((exact_results, ()), (results, ()), (results, ('native',))))
    for w, c, n in zip(wanted, chosen, native):
        ours, theirs = ((t.double() - w).square().mean().sqrt() for t in (c, n))
        assert ours <= 4 * theirs
    tap_errors = (chosen[2].double() - wanted[2]).square().mean((0, 1)).sqrt()
    reached = wanted[2].square().mean((0, 1)).sqrt()
    assert (tap_errors <= 1e-5 * reached).all()


def test_far_from_a_large_pixel_the_chosen_backend_is_exact(fastest):
    fastest('fft')
    x, weight, cotangent = torch.randn(1, 2, 40, 40), torch.randn(2, 1, 7, 7) / 7, torch.randn(1, 2, 40, 40)
    x[:, 0, 2, 2] = 1e6
    cotangent[:, 1, 3, 3] = -1e6
    far = (..., slice(12, None), slice(12, None))
    for actual, expected in list(zip(results(x, weight, cotangent), exact_results(x, weight, cotangent)))[:2]:
        assert (actual - expected)[far].abs().max() < 1e-5 * expected[far].abs().max()
    by_fft = results(x, weight, cotangent, 'fft')[0]
    assert (by_fft - exact_results(x, weight, cotangent)[0])[far].abs().max() > 1e-3  # what the documentation says


def test_large_numbers_stay_finite(fastest):
    fastest('fft')
    x, weight, cotangent = tensors(2, 3, 14, 27)
    for case in ((x / x.max() * 1e38, weight / weight.abs().sum(), cotangent / cotangent.abs().max()),
                 (x / x.max() / 196, weight, cotangent / cotangent.abs().max() * 1e38)):
        for actual, expected in zip(results(*case), exact_results(*case)):
            reach = expected.abs() < 1e38
            assert actual[reach].isfinite().all()
            error = (actual[reach].double() - expected[reach]).abs().max()
            assert error <= 1e-5 * expected.abs().max()


def test_infinity_spoils_only_what_it_reaches(fastest):
    fastest('fft')
    x, weight, cotangent = tensors(2, 3, 14, 5)
    x[0, 1, 3, 3] = torch.inf
    y = results(x, weight, cotangent)[0]
    assert torch.equal(y.isfinite(), exact_results(x, weight, cotangent)[0].isfinite())
