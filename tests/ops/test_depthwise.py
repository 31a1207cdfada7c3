"""The operator against `F.conv2d` in float64 and against the definition in loops, with every backend."""
import copy
import itertools
import logging
import threading
from functools import partial

import pytest
import torch
from conftest import CPU_BACKENDS, LAYOUTS, TOLERANCE, compare, depthwise, difference
from functorch.compile import make_boxed_func
from reference import conv_loop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from timm_smpconv import depthwise_conv2d
from timm_smpconv.ops import BACKENDS, requested_backend, use_backend
from timm_smpconv.ops.autograd.depthwise import conv_op, weight_gradient_op

CASES = [  # (B, C, H, W, K, L)
    (2, 3, 8, 11, 5, 5),
    (1, 1, 1, 1, 3, 3),
    (3, 2, 4, 4, 31, 31),  # K > 2H
    (1, 5, 7, 7, 13, 13),  # K = 2H - 1
    (2, 4, 14, 9, 27, 3),
    (2, 1, 16, 16, 7, 1),
    (1, 3, 1, 64, 51, 51),
    (1, 2, 64, 64, 51, 51),
    (1, 8, 33, 20, 1, 1),
    (2, 16, 28, 28, 29, 29),
]


def tensors(b, c, h, w, kh, kw, dtype=torch.float32, bias=True):
    x = torch.randn(b, c, h, w, dtype=torch.float64)
    weight = torch.randn(c, 1, kh, kw, dtype=torch.float64) / (kh * kw) ** 0.5
    return [t.to(dtype) for t in (x, weight, torch.randn(c, dtype=torch.float64))][:3 if bias else 2]


@pytest.mark.parametrize('backend', [None, *CPU_BACKENDS])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_output_and_gradients(case, backend):
    compare(tensors(*case), partial(depthwise_conv2d, backend=backend), depthwise, TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('bias', [False, True])
def test_dtypes_and_layouts(dtype, layout, bias):
    # The last hangs in oneDNN's bfloat16 convolution in channels_last.
    for case in ((2, 3, 9, 12, 7, 5), (2, 4, 14, 14, 27, 27), (1, 20, 7, 13, 13, 13), (1, 3, 40, 40, 15, 15)):
        inputs = tensors(*case, dtype=dtype, bias=bias)
        inputs[0] = LAYOUTS[layout](inputs[0])
        compare(inputs, depthwise_conv2d, depthwise, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_native(dtype):
    inputs = tensors(2, 4, 28, 28, 27, 27, dtype=dtype)

    def errors(function):
        leaves = [t.detach().requires_grad_() for t in inputs]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        out, expected = function(*leaves), depthwise(*wide)
        cotangent = torch.ones_like(expected)
        pairs = zip((out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))),
                    (expected, *torch.autograd.grad(expected, wide, cotangent)))
        return list(itertools.starmap(difference, pairs))

    for ours, native in zip(errors(depthwise_conv2d), errors(depthwise)):
        assert ours <= 1.5 * native + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize('kh,kw', [(5, 3), (3, 17), (17, 17)])
