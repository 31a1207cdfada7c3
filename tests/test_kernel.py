"""Rendering against the loop of `reference.kernel_loop`, and the start values against the paper's numbers."""
import copy
import math

import pytest
import torch
from conftest import TOLERANCE, difference
from reference import kernel_loop

from timm_smpconv import SMPKernel, render_kernel

CASES = [  # (G, C, P, size)
    (1, 3, 5, (7, 7)),
    (1, 1, 1, (3, 3)),
    (2, 3, 4, (5, 9)),
    (3, 2, 4, (1, 7)),
    (1, 2, 6, (51, 51)),
    (4, 3, 5, (11,)),
    (2, 1, 3, (182,)),
    (1, 1, 2, (1,)),
]


def points(g, c, p, d, dtype=torch.float64):
    coords = (torch.rand(g, p, d, dtype=dtype) * 2 - 1).requires_grad_()
    radius = (torch.rand(g, p, dtype=dtype) * 0.8 + 0.2).requires_grad_()
    return coords, radius, torch.randn(g, c, p, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('g,c,p,size', CASES)
def test_equals_the_loop_with_every_gradient(g, c, p, size, average):
    inputs = points(g, c, p, len(size))
    actual = render_kernel(*inputs, size, average)
    expected = kernel_loop(*inputs, size, average)
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)):
        assert difference(a, e) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('size', [(5, 7), (9,)])
def test_gradcheck(size, average):
    inputs = points(2, 3, 4, len(size))
    assert torch.autograd.gradcheck(lambda *p: render_kernel(*p, size, average), inputs)


def test_first_coordinate_points_right_and_second_up():
    def where(x, y):
        kernel = render_kernel(torch.tensor([[[x, y]]]), torch.tensor([[0.3]]), torch.ones(1, 1, 1), (3, 5))
        return divmod(kernel.argmax().item(), 5)

    assert where(1., 0.) == (1, 4)  # right
    assert where(0., 1.) == (0, 2)  # up
    assert where(-1., -1.) == (2, 0)  # lower left


def test_in_one_dimension_the_last_entry_is_the_current_sample():
    kernel = render_kernel(torch.tensor([[[1.]]]), torch.tensor([[0.1]]), torch.ones(1, 1, 1), (9,))
    assert kernel.flatten().tolist() == [0.] * 8 + [1.]


