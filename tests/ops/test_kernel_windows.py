"""Long kernels in one dimension, rendered from the samples that each point reaches, against the loop over samples."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, difference
from reference import kernel_loop
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from timm_smpconv import SMPConv1d, SMPKernel, render_kernel
from timm_smpconv.layers.merged import _conv1d as conv1d

SIZE = 301


class LargestTensor(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that an operator makes."""
    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            # Views of one entry, as from expand(), take no memory.
            if isinstance(t, torch.Tensor) and 0 not in t.stride():
                self.entries = max(self.entries, t.numel())
        return out


def points(radii, coords=None, groups=3, channels=4, dtype=torch.float64):
    """Groups of points with these radii, drawn over the kernel unless coords are given."""
    radius = torch.tensor(radii, dtype=dtype).expand(groups, -1).clone()
    place = torch.rand(groups, len(radii), 1, dtype=dtype) * 2 - 1
    if coords is not None:
        place = torch.tensor(coords, dtype=dtype).reshape(1, -1, 1).expand(groups, -1, -1).clone()
    weight = torch.randn(groups, channels, len(radii), dtype=dtype)
    return place.requires_grad_(), radius.requires_grad_(), weight.requires_grad_()


CASES = {
    'all alike': ([0.02] * 6, None),
    'none reaches a sample': ([1e-4] * 4, [0.001, -0.002, 0.5005, 0.9961]),
    'different': ([1e-4, 0.003, 0.01, 0.04, 0.05], None),
    'ends': ([0.02] * 4, [-1, 1, -0.999, 0.9999]),
    'outside': ([0.02, 0.02, 0.05, 0.01], [-1.01, 1.03, -2., 7.]),
    'on one place': ([0.01, 0.02, 0.03], [0.2, 0.2, 0.2]),
}


@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_equals_the_loop_with_every_gradient(case, average):
    radii, coords = CASES[case]
    inputs = points(radii, coords)
    with LargestTensor() as largest:
        actual = render_kernel(*inputs, (SIZE,), average)
    assert largest.entries == actual.numel()
    expected = kernel_loop(*inputs, (SIZE,), average)
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)):
        assert difference(a, e) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_no_sample_is_missed_by_rounding(dtype):
    """Points at every distance from a sample, in kernels as long as one second of speech."""
    size, count = 16_000, 2000
    kernel = SMPKernel(1, (size,), count, groups=1, radius_range=(1e-4, 1.))
    coords = (torch.arange(count, dtype=torch.float64) * 8 + torch.linspace(0, 1, count)) * 2 / (size - 1) - 1
    with torch.no_grad():
        kernel.coords.copy_(coords.reshape(1, -1, 1))
        kernel.radius.fill_(2e-4)
        kernel.weight.fill_(1.)
    kernel = kernel.to(dtype)
    t = torch.linspace(-1, 1, size, dtype=torch.float64)
    basis = (1 - (kernel.coords[0].double() - t).abs() / kernel.radius[0, :, None].double()).clamp(min=0)  # (P, K)
    assert difference(kernel()[0], basis.sum(0, keepdim=True)) < TOLERANCE[dtype]
    assert basis.count_nonzero(1).min() >= 1 and basis.count_nonzero(1).max() == 4


def test_derivatives_of_the_second_order_and_forward_mode():
    inputs = points([0.02, 0.01, 0.03], groups=2, channels=2)
    assert torch.autograd.gradgradcheck(lambda *i: render_kernel(*i, (SIZE,), True), inputs)
    primals, tangents = [i.detach() for i in inputs], [torch.randn_like(i) for i in inputs]
    results = [
        jvp(lambda *i, render=render: render(*i, (SIZE,), True), tuple(primals), tuple(tangents))
        for render in (render_kernel, kernel_loop)]
    for actual, expected in zip(*results):
        assert difference(actual, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('name', ['coords', 'radius', 'weight'])
def test_vmap_over_one_argument(name):
    arguments = dict(zip(('coords', 'radius', 'weight'), (i.detach() for i in points([0.02, 0.04]))))
    stacked = torch.stack([arguments[name], arguments[name] * 0.9])
    actual = vmap(lambda value: render_kernel(**{**arguments, name: value}, size=(SIZE,)))(stacked)
    for a, value in zip(actual, stacked):
        assert difference(a, kernel_loop(**{**arguments, name: value}, size=(SIZE,))) < TOLERANCE[torch.float64]


def test_a_compiled_or_traced_kernel_does_not_depend_on_the_radii_it_was_captured_with():
    kernel = SMPKernel(2, (SIZE,), 3, radius=0.01, radius_range=(1e-4, 1.)).double()
    captured = [torch.compile(kernel, backend='aot_eager', fullgraph=True), torch.jit.trace(kernel, ())]
    for radius in 0.01, 0.5:
        with torch.no_grad():
            kernel.radius.fill_(radius)
        expected = kernel_loop(kernel.coords, kernel.radius, kernel.weight, (SIZE,))
        for program in captured:
            assert difference(program(), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('nearest,expected', [(0.5, 80), (0.99, 7), (1.2, 1), (-0.9, 291), (-1.3, SIZE)])
def test_samples_older_than_all_points_are_cropped(nearest, expected, monkeypatch):
    """Output and every gradient as with the whole kernel."""
    layer = SMPConv1d(2, 3, SIZE, causal=True, points=5, radius=0.02, dtype=torch.float64)
    with torch.no_grad():
        layer.kernel.coords.uniform_(max(nearest, -1), max(nearest, 1))
        layer.kernel.coords[1, 2] = nearest
        layer.kernel.radius[0, 0] = 1e-9  # out of its range
    lengths = []
    monkeypatch.setattr(
        'timm_smpconv.layers.smp_conv._conv1d', lambda x, w, *args: lengths.append(w.shape[2]) or conv1d(x, w, *args))
    x = torch.randn(2, 2, SIZE, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    weight = layer.render()
    whole = F.conv1d(F.pad(x, (SIZE - 1, 0)), weight, layer.bias)
    assert difference(y, whole) < TOLERANCE[torch.float64]
    assert not weight[..., :-lengths[0]].any() and lengths == [expected]
    leaves, cotangent = [x, *layer.parameters()], torch.randn_like(y)
    for a, e in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (y, whole))):
        assert difference(a, e) < 10 * TOLERANCE[torch.float64]


def test_wide_points_are_rendered_too():
    inputs = points([0.02, 1., 0.7])
    assert difference(
        render_kernel(*inputs, (SIZE,), True), kernel_loop(*inputs, (SIZE,), True)) < TOLERANCE[torch.float64]