def test_equals_the_definition(kh, kw, backend):
    inputs = [t.requires_grad_() for t in tensors(2, 3, 6, 9, kh, kw, dtype=torch.float64)]
    with use_backend(backend):
        actual = depthwise_conv2d(*inputs)
    expected = conv_loop(*inputs, padding=(kh // 2, kw // 2))
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(expected)
    for got, want in zip(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)):
        assert difference(got, want) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('backend', [None, *CPU_BACKENDS])
def test_the_memory_format_of_the_input_is_kept(layout, backend):
    x, weight = tensors(2, 4, 8, 8, 7, 7, bias=False)
    x = LAYOUTS[layout](x).requires_grad_()
    if backend is None:
        y = depthwise_conv2d(x, weight)
    else:
        with use_backend(backend):
            y = depthwise_conv2d(x, weight)
    y.backward(LAYOUTS[layout](torch.randn_like(y)))
    for t in (y, x.grad):
        assert t.stride() == x.stride()


@pytest.mark.parametrize('backend', [None, 'fft', 'channels_last'])
def test_gradcheck_twice(backend):
    inputs = [t.requires_grad_() for t in tensors(1, 2, 4, 3, 9, 3, dtype=torch.float64)]
    with use_backend(backend or 'native') if backend else torch.enable_grad():
        assert torch.autograd.gradcheck(depthwise_conv2d, inputs)
        assert torch.autograd.gradgradcheck(depthwise_conv2d, inputs)


def test_empty_batch():
    x, weight, bias = [t.requires_grad_() for t in tensors(0, 3, 5, 6, 3, 3)]
    y = depthwise_conv2d(x, weight, bias)
    assert y.shape == (0, 3, 5, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any() and not bias.grad.any()


def test_no_image_reaches_another():
    for value in (float('nan'), float('inf')):
        for backend in CPU_BACKENDS:
            x, weight = tensors(3, 4, 14, 14, 13, 13, bias=False)
            clean = x.clone()
            x[1] = value
            x.requires_grad_()
            with use_backend(backend):
                y = depthwise_conv2d(x, weight)
                expected = depthwise_conv2d(clean, weight)
            assert torch.equal(y[[0, 2]], expected[[0, 2]]) and not torch.isfinite(y[1]).all()
            cotangent = torch.zeros_like(y)
            cotangent[1] = value
            (grad,) = torch.autograd.grad(y, x, cotangent)
            assert not grad[[0, 2]].any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = [t.requires_grad_() for t in tensors(2, 3, 9, 9, 7, 7)]
    with torch.autocast('cpu', dtype=dtype):
        y = depthwise_conv2d(*inputs)
    assert y.dtype == dtype
    assert difference(y, depthwise(*inputs)) < TOLERANCE[dtype]
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


@pytest.mark.parametrize('backend', CPU_BACKENDS)
def test_another_default_device(backend):
    """As after `torch.set_default_device`."""
    inputs = tensors(2, 4, 24, 20, 17, 15)
    with torch.device('meta'):
        y = depthwise_conv2d(*inputs, backend=backend)
    assert difference(y, depthwise(*(t.double() for t in inputs))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('chosen,kw', [('native', 5), ('channels_last', 15), ('fft', 15)])
def test_torch_func(chosen, kw, fastest):
    fastest(chosen)
    x, weight, bias = tensors(2, 3, 6, 10, 5, kw, dtype=torch.float64)
    many = torch.randn(4, *x.shape, dtype=torch.float64)
    kernels = torch.randn(4, *weight.shape, dtype=torch.float64)
    biases = torch.randn(4, 3, dtype=torch.float64)
    for dims, args in (((0, None, None), (many, weight, bias)), ((None, 0, None), (x, kernels, bias)),
                       ((0, 0, 0), (many, kernels, biases)), ((1, None, 0), (many.movedim(0, 1), weight, biases))):
        actual = torch.vmap(depthwise_conv2d, in_dims=dims)(*args)
        expected = torch.vmap(depthwise, in_dims=dims)(*args)
        assert difference(actual, expected) < 1e-12

    def loss(function):
        return lambda w, image: function(image[None], w).square().sum()

    per_image = [
        torch.vmap(torch.func.grad(loss(f)), in_dims=(None, 0))(weight, x) for f in (depthwise_conv2d, depthwise)]
    assert difference(*per_image) < 1e-12
    hessian = [
        torch.func.jacrev(torch.func.grad(loss(f)))(weight[:, :, :3], x[0]) for f in (depthwise_conv2d, depthwise)]
    assert difference(*hessian) < 1e-12
    tangents = [torch.func.jvp(f, (x, weight), (x, weight))[1] for f in (depthwise_conv2d, depthwise)]
    assert difference(*tangents) < 1e-12


@pytest.mark.parametrize('kw', [3, 5])
def test_batched_gradients(kw):
    """As torch.autograd.functional and is_grads_batched=True compute them, without torch.func."""
    inputs = [t.requires_grad_() for t in tensors(2, 1, 2, 3, 1, kw, dtype=torch.float64)]
    jacobians = [
        torch.autograd.functional.jacobian(f, tuple(inputs), vectorize=True, create_graph=True)
        for f in (depthwise_conv2d, depthwise)]
    hessians = [
        torch.autograd.functional.hessian(lambda w, f=f: f(inputs[0], w).pow(3).sum(), inputs[1], vectorize=True)
        for f in (depthwise_conv2d, depthwise)]
    cotangents = torch.randn(3, 2, 1, 2, 3, dtype=torch.float64)
    grads = [
        torch.autograd.grad(f(*inputs), inputs, cotangents, is_grads_batched=True)
        for f in (depthwise_conv2d, depthwise)]
    for got, want in [*zip(*jacobians), hessians, *zip(*grads)]:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layout,backend', [
    ('contiguous', None), ('channels_last', 'fft'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(LAYOUTS, [None, *CPU_BACKENDS]))])
def test_opcheck(layout, backend):
    x, weight, bias = tensors(2, 3, 6, 7, 9, 9)
    x = LAYOUTS[layout](x).requires_grad_()
    torch.library.opcheck(conv_op, (x, weight.requires_grad_(), bias.requires_grad_(), backend))
    torch.library.opcheck(weight_gradient_op, (torch.randn(2, 3, 6, 7, requires_grad=True), x, 9, 9, backend))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 1, 5, 15))

    def forward(self, x):
        return depthwise_conv2d(x.relu(), self.weight) + 1