def test_average_divides_by_the_points_in_reach():
    coords = torch.tensor([[[0.], [0.], [1.]]])
    kernel = render_kernel(coords, torch.full((1, 3), 0.5), torch.tensor([[[2., 4., 8.]]]), (3,), average=True)
    torch.testing.assert_close(kernel.flatten(), torch.tensor([0., 3., 8.]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_positions_are_not_rounded_in_a_half_precision_model(dtype):
    kernel = SMPKernel(4, (51, 51), 60)
    with torch.no_grad():
        kernel.radius.uniform_(0.05, 0.3)
    expected = kernel_loop(kernel.coords, kernel.radius, kernel.weight.to(dtype).float(), (51, 51))
    for half in (copy.deepcopy(kernel).to(dtype), torch.nn.Sequential(copy.deepcopy(kernel)).to(dtype)[0]):
        assert half.weight.dtype == dtype
        assert half.coords.dtype == half.radius.dtype == torch.float32
        assert torch.equal(half.coords, kernel.coords) and torch.equal(half.radius, kernel.radius)
        assert half().dtype == torch.float32
        assert difference(half(), expected) < TOLERANCE[torch.float32]
    assert SMPKernel(4, (5, 5), 3, dtype=dtype).coords.dtype == torch.float32
    assert copy.deepcopy(kernel).to(torch.float64).coords.dtype == torch.float64


def test_gradients_survive_a_change_of_precision():
    kernel = SMPKernel(4, (5, 5), 3)
    kernel().sum().backward()
    before = kernel.coords.grad.clone()
    kernel.to(torch.bfloat16)
    assert torch.equal(kernel.coords.grad, before)
    assert kernel.weight.grad.dtype == torch.bfloat16
    kernel().sum().backward()
    assert torch.isfinite(kernel.coords.grad).all()


@pytest.mark.parametrize('script', [False, True])
def test_autocast_does_not_touch_rendering(script):
    kernel = SMPKernel(8, (13, 13), 40)
    expected = kernel_loop(kernel.coords, kernel.radius, kernel.weight, (13, 13))
    module = torch.jit.script(kernel) if script else kernel
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = module()
    assert actual.dtype == torch.float32
    assert difference(actual, expected) < TOLERANCE[torch.float32]


def test_start_values():
    kernel = SMPKernel(100, (31, 31), 5000)
    assert torch.equal(kernel.radius, torch.full((1, 5000), 4 / 31))
    assert kernel.coords.abs().max() <= 1
    assert abs(kernel.coords.std().item() - 0.2) < 0.01  # 5 sigma lie within [-1, 1]: the truncation does not show
    assert abs(kernel.coords.mean().item()) < 0.01
    assert abs(kernel.weight.std().item() - 0.02) < 1e-4
    assert SMPKernel(1, (1024,), 30, groups=30).radius[0, 0].item() == pytest.approx(2 / 1024)
    assert SMPKernel(1, (5, 5), 2, radius=0.25).radius[0, 0].item() == 0.25
    assert abs(SMPKernel(1, (5, 5), 5000, coords_std=0.05).coords.std().item() - 0.05) < 0.005


def test_clip_radius_keeps_the_authors_range():
    kernel = SMPKernel(1, (5, 5), 4)
    with torch.no_grad():
        kernel.radius.copy_(torch.tensor([[-1., 1e-4, 0.5, 7.]]))
    kernel.clip_radius_()
    assert kernel.radius.tolist() == [[pytest.approx(1e-3), pytest.approx(1e-3), 0.5, 1.]]


def test_on_the_meta_device_and_back():
    kernel = SMPKernel(4, (7, 7), 6, device='meta')
    assert kernel().shape == (1, 4, 7, 7) and kernel().is_meta
    kernel = kernel.to_empty(device='cpu')
    kernel.reset_parameters()
    assert difference(kernel(), kernel_loop(kernel.coords, kernel.radius, kernel.weight, (7, 7))) < 1e-5


def test_state_dict_holds_the_three_tensors_alone():
    assert {k: tuple(v.shape) for k, v in SMPKernel(4, (7, 5), 6, groups=2).state_dict().items()} == {
        'coords': (2, 6, 2), 'radius': (2, 6), 'weight': (2, 4, 6)}


@pytest.mark.parametrize('arguments,message', [
    (dict(coords=torch.zeros(2, 4)), r'coords must be \(G, P, D\) with D = 2.*got shape \(2, 4\)'),
    (dict(coords=torch.zeros(1, 4, 3)), r'coords must be .* got shape \(1, 4, 3\)'),
    (dict(radius=torch.ones(1, 3)), r'radius must be \(G, P\) = \(1, 4\).*got shape \(1, 3\)'),
    (dict(weight=torch.zeros(1, 3, 5)), r'weight must be .*got shape \(1, 3, 5\)'),
    (dict(radius=torch.tensor([[1., 1., 1., -.5]])), 'radius must be positive everywhere, got a minimum of -0.5'),
    (dict(radius=torch.tensor([[1., 1., 1., math.nan]])), 'radius must be positive everywhere, got a minimum of nan'),
    (dict(size=(0, 3)), r'size must be one or two positive integers.*got \(0, 3\)'),
    (dict(size=(3, 3, 3)), r'size must be .*got \(3, 3, 3\)'),
    (dict(size=3), r'size must be .*got 3'),
])
def test_render_kernel_names_the_bad_argument(arguments, message):
    good = dict(coords=torch.zeros(1, 4, 2), radius=torch.ones(1, 4), weight=torch.zeros(1, 3, 4), size=(3, 3))
    with pytest.raises(ValueError, match=message):
        render_kernel(**dict(good, **arguments))


@pytest.mark.parametrize('arguments,message', [
    (dict(points=0), 'points must be at least 1, got 0'),
    (dict(channels=0), 'channels must be at least 1, got 0'),
    (dict(groups=-1), 'groups must be at least 1, got -1'),
    (dict(radius=0.), 'radius must be positive, got 0.0'),
    (dict(radius=-1.), 'radius must be positive, got -1.0'),
    (dict(coords_std=0.), 'coords_std must be positive, got 0.0'),
])
def test_smp_kernel_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMPKernel(**dict(dict(channels=2, size=(3, 3), points=4), **arguments))
