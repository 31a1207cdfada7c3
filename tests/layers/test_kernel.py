"""Rendering against the loop of `reference.kernel_loop`, and the initial values against the paper's numbers."""
import copy
import io
import math

import pytest
import torch
import torch.nn as nn
from conftest import TOLERANCE, difference, small_model
from reference import kernel_loop
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from timm_smpconv import RepSMPConv2d, SMPConv2d, SMPKernel, render_kernel
from timm_smpconv.layers.rep_conv import RepSMPConv1d
from timm_smpconv.layers.smp_kernel import live_kernels

OUTSIDE = [-1., 0., -1e-8, 5e-4, 1e-3, 0.4, 1., 1.5, 80.]  # radii around and in the default range
NEAREST = [1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 0.4, 1., 1., 1.]

CASES = [  # (G, C, P, size)
    (1, 3, 5, (7, 7)),
    (1, 1, 1, (3, 3)),
    (2, 3, 4, (5, 9)),
    (3, 2, 4, (1, 7)),
    (1, 2, 6, (31, 29)),
    (4, 3, 5, (11,)),
    (2, 1, 3, (182,)),
    (1, 1, 2, (1,)),
]


def points(g, c, p, d, dtype=torch.float64):
    coords = (torch.rand(g, p, d, dtype=dtype) * 2 - 1).requires_grad_()
    radius = (torch.rand(g, p, dtype=dtype) * 0.8 + 0.2).requires_grad_()
    return coords, radius, torch.randn(g, c, p, dtype=dtype, requires_grad=True)


def kernel_with(radii, size=(7, 7), dtype=torch.float64, **kwargs):
    """A kernel with one point of each radius, each so near a sample that the smallest radius reaches it."""
    kernel = SMPKernel(2, size, len(radii), **kwargs).to(dtype)
    with torch.no_grad():
        kernel.radius.copy_(torch.tensor(radii, dtype=dtype))
        samples = torch.linspace(-1, 1, size[-1], dtype=dtype)
        kernel.coords.copy_(samples[torch.randint(size[-1], kernel.coords.shape)])
        kernel.coords += torch.rand_like(kernel.coords) * 2e-5  # off the kinks
    return kernel


def expected_of(kernel):
    """What `kernel` must render, by the loop, with its radii brought into the range one by one."""
    low, high = kernel.radius_range
    radius = [[min(max(r, low), high) for r in group] for group in kernel.radius.tolist()]
    radius = torch.tensor(radius, dtype=kernel.radius.dtype)
    return kernel_loop(kernel.coords.detach(), radius, kernel.weight.detach(), kernel.size, kernel.average)


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


FORMS = {
    'training': lambda k: k.train(),
    'evaluation': lambda k: k.eval(),
    'copied, then evaluation': lambda k: copy.deepcopy(k.train()).eval(),
    'evaluation behind training': lambda k: (k.train()(), k.eval())[1],
    'TorchScript': torch.jit.script,
    'traced': lambda k: torch.jit.trace(k, ()),
    'exported': lambda k: torch.export.export(k, ()).module(),
    'compiled': lambda k: torch.compile(k, backend='eager', fullgraph=True),
    'an FX graph': torch.fx.symbolic_trace,
}


@pytest.mark.parametrize('form', FORMS)
def test_a_radius_outside_the_range_is_rendered_as_the_nearest_inside(form):
    kernel = kernel_with(OUTSIDE)
    expected = expected_of(kernel)
    assert difference(FORMS[form](kernel)(), expected) < TOLERANCE[torch.float64]
    assert kernel.radius.tolist() == [OUTSIDE]


@pytest.mark.parametrize('kwargs', [dict(), dict(groups=3, average=True), dict(size=(9,), groups=2, average=True)])
def test_rendering_keeps_another_range(kwargs):
    kernel = kernel_with([1e-5, 1e-4, 3e-4, 0.2, 0.25, 0.4], radius_range=(1e-4, 0.25), radius=0.25, **kwargs)
    # A radius of 1e-4 multiplies the rounding errors of positions, 1e-16, by its inverse.
    assert difference(kernel(), expected_of(kernel)) < 1e-11
    kernel = SMPKernel(1, (3, 3), 1, radius_range=(1e-4, 0.25))
    assert kernel.radius.item() == 0.25 and copy.deepcopy(kernel).radius_range == (1e-4, 0.25)