def captured(net, x):
    """The names of the functions in the graph that a compiler behind torch.compile gets."""
    names = []

    def compiler(graph, inputs):
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == 'call_function')
        return make_boxed_func(graph.forward)

    torch.compile(net, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(x)
    return names


def test_a_compiled_graph_holds_the_operator(fastest):
    net, x = Net(), torch.randn(2, 3, 9, 9)
    fastest('native')
    assert any('timm_smpconv.depthwise_conv2d' in name for name in captured(net, x))
    torch._dynamo.reset()
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 14):  # see `requested_backend`
        with torch.no_grad(), use_backend('fft'):
            assert any('timm_smpconv.depthwise_conv2d' in name for name in captured(net, x))
    torch._dynamo.reset()
    for name in CPU_BACKENDS:
        fastest(name)
        with torch.no_grad():  # by the native one nothing but standard operators, which a compiler can fuse
            assert any('timm_smpconv' in name for name in captured(net, x)) == (name != 'native')
        torch._dynamo.reset()


@pytest.mark.slow
def test_compile_trains_and_infers():
    net, x = Net(), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(x), net(x)) < 1e-5
    for size in (9, 12, 15):  # the sizes become symbols
        x = torch.randn(2, 3, size, size)
        net.zero_grad()
        compiled.zero_grad()
        net(x).square().sum().backward()
        compiled(x).square().sum().backward()
        assert difference(compiled.weight.grad, net.weight.grad) < 1e-5


def test_graphs_hold_a_standard_convolution():
    net, x = Net(), torch.randn(2, 3, 9, 9)
    dynamic = {'x': {0: torch.export.Dim('b', min=1, max=9)}}
    program = torch.export.export(net, (x,), dynamic_shapes=dynamic)
    programs = [program]
    if tuple(int(p) for p in torch.__version__.split('.')[:2]) >= (2, 15):  # see _exporting
        programs.append(torch.export.export(net, (x,), dynamic_shapes=dynamic, strict=True))
    for p in programs:
        assert [n.target for n in p.graph.nodes if 'conv' in str(n.target)] == [torch.ops.aten.conv2d.default]
    for graph in (program.module(), torch.jit.script(net), torch.jit.trace(net, x), torch.fx.symbolic_trace(net)):
        assert difference(graph(x[:1]), net(x[:1])) < 1e-5


def test_a_requested_backend_computes_the_gradients_too(calls):
    x, weight = tensors(1, 2, 5, 5, 3, 3, bias=False)
    x.requires_grad_()
    for name in ('channels_last', 'fft'):
        with use_backend(name):
            y = depthwise_conv2d(x, weight)
        y.sum().backward()
    with use_backend('fft'):
        depthwise_conv2d(x, weight, backend='contiguous').sum().backward()
    assert calls == [
        (name, part) for name in ('channels_last', 'fft', 'contiguous') for part in ('conv', 'input_gradient')]


def test_use_backend_holds_for_its_own_thread_alone(calls):
    x, weight = tensors(1, 2, 5, 5, 3, 3, bias=False)
    inside, other_inside, outside = threading.Event(), threading.Event(), threading.Event()

    def other():
        inside.wait(60)
        depthwise_conv2d(x, weight, backend='contiguous')  # what it is told, not what the first thread requested
        depthwise_conv2d(x, weight)
        with use_backend('channels_last'):
            other_inside.set()
            outside.wait(60)
            depthwise_conv2d(x, weight)

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend('fft'):
        inside.set()
        other_inside.wait(60)
        depthwise_conv2d(x, weight)
    outside.set()
    thread.join()
    depthwise_conv2d(x, weight)
    names = [name for name, _ in calls]
    assert sorted(names[3:]) == ['channels_last', 'native'] and names[:3] == ['contiguous', 'native', 'fft']
    assert requested_backend() is None


def test_a_backend_that_does_not_exist_is_named():
    x, weight = tensors(1, 2, 5, 5, 3, 3, bias=False)
    names = 'native, contiguous, channels_last, fft, triton'
    with pytest.raises(ValueError, match=f"name must be one of {names}, got 'cudnn'"), use_backend('cudnn'):
        pass
    with pytest.raises(ValueError, match=f"backend must be one of {names}, got 'cudnn'"):
        depthwise_conv2d(x, weight, backend='cudnn')
    with pytest.raises(ValueError, match="'fft' was requested and cannot run: an exported graph"), use_backend('fft'):
        torch.jit.trace(Net(), torch.randn(1, 3, 9, 9))


def test_a_backend_that_cannot_run_says_why(monkeypatch, fastest, caplog):
    x, weight = tensors(1, 2, 9, 9, 17, 17, bias=False)
    fastest('channels_last')
    for name in ('fft', 'channels_last'):
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(unsupported=lambda x: 'it rains'))
    with pytest.raises(ValueError, match="backend 'fft' was requested and cannot run: it rains"), use_backend('fft'):
        depthwise_conv2d(x, weight)
    with caplog.at_level(logging.DEBUG, logger='timm_smpconv.ops.dispatch.choose'):
        assert difference(depthwise_conv2d(x, weight), depthwise(x, weight)) < 1e-5
    assert 'backend channels_last is skipped: it rains' in caplog.text


