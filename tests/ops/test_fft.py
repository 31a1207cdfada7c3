"""The FFT backend: its joint gradients, kept transforms, and where it says that it is accurate."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, TOLERANCE, difference, exact_results

from timm_smpconv.ops.backends import fft

CASES = [  # (B, C, H, W, K, L)
    (2, 3, 8, 11, 5, 5),
    (1, 1, 1, 1, 1, 1),
    (3, 2, 7, 13, 13, 25),
    (5, 4, 14, 9, 27, 3),
    (2, 1, 5, 16, 1, 7),
    (1, 8, 33, 20, 21, 31),
    (16, 96, 20, 28, 9, 9),  # in several chunks
]
EPS = TOLERANCE[torch.float32]


def tensors(b, c, h, w, kh, kw, dtype=torch.float32):
    weight = torch.randn(c, 1, kh, kw) / (kh * kw) ** 0.5
    return [t.to(dtype) for t in (torch.randn(b, c, h, w), torch.randn(b, c, h, w), weight)]


@pytest.mark.parametrize('case', CASES, ids=str)
@pytest.mark.parametrize('layouts', [*itertools.product(('contiguous', 'channels_last'), ('contiguous', 'strided'))])
def test_joint_gradients(case, layouts):
    grad, x, weight = tensors(*case)
    grad, x = LAYOUTS[layouts[0]](grad), LAYOUTS[layouts[1]](x)
    before = [t.clone() for t in (grad, x, weight)]
    dx, dw = fft.gradients(grad, x, weight)
    _, exact_dx, exact_dw = exact_results(x, weight, grad)
    assert difference(dx, exact_dx) < 2 * EPS
    assert difference(dw, exact_dw) < 2 * EPS
    assert difference(dx, fft.conv(grad, weight.flip(2, 3))) < EPS
    assert difference(dw, fft.weight_gradient(grad, x, *case[4:])) < EPS
    assert all(map(torch.equal, (grad, x, weight), before))


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_joint_gradients_by_dtype(dtype):
    """That of the input in its dtype; that of the weight, a sum over all images, in float32 at least."""
    grad, x, weight = tensors(3, 4, 12, 17, 9, 13, dtype=dtype)
    dx, dw = fft.gradients(grad, x, weight)
    assert dx.dtype == dtype and dw.dtype == torch.promote_types(dtype, torch.float32)
    _, exact_dx, exact_dw = exact_results(x, weight, grad)
    assert difference(dx, exact_dx) < TOLERANCE[dtype]
    assert difference(dw, exact_dw) < 2 * TOLERANCE[dw.dtype]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_a_kept_transform_serves_every_batch(case, bias):
    b, c, h, w, kh, kw = case
    _, _, weight = tensors(*case)
    kernel = fft.transform(weight, h, w)
    kept, bias = kernel.clone(), torch.randn(c) if bias else None
    for batch, layout in ((b, 'contiguous'), (b, 'channels_last'), (b + 1, 'contiguous')):
        x = LAYOUTS[layout](torch.randn(batch, c, h, w))
        y = fft.conv(x, weight, bias, kernel=kernel)
        assert torch.equal(y, fft.conv(x, weight, bias))
        expected = F.conv2d(
            x.double(), weight.double(), None if bias is None else bias.double(), padding=(kh // 2, kw // 2), groups=c)
        assert difference(y, expected) < EPS
        assert y.is_contiguous(memory_format=torch.channels_last if layout == 'channels_last' else
                               torch.contiguous_format)
    assert torch.equal(kernel, kept)
    # It is what is used: twice the kernel, twice the output.
    assert difference(fft.conv(x, weight, kernel=2 * kernel), 2 * fft.conv(x, weight)) < EPS


def changed(index, value, dtype=torch.float32):
    x = torch.randn(2, 3, 14, 14)
    x[index] = value
    return x.to(dtype)


def peak(value, others=1, dtype=torch.float32):
    """A plane of one large pixel among others of the same magnitude, which is their mean."""
    x = torch.randn(2, 3, 14, 14)
    x[1, 2] = others * torch.randn(14, 14).sign()
    x[1, 2, 3, 4] = value * others
    return x.to(dtype)


def one_value_a_plane():
    x = torch.zeros(2, 3, 14, 14)
    x[:, :, 5, 6] = torch.randn(2, 3)
    return x


# Whether a transform is as accurate as a direct convolution: that is so if no value is lost beside the plane's largest.
INPUTS = {
    'normal': (lambda: torch.randn(2, 3, 14, 14), True),
    'behind a ReLU': (lambda: torch.randn(2, 3, 14, 14).relu(), True),
    'sparse': (lambda: torch.randn(2, 3, 14, 14) * (torch.rand(2, 3, 14, 14) < 0.03), True),
    'small': (lambda: 1e-20 * torch.randn(2, 3, 14, 14), True),
    'zeros': (lambda: torch.zeros(2, 3, 14, 14), True),
    'an empty plane': (lambda: changed((1, 2), 0), True),
    'one value a plane': (one_value_a_plane, True),
    'one value in one plane': (lambda: changed((1, 2), 0) + F.pad(torch.full((1, 1), -3.), (3, 10, 4, 9)).mul(
        torch.arange(6).eq(5).view(2, 3, 1, 1)), True),
    'a peak of 50': (lambda: peak(50), True),
    'a peak of -80': (lambda: peak(-80), False),
    'a small peak': (lambda: peak(80, 1e-10), False),
    'NaN': (lambda: changed((1, 2, 3, 4), torch.nan), False),
    'negative infinity': (lambda: changed((1, 2, 3, 4), -torch.inf), False),
    'all infinite': (lambda: torch.full((2, 3, 14, 14), torch.inf), False),
    'large': (lambda: 1e37 * torch.randn(2, 3, 14, 14), False),
    'float16': (lambda: torch.randn(2, 3, 14, 14).half(), True),
    'bfloat16': (lambda: torch.randn(2, 3, 14, 14).bfloat16(), True),
    'float16, a peak of 50': (lambda: peak(50, dtype=torch.float16), True),
    'float16, a peak of 80': (lambda: peak(80, dtype=torch.float16), False),
    'bfloat16, a peak of 80': (lambda: peak(80, dtype=torch.bfloat16), False),
    'float16, its sums overflow in it': (lambda: torch.full((2, 3, 14, 14), 6e4).half(), True),
    'float64': (lambda: torch.randn(2, 3, 14, 14).double(), True),
    'float64, large': (lambda: 1e37 * torch.randn(2, 3, 14, 14).double(), True),
    'one pixel': (lambda: torch.randn(4, 3, 1, 1), True),
    'two pixels': (lambda: torch.tensor([1., 100.]).view(1, 1, 1, 2).expand(1, 3, 1, 2), False),
}


@pytest.mark.parametrize('name', INPUTS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_where_a_transform_is_accurate(name, layout):
    make, is_accurate = INPUTS[name]
    x = LAYOUTS[layout](make())
    assert fft.is_accurate(x, torch.randn(3, 1, 9, 9).to(x.dtype)) is is_accurate


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_a_kernel_that_is_not_finite_is_not_transformed(value):
    weight = torch.randn(3, 1, 9, 9)
    weight[1, 0, 2, 3] = value
    assert not fft.is_accurate(torch.randn(2, 3, 14, 14), weight)


@pytest.mark.parametrize('name', INPUTS)
def test_accurate_means_no_value_is_lost(name):
    """Each plane's error is relative to what lies beside its peak: for all inputs said to be accurate, it is small."""
    make, is_accurate = INPUTS[name]
    x = make()
    if not is_accurate or x.dtype in (torch.float16, torch.bfloat16):
        return
    x, weight = x + 0., torch.randn(3, 1, 9, 9, dtype=x.dtype) / 9
    y = fft.conv(x, weight)
    expected = F.conv2d(x.double(), weight.double(), padding=4, groups=3)
    planes, errors = x.double().flatten(2), (y - expected).flatten(2).abs().amax(2)
    rest = planes.abs().sort(2)[0][:, :, :-1]
    mean = rest.sum(2) / rest.count_nonzero(2).clamp(min=1)
    beside = torch.where(mean > 0, mean, planes.abs().amax(2))
    assert (errors <= 64 * 10 * torch.finfo(x.dtype).eps * beside).all()