def test_the_gradient_outside_the_range_is_the_one_at_the_nearest_radius():
    kernel = kernel_with(OUTSIDE)
    cotangent = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    actual = torch.autograd.grad(kernel(), (kernel.coords, kernel.radius, kernel.weight), cotangent)
    inputs = [kernel.coords.detach(), torch.tensor([NEAREST], dtype=torch.float64), kernel.weight.detach()]
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(kernel_loop(*inputs, (7, 7)), inputs, cotangent)
    for a, e in zip(actual, expected):
        assert difference(a, e) < 1e-9  # a radius of 1e-3 multiplies rounding errors by its inverse, squared


def test_forward_mode_and_second_derivatives():
    kernel = SMPKernel(2, (5, 7), 3).double()
    params = {n: p.detach() for n, p in kernel.named_parameters()}

    def render(coords, radius, weight):
        return functional_call(kernel, dict(coords=coords, radius=radius, weight=weight), ())

    inputs = tuple(p.clone().requires_grad_() for p in params.values())
    assert torch.autograd.gradcheck(render, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(render, inputs)
    radius = torch.tensor([[2., 0.3, -1.]]).double()  # outside, finite differences do not apply: reverse mode is known
    cotangent = torch.randn(1, 2, 5, 7).double()
    tangents = torch.eye(3).double().reshape(3, 1, 3)

    def along(r):
        return (render(params['coords'], r, params['weight']) * cotangent).sum()

    forward = vmap(lambda t: jvp(along, (radius,), (t,))[1])(tangents)
    backward = grad(along)(radius)
    assert difference(forward, backward[0]) < TOLERANCE[torch.float64]


def layer_with(radii):
    layer = SMPConv2d(2, 2, 7, padding=3, points=len(radii), groups=2).double()
    layer.kernel = kernel_with(radii)
    return layer


def test_an_ensemble_under_vmap():
    layers = [layer_with([r + 0.01 * i for r in OUTSIDE]) for i in range(3)]
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    params, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to('meta')

    def loss(params, buffers):
        y = functional_call(base, (params, buffers), (x,))
        return y.square().sum(), y

    gradients, outputs = vmap(grad(loss, has_aux=True))(params, buffers)
    for i, layer in enumerate(layers):
        y = layer(x)
        y.square().sum().backward()
        assert difference(outputs[i], y) < TOLERANCE[torch.float64]
        for name, param in layer.named_parameters():
            assert difference(gradients[name][i], param.grad) < TOLERANCE[torch.float64]


def test_training_compiles_once():
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    layer = SMPConv2d(3, 3, 5, padding=2, points=4, groups=3)
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert len(graphs) == 1


@pytest.mark.parametrize('dtype', [
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_positions_are_not_rounded_in_a_low_precision_model(dtype):
    kernel = SMPKernel(4, (51,), 60)
    with torch.no_grad():
        kernel.radius.uniform_(0.05, 0.3)
    expected = kernel_loop(kernel.coords, kernel.radius, kernel.weight.to(dtype).float(), (51,))
    for half in (copy.deepcopy(kernel).to(dtype), nn.Sequential(copy.deepcopy(kernel)).to(dtype)[0]):
        assert half.weight.dtype == dtype
        assert half.coords.dtype == half.radius.dtype == torch.float32
        assert torch.equal(half.coords, kernel.coords) and torch.equal(half.radius, kernel.radius)
        assert half().dtype == torch.float32
        assert difference(half(), expected) < TOLERANCE[torch.float32]
    assert copy.deepcopy(kernel).to(torch.float64).coords.dtype == torch.float64
    assert copy.deepcopy(kernel).double().to(dtype).coords.dtype == torch.float32
    assert copy.deepcopy(kernel).to('meta', dtype).coords.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_kernel_built_in_half_precision(dtype):
    kernel = SMPKernel(4, (5, 5), 3, dtype=dtype)
    assert kernel.coords.dtype == kernel.radius.dtype == torch.float32 and kernel.weight.dtype == dtype


@pytest.fixture(params=[False, True])
def swap(request):
    """Whether PyTorch swaps whole parameters in `Module.to`, or sets their data."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_gradients_survive_a_change_of_precision(swap):
    kernel = SMPKernel(4, (5, 5), 3)
    kernel().sum().backward()
    before = kernel.coords.grad.clone()
    kernel.to(torch.bfloat16)
    assert torch.equal(kernel.coords.grad, before)
    assert kernel.coords.dtype == torch.float32 and kernel.weight.dtype == torch.bfloat16
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


def test_initial_values():
    kernel = SMPKernel(100, (31, 31), 5000)
    assert torch.equal(kernel.radius, torch.full((1, 5000), 4 / 31))
    assert kernel.coords.abs().max() <= 1
    assert abs(kernel.coords.std().item() - 0.2) < 0.01  # 5 sigma lie within [-1, 1]: the truncation does not show
    assert abs(kernel.coords.mean().item()) < 0.01
    assert abs(kernel.weight.std().item() - 0.02) < 1e-4
    assert SMPKernel(1, (1024,), 30, groups=30).radius[0, 0].item() == pytest.approx(2 / 1024)
    assert SMPKernel(1, (16000,), 3).radius[0, 0].item() == pytest.approx(1e-3)  # 2 / 16000 is out of range
    assert SMPKernel(1, (16000,), 3, radius_range=(1e-4, 1)).radius[0, 0].item() == pytest.approx(2 / 16000)
    assert SMPKernel(1, (5, 5), 2, radius=0.25).radius[0, 0].item() == 0.25
    assert abs(SMPKernel(1, (5, 5), 5000, coords_std=0.05).coords.std().item() - 0.05) < 0.005


def test_on_the_meta_device_and_back():
    kernel = SMPKernel(4, (7, 7), 6, device='meta')
    assert kernel().shape == (1, 4, 7, 7) and kernel().is_meta
    kernel = kernel.to_empty(device='cpu')
    kernel.reset_parameters()
    assert difference(kernel(), kernel_loop(kernel.coords, kernel.radius, kernel.weight, (7, 7))) < 1e-5


def test_state_dict_holds_the_three_tensors_alone():
    assert {k: tuple(v.shape) for k, v in SMPKernel(4, (7, 5), 6, groups=2).state_dict().items()} == {
        'coords': (2, 6, 2), 'radius': (2, 6), 'weight': (2, 4, 6)}


class Larger(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), RepSMPConv2d(2, 7, points=9))
        self.norm = nn.BatchNorm2d(2)


HOLDERS = {
    'a kernel': lambda: SMPKernel(2, (7, 7), 9),
    'a layer': lambda: SMPConv2d(2, 2, 7, points=9, groups=2),
    'a layer of sequences': lambda: RepSMPConv1d(4, 4, 7),
    'Sequential': lambda: nn.Sequential(nn.Conv2d(2, 2, 1), SMPConv2d(2, 2, 7, points=9, groups=2)),
    'DataParallel': lambda: nn.DataParallel(SMPConv2d(2, 2, 7, points=9, groups=2)),
    'compiled': lambda: torch.compile(SMPConv2d(2, 2, 7, points=9, groups=2), backend='eager'),
    'a larger model': Larger,
    'a network': small_model,
    'features_only': lambda: small_model(features_only=True, out_indices=(0, 1)),
}


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('name', ['coords', 'radius'])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('holder', HOLDERS)
def test_loading_refuses_points_that_are_not_finite(holder, value, name, assign):
    module = HOLDERS[holder]()
    kernel = next(m for m in module.modules() if isinstance(m, SMPKernel))
    before = copy.deepcopy(dict(kernel.named_parameters()))
    state_dict = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    key = next(k for k in state_dict if k.endswith(name))
    state_dict[key].view(-1)[3] = value
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f'{key} must be finite everywhere, got {value}'):
            module.load_state_dict(state_dict, strict=strict, assign=assign)
        for n, param in kernel.named_parameters():
            assert torch.equal(param, before[n]), n


@pytest.mark.parametrize('holder', HOLDERS)
def test_loading_takes_radii_outside_the_range(holder):
    module = HOLDERS[holder]()
    kernel = next(m for m in module.modules() if isinstance(m, SMPKernel))
    state_dict = module.state_dict()
    key = next(k for k in state_dict if k.endswith('radius'))
    radii = torch.linspace(-2, 2, kernel.radius.numel()).view_as(kernel.radius)
    state_dict[key] = radii
    module.load_state_dict(state_dict)
    assert torch.equal(kernel.radius, radii)
    assert difference(kernel(), expected_of(kernel)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('arguments,message', [
    (dict(coords=torch.zeros(2, 4)), r'coords must be \(G, P, D\) with D = 2.*got shape \(2, 4\)'),
    (dict(radius=torch.ones(1, 3)), r'radius must be \(G, P\) = \(1, 4\).*got shape \(1, 3\)'),
    (dict(weight=torch.zeros(1, 3, 5)), r'weight must be .*got shape \(1, 3, 5\)'),
    (dict(radius=torch.tensor([[1., 1., 1., -.5]])), 'radius must be positive everywhere, got a minimum of -0.5'),
    (dict(size=(0, 3)), r'size must be one or two positive integers.*got \(0, 3\)'),
    (dict(size=(3, 3, 3)), r'size must be .*got \(3, 3, 3\)'),
    (dict(size=3), r'size must be .*got 3'),
    (dict(size=(5.5, 3)), r'size must be one or two positive integers.*got \(5.5, 3\)'),
    (dict(coords=torch.zeros(1, 4, 2, dtype=torch.int64)), 'coords must be floating-point, got torch.int64'),
    (dict(radius=torch.ones(1, 4, dtype=torch.int32)), 'radius must be floating-point, got torch.int32'),
    (dict(weight=torch.zeros(1, 3, 4, dtype=torch.complex64)), 'weight must be floating-point, got torch.complex64'),
])
def test_render_kernel_names_the_bad_argument(arguments, message):
    good = dict(coords=torch.zeros(1, 4, 2), radius=torch.ones(1, 4), weight=torch.zeros(1, 3, 4), size=(3, 3))
    with pytest.raises(ValueError, match=message):
        render_kernel(**dict(good, **arguments))


@pytest.mark.parametrize('arguments,message', [
    (dict(points=0), 'points must be at least 1, got 0'),
    (dict(channels=0), 'channels must be at least 1, got 0'),
    (dict(groups=-1), 'groups must be at least 1, got -1'),
    (dict(radius=0.), r'radius must be in radius_range \(0.001, 1.0\), got 0.0'),
    (dict(radius=math.nan), r'radius must be in radius_range \(0.001, 1.0\), got nan'),
    (dict(radius=0.3, radius_range=(0.4, 1.)), r'radius must be in radius_range \(0.4, 1.0\), got 0.3'),
    (dict(radius_range=(0., 1.)), r'radius_range must be two finite numbers, 0 < low <= high, got \(0.0, 1.0\)'),
    (dict(radius_range=(1., 0.1)), r'radius_range must be .*got \(1.0, 0.1\)'),
    (dict(radius_range=(math.nan, 1.)), r'radius_range must be .*got \(nan, 1.0\)'),
    (dict(coords_std=0.), 'coords_std must be positive and finite, got 0.0'),
    (dict(coords_std=math.nan), 'coords_std must be positive and finite, got nan'),
    (dict(size=(3.5, 3)), r'size must be .*got \(3.5, 3\)'),
])
def test_smp_kernel_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMPKernel(**dict(dict(channels=2, size=(3, 3), points=4), **arguments))


@pytest.mark.parametrize('name', ['coords', 'radius'])
@pytest.mark.parametrize('change', [torch.Tensor.char, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.to_sparse])
def test_loading_refuses_what_it_would_have_to_cast(name, change):
    layer = torch.nn.Sequential(SMPKernel(2, (5, 5), 3))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state[f'0.{name}'] = change(state[f'0.{name}'])
    with pytest.raises(RuntimeError, match=rf'0\.{name} must be a dense floating-point tensor, got torch\.'):
        layer.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_kernels_are_listed_when_copied_and_no_longer_when_dropped():
    kernel = SMPKernel(1, (3, 3), 1)
    buffer = io.BytesIO()
    torch.save(kernel, buffer)
    buffer.seek(0)
    copies = [copy.copy(kernel), copy.deepcopy(kernel), torch.load(buffer, weights_only=False)]
    assert {id(k) for k in (kernel, *copies)} <= {id(k) for k in live_kernels()}
    count = len(live_kernels())
    del copies
    assert len(live_kernels()) == count - 3