@pytest.mark.parametrize('change,error,message', [
    (dict(weight=torch.zeros(3, 1, 4, 5)), ValueError, r'weight must have odd KH and KW, got shape \(3, 1, 4, 5\)'),
    (dict(weight=torch.zeros(4, 1, 5, 5)), ValueError, r'weight must be \(C, 1, KH, KW\) with C = 3.*got shape \(4,'),
    (dict(weight=torch.zeros(3, 3, 5, 5)), ValueError, 'weight must be'),
    (dict(weight=torch.zeros(3, 5, 5)), ValueError, 'weight must be'),
    (dict(x=torch.zeros(3, 8, 8)), ValueError, r'x must be \(B, C, H, W\), got shape \(3, 8, 8\)'),
    (dict(bias=torch.zeros(2)), ValueError, r'bias must be \(C,\) = \(3,\), got shape \(2,\)'),
    (dict(weight=torch.zeros(3, 1, 5, 5).double()), TypeError, 'weight must have the dtype of x, torch.float32'),
    (dict(bias=torch.zeros(3).half()), TypeError, 'bias must have the dtype of x'),
    (dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.int64)), TypeError, 'x must be floating point, got torch.int64'),
    (dict(weight=torch.zeros(3, 1, 5, 5, device='meta')), ValueError, 'weight must be on the device of x, cpu'),
])
def test_bad_input_is_named(change, error, message):
    good = dict(x=torch.zeros(1, 3, 8, 8), weight=torch.zeros(3, 1, 5, 5), bias=torch.zeros(3))
    with pytest.raises(error, match=message):
        depthwise_conv2d(**dict(good, **change))


@pytest.mark.parametrize('chosen', CPU_BACKENDS)
@pytest.mark.parametrize('dtype,k', [(torch.float64, 9), (torch.float32, 31)])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_fake_tensors(chosen, dtype, k, layout, fastest):
    """As memory estimators and exporters use them: shapes without values."""
    fastest(chosen)
    with FakeTensorMode(), torch.no_grad():
        x = LAYOUTS[layout](torch.empty(2, 8, 20, 20, dtype=dtype))
        y = depthwise_conv2d(x, torch.empty(8, 1, k, k, dtype=dtype))
    assert y.shape == (2, 8, 20, 20) and y.dtype == dtype and y.stride() == x.stride()
    x, *others = tensors(2, 8, 20, 20, k, k, dtype=dtype)
    inputs = LAYOUTS[layout](x), *others
    graph = make_fx(lambda *args: depthwise_conv2d(*args), tracing_mode='fake')(*inputs)
    assert difference(graph(*inputs), depthwise(*inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize('chosen', CPU_BACKENDS)
@pytest.mark.parametrize('recorded', [False, True])
def test_flops_are_those_of_the_direct_convolution(chosen, recorded, fastest):
    """As PyTorch counts F.conv2d, whatever computes it; the gradients are two more of the same size."""
    fastest(chosen)
    x, weight, bias = (t.requires_grad_(recorded) for t in tensors(2, 4, 20, 18, 15, 9))
    counts = []
    for function in (depthwise, depthwise_conv2d):
        with FlopCounterMode(display=False) as counter:
            y = function(x, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts == [2 * y.numel() * 15 * 9] * 2


@pytest.mark.parametrize('chosen', CPU_BACKENDS)
@pytest.mark.parametrize('recorded,passes', [((0,), 1), ((1,), 1), ((2,), 0), ((0, 1, 2), 2)])
def test_flops_of_gradients(chosen, recorded, passes, fastest):
    """One pass for the input and one for the weight, each of the size of the output's."""
    fastest(chosen)
    inputs = tensors(2, 4, 20, 18, 15, 9)
    for i in recorded:
        inputs[i].requires_grad_()
    y = depthwise_conv2d(*inputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == passes * 2 * y.numel() * 15 * 9


@torch.no_grad()
def test_compiled_for_dynamic_sizes():
    """One graph for all sizes, in which the operator chooses when it runs."""
    counter = CompileCounter()
    weight = torch.randn(8, 1, 31, 31) / 31
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: depthwise_conv2d(x, weight).relu(), backend=counter, dynamic=True, fullgraph=True)
    for batch, size in ((2, 20), (3, 22), (4, 56), (16, 14)):
        x = torch.randn(batch, 8, size, size)
        assert difference(compiled(x), depthwise(x.double(), weight.double()).relu()) < TOLERANCE[torch.float32]
    assert counter.frame_count == 1
