"""`causal_conv1d` and `large_conv2d` against `F.conv1d` and `F.conv2d` in float64 and the definition in loops."""
import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, TOLERANCE, compare, difference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from timm_smpconv.ops import Kept, causal_conv1d, large_conv2d, use_backend
from timm_smpconv.ops.autograd.dense import conv_op, weight_gradient_op
from timm_smpconv.ops.backends import spectra
from timm_smpconv.ops.dispatch.choose import choose_over_channels

SEQUENCES = [  # (B, I, O, L, K, groups)
    (2, 3, 4, 20, 20, 1),
    (5, 3, 2, 16, 16, 1),  # more sequences than kernels: the other order of loops
    (1, 1, 1, 1, 1, 1),
    (2, 2, 3, 1, 9, 1),
    (3, 2, 4, 7, 30, 2),  # K > L
    (2, 4, 4, 31, 8, 4),
    (2, 6, 3, 19, 5, 3),
    (1, 3, 2, 40, 1, 1),
]
IMAGES = [  # (B, I, O, H, W, K, L)
    (2, 3, 4, 8, 11, 5, 5),
    (5, 2, 3, 6, 6, 7, 7),
    (1, 1, 1, 1, 1, 3, 3),
    (2, 2, 3, 4, 5, 31, 9),  # K > 2H
    (1, 3, 2, 9, 6, 1, 11),
    (2, 3, 2, 12, 7, 1, 1),
]
BACKENDS = {'causal': [None, 'native', 'fft'], 'same': [None, 'native', 'contiguous', 'channels_last', 'fft']}


def tensors(family, case, dtype=torch.float64, bias=True):
    """x, weight and bias."""
    if family == 'causal':
        b, i, o, length, k, groups = case
        shapes = (b, i, length), (o, i // groups, k)
    else:
        b, i, o, h, w, kh, kw = case
        shapes = (b, i, h, w), (o, i, kh, kw)
    x, weight = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    weight /= weight[0].numel() ** 0.5
    return [t.to(dtype) for t in (x, weight, torch.randn(o, dtype=torch.float64))][:3 if bias else 2]


def exact(x, weight, bias=None, groups=1):
    if x.ndim == 3:
        return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=groups)
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def ours(family, case, backend=None):
    return partial(causal_conv1d, groups=case[-1], backend=backend) if family == 'causal' else partial(
        large_conv2d, backend=backend)


def reference(family, case):
    return partial(exact, groups=case[-1]) if family == 'causal' else exact


CASES = [*(('causal', case) for case in SEQUENCES), *(('same', case) for case in IMAGES)]
SMALL = [('causal', (2, 2, 4, 5, 7, 2)), ('causal', (3, 2, 2, 4, 3, 1)), ('same', (1, 2, 3, 4, 3, 5, 3))]


@pytest.mark.parametrize('family,case', CASES, ids=str)
def test_output_and_gradients(family, case):
    for backend in BACKENDS[family]:
        for dtype, bias in ((torch.float64, True), (torch.float32, False)):
            compare(
                tensors(family, case, dtype, bias), ours(family, case, backend), reference(family, case),
                TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('family,case', SMALL, ids=str)
def test_half_precision(family, case, dtype):
    for backend in BACKENDS[family]:
        inputs = tensors(family, case, dtype)
        compare(inputs, ours(family, case, backend), reference(family, case), TOLERANCE[dtype])
        y = ours(family, case, backend)(*inputs[:2])
        wide = reference(family, case)(*[t.double() for t in inputs[:2]])
        assert difference(y, wide.to(dtype)) < 1.01 * torch.finfo(dtype).eps  # rounded once, in the end


@pytest.mark.parametrize('backend', ['native', 'fft'])
def test_equals_the_definition(backend):
    x, weight, bias = tensors('causal', (2, 3, 4, 6, 9, 1))
    expected = bias[:, None].expand(2, 4, 6).clone()
    for n in range(6):
        for k in range(9):
            if n + k >= 8:  # 8 zeros in front
                expected[:, :, n] += x[:, :, n + k - 8] @ weight[:, :, k].T
    assert difference(causal_conv1d(x, weight, bias, backend=backend), expected) < 1e-12
    x, weight, bias = tensors('same', (2, 3, 4, 4, 5, 3, 7))
    padded = F.pad(x, (3, 3, 1, 1))
    expected = bias[:, None, None].expand(2, 4, 4, 5).clone()
    for i in range(4):
        for j in range(5):
            expected[:, :, i, j] += torch.einsum('bikl,oikl->bo', padded[:, :, i:i + 3, j:j + 7], weight)
    assert difference(large_conv2d(x, weight, bias, backend), expected) < 1e-12


def test_the_pieces_of_a_long_computation(monkeypatch):
    """Batch and channels in several pieces, of which the last is smaller."""
    monkeypatch.setattr(spectra, '_PIECE', 200)
    for family, case in (('causal', (7, 3, 5, 20, 20, 1)), ('causal', (3, 5, 7, 20, 20, 1)),
                         ('same', (7, 2, 3, 6, 6, 7, 7)), ('same', (2, 3, 5, 6, 6, 7, 7))):
        compare(tensors(family, case), ours(family, case, 'fft'), reference(family, case), 1e-12)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('backend', BACKENDS['same'])
def test_layouts(layout, backend):
    x, weight, bias = tensors('same', (2, 3, 4, 8, 8, 5, 5))
    x = LAYOUTS[layout](x)
    compare((x, weight, bias), partial(large_conv2d, backend=backend), exact, 1e-12)
    if layout in ('contiguous', 'channels_last'):
        y = large_conv2d(x, weight, bias, backend)
        expected = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
        assert y.is_contiguous(memory_format=expected)


@pytest.mark.parametrize('backend', ['native', 'fft'])
def test_sequences_that_are_not_contiguous(backend):
    x, weight, bias = tensors('causal', (2, 4, 3, 9, 9, 1))
    x, weight = x.transpose(1, 2).contiguous().transpose(1, 2), weight.flip(0)[:, :, ::2]
    compare((x, weight, bias), partial(causal_conv1d, backend=backend), exact, 1e-12)


@pytest.mark.parametrize('backend', [None, 'native', 'fft'])
def test_an_empty_batch(backend):
    for family, case in (('causal', (0, 3, 4, 5, 5, 1)), ('same', (0, 3, 4, 5, 6, 3, 3))):
        leaves = [t.requires_grad_() for t in tensors(family, case)]
        y = ours(family, case, backend)(*leaves)
        assert y.shape == reference(family, case)(*leaves).shape
        y.sum().backward()
        assert leaves[0].grad.shape == leaves[0].shape and not leaves[1].grad.any() and not leaves[2].grad.any()


@pytest.mark.parametrize('family,case', [
    ('causal', (1, 2, 2, 2, 3, 2)), ('same', (1, 1, 2, 2, 1, 3, 1))], ids=str)
def test_gradcheck_twice(family, case):
    inputs = [t.requires_grad_() for t in tensors(family, case)]
    function = ours(family, case, 'fft')
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('needs', [(True, False), (False, True)])
def test_one_gradient_alone(needs):
    for family, case in SMALL:
        inputs = [t.requires_grad_(n) for t, n in zip(tensors(family, case, bias=False), needs)]
        leaf = inputs[needs.index(True)]
        y, expected = ours(family, case, 'fft')(*inputs), reference(family, case)(*inputs)
        cotangent = torch.randn_like(expected)
        got, want = (torch.autograd.grad(out, leaf, cotangent)[0] for out in (y, expected))
        assert difference(got, want) < 1e-12


@pytest.mark.parametrize('family,case', SMALL, ids=str)
def test_torch_func(family, case):
    x, weight, bias = tensors(family, case)
    functions = [ours(family, case, 'fft'), reference(family, case)]
    many, kernels = torch.randn(3, *x.shape).double(), torch.randn(3, *weight.shape).double()
    for dims, args in (((0, None, None), (many, weight, bias)), ((None, 0, None), (x, kernels, bias)),
                       ((0, 0, None), (many, kernels, bias)), ((1, None, None), (many.movedim(0, 1), weight, bias))):
        assert difference(*(torch.vmap(f, in_dims=dims)(*args) for f in functions)) < 1e-12

    def loss(function):
        return lambda w, image: function(image[None], w).square().sum()

    per_image = [torch.vmap(torch.func.grad(loss(f)), in_dims=(None, 0))(weight, x) for f in functions]
    assert difference(*per_image) < 1e-12
    hessians = [torch.func.jacrev(torch.func.grad(loss(f)))(weight[..., :1], x[0]) for f in functions]
    assert difference(*hessians) < 1e-12
    tangents = [torch.func.jvp(f, (x, weight), (x.cos(), weight.sin()))[1] for f in functions]
    assert difference(*tangents) < 1e-12


def test_batched_gradients():
    """As is_grads_batched=True computes them, without torch.func."""
    inputs = [t.requires_grad_() for t in tensors('causal', (2, 2, 3, 5, 4, 1), bias=False)]
    cotangents = torch.randn(3, 2, 3, 5, dtype=torch.float64)
    grads = [
        torch.autograd.grad(f(*inputs), inputs, cotangents, is_grads_batched=True)
        for f in (partial(causal_conv1d, backend='fft'), exact)]
    for got, want in zip(*grads):
        assert difference(got, want) < 1e-12


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', ['native', 'fft'])
def test_autocast(dtype, backend):
    for family, case in SMALL:
        inputs = [t.requires_grad_() for t in tensors(family, case, torch.float32)]
        with torch.autocast('cpu', dtype=dtype):
            y = ours(family, case, backend)(*inputs)
        assert y.dtype == dtype
        assert difference(y, reference(family, case)(*inputs)) < TOLERANCE[dtype]
        y.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in inputs)
        with torch.autocast('cpu', dtype=dtype), torch.no_grad():
            assert torch.equal(ours(family, case, backend)(*inputs), y)


@pytest.mark.parametrize('backend', [None, 'fft'])
def test_finite_results_of_large_values(backend):
    """Sums inside a transform would overflow; and the sequence beside a huge one is as exact as alone."""
    for family, case in (('causal', (2, 3, 2, 400, 400, 1)), ('same', (2, 3, 2, 20, 20, 21, 21))):
        x, weight = tensors(family, case, bias=False)
        x[0] *= 1e37 / x[0].abs().max()
        weight /= weight.abs().sum()
        compare((x.float(), weight.float()), ours(family, case, backend), reference(family, case), 1e-5)
        y = ours(family, case, backend)(x.float(), weight.float())
        assert difference(y[1:], reference(family, case)(x, weight)[1:]) < 1e-5
        x, weight = tensors(family, case, bias=False)
        x, weight = x * 1e-20, weight * (1e36 / weight.abs().max())
        compare((x.float(), weight.float()), ours(family, case, backend), reference(family, case), 1e-5)


def test_no_sequence_reaches_another():
    for value in (float('nan'), float('inf')):
        for family, case in (('causal', (3, 2, 4, 9, 9, 1)), ('causal', (5, 2, 2, 9, 9, 1))):
            x, weight = tensors(family, case, bias=False)
            clean = causal_conv1d(x, weight, backend='fft')
            x[1] = value
            y = causal_conv1d(x, weight, backend='fft')
            assert torch.equal(y[2:], clean[2:]) and torch.equal(y[0], clean[0]) and not y[1].isfinite().all()


def test_fake_tensors_and_graphs():
    for family, case in SMALL:
        inputs = tensors(family, case)
        function = ours(family, case, 'fft')
        with FakeTensorMode(), torch.no_grad():
            y = function(*[torch.empty(t.shape, dtype=t.dtype) for t in inputs])
        assert y.shape == function(*inputs).shape and y.dtype == torch.float64
        graph = make_fx(function, tracing_mode='fake')(*inputs)
        assert difference(graph(*inputs), reference(family, case)(*inputs)) < 1e-12
        assert function(*[t.to('meta') for t in inputs]).shape == y.shape


@pytest.mark.parametrize('family,case', [SMALL[0], pytest.param(*SMALL[2], marks=pytest.mark.slow)], ids=str)
def test_opcheck(family, case):
    x, weight = [t.requires_grad_() for t in tensors(family, case, torch.float32, bias=False)]
    before = [k - 1 if family == 'causal' else k // 2 for k in weight.shape[2:]]
    groups = x.shape[1] // weight.shape[1]
    grad = torch.randn(x.shape[0], weight.shape[0], *x.shape[2:], requires_grad=True)
    torch.library.opcheck(conv_op, (x, weight, before, groups, False))
    torch.library.opcheck(conv_op, (grad, weight, before, groups, True))
    torch.library.opcheck(weight_gradient_op, (grad, x, list(weight.shape[2:]), before, groups))


class Net(torch.nn.Module):
    def __init__(self, backend=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 300) / 30)
        self.image_weight = torch.nn.Parameter(torch.randn(4, 3, 17, 17) / 30)
        self.backend = backend
        self.kept = Kept()

    def forward(self, x, image):
        y = causal_conv1d(x.relu(), self.weight, backend=self.backend, kept=self.kept)
        return y + 1, large_conv2d(image, self.image_weight, None, self.backend)


class Scriptable(Net):
    def forward(self, x, image):
        return causal_conv1d(x.relu(), self.weight) + 1, large_conv2d(image, self.image_weight)


def nets_inputs(n=2, length=300, size=16):
    return torch.randn(n, 3, length), torch.randn(n, 3, size, size)


@pytest.mark.slow
def test_compile_trains_and_infers():
    net = Net('fft')
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True)
    with torch.no_grad():
        inputs = nets_inputs()
        for got, want in zip(compiled(*inputs), net(*inputs)):
            assert difference(got, want) < 1e-5
    for length, size in ((300, 16), (200, 12), (250, 20)):  # the sizes become symbols
        inputs = nets_inputs(2, length, size)
        for model in (net, compiled):
            model.zero_grad()
            sum(y.square().sum() for y in model(*inputs)).backward()
        assert difference(compiled.weight.grad, net.weight.grad) < 1e-5
        assert difference(compiled.image_weight.grad, net.image_weight.grad) < 1e-5


@pytest.mark.parametrize('backend', [None, 'fft'])
def test_a_compiled_graph_is_whole(backend):
    net, inputs, names = Net(backend), nets_inputs(), []

    def compiler(graph, _):
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == 'call_function')
        return graph.forward

    for recorded in (True, False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(recorded):
            y = torch.compile(net, backend=compiler, fullgraph=True)(*inputs)
        for got, want in zip(y, net(*inputs)):
            assert difference(got, want) < 1e-5
    torch._dynamo.reset()
    if backend == 'fft':
        assert sum('fft_conv' in name for name in names) == 4


def test_graphs_hold_standard_convolutions():
    net, inputs = Scriptable(), nets_inputs()
    dynamic = {'x': {0: torch.export.Dim('b', min=1, max=9)}, 'image': {0: torch.export.Dim('n', min=1, max=9)}}
    program = torch.export.export(net, inputs, dynamic_shapes=dynamic)
    targets = [n.target for n in program.graph.nodes if n.op == 'call_function']
    aten = torch.ops.aten
    assert targets == [aten.relu.default, aten.pad.default, aten.conv1d.default, aten.add.Tensor, aten.conv2d.default]
    for graph in (program.module(), torch.jit.script(net), torch.jit.trace(net, inputs), torch.fx.symbolic_trace(net)):
        for n in (1, 3):
            some = nets_inputs(n)
            for got, want in zip(graph(*some), net(*some)):
                assert difference(got, want) < 1e-5
    with pytest.raises(ValueError, match="'fft' was requested and cannot run: an exported graph"), use_backend('fft'):
        torch.jit.trace(net, inputs)


@pytest.fixture
def transforms(monkeypatch):
    """The shapes of the kernels that were transformed to be kept, in order."""
    shapes = []
    transform = spectra.transform

    def recording(weight, *args):
        shapes.append(tuple(weight.shape))
        return transform(weight, *args)

    monkeypatch.setattr(spectra, 'transform', recording)
    return shapes


@pytest.mark.parametrize('family,case', [('causal', (1, 3, 4, 40, 40, 1)), ('same', (1, 3, 4, 8, 8, 9, 9))], ids=str)
def test_a_kept_kernel_is_transformed_once(transforms, family, case):
    kept = Kept()
    x, weight, bias = tensors(family, case)

    def check(x, weight, count):
        with torch.no_grad():
            for _ in range(2):
                y = ours(family, case, 'fft')(x, weight, bias, kept=kept)
                assert difference(y, exact(x, weight, bias)) < 1e-12
        assert len(transforms) == count

    check(x, weight, 1)
    check(torch.cat([x, x + 1]), weight, 1)  # another batch
    check(x[..., :5], weight, 2)  # another size
    weight.mul_(2)
    check(x[..., :5], weight, 3)
    weight = weight.clone()
    check(x[..., :5], weight, 4)
    check(x[..., :5], weight.flip(0)[:, :, :3], 5)
    for again in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert again._derived is None and kept._derived is not None


def test_a_kernel_that_can_change_unseen_is_not_kept(transforms):
    x, weight = tensors('causal', (1, 3, 4, 40, 40, 1), bias=False)
    kept = Kept()
    with torch.inference_mode():
        inference = weight.clone()
        causal_conv1d(x, inference, backend='fft', kept=kept)
    leaf = weight.clone().requires_grad_()
    with torch.no_grad():
        causal_conv1d(x, leaf, backend='fft', kept=kept)
    assert kept._derived is None
    y = causal_conv1d(x.requires_grad_(), weight, backend='fft', kept=kept)  # recorded
    assert kept._derived is None and y.requires_grad
    with torch.inference_mode():
        y = causal_conv1d(x, weight, backend='fft', kept=kept)
    assert kept._derived is not None and difference(y, exact(x, weight)) < 1e-12


def test_the_choice():
    """The networks' kernels go by FFT, small ones directly; on other devices where the direct way is hopeless."""
    def prefers(x, weight, before, device='cpu', keeps=False):
        x, weight = torch.empty(x, device=device), torch.empty(weight, device=device)
        return choose_over_channels(x, weight, before, 1, keeps) == 'fft'

    for device in ('cpu', 'meta'):
        assert prefers((64, 30, 16000), (30, 30, 16000), [15999], device)
        assert prefers((64, 48, 32, 32), (48, 48, 33, 33), [16, 16], device)
        assert not prefers((64, 30, 784), (30, 30, 5), [4], device)
        assert not prefers((64, 48, 32, 32), (48, 48, 3, 3), [1, 1], device)
        assert not prefers((0, 48, 32, 32), (48, 48, 33, 33), [16, 16], device)
    assert prefers((64, 30, 182), (30, 30, 182), [181]) and prefers((64, 30, 161), (30, 30, 161), [160])
    assert prefers((1, 48, 32, 32), (48, 48, 33, 33), [16, 16], keeps=True)


@pytest.mark.parametrize('function,change,error,message', [
    (causal_conv1d, dict(x=torch.zeros(3, 8)), ValueError, r'x must be \(B, I, L\), got shape \(3, 8\)'),
    (causal_conv1d, dict(x=torch.zeros(1, 4, 0)), ValueError, r'x must have L of at least 1, got shape \(1, 4, 0\)'),
    (causal_conv1d, dict(x=torch.zeros(1, 3, 8)), ValueError, r'weight must be \(O, I / groups, K\) with .* = 3 as in'),
    (causal_conv1d, dict(weight=torch.zeros(2, 4, 0)), ValueError, r'weight must be .*, got shape \(2, 4, 0\)'),
    (causal_conv1d, dict(groups=3), ValueError, 'groups must divide the 4 channels of x, got 3'),
    (causal_conv1d, dict(groups=0), ValueError, 'groups must divide the 4 channels of x, got 0'),
    (causal_conv1d, dict(groups=4, weight=torch.zeros(2, 1, 5)), ValueError, 'the 2 channels of the output, got 4'),
    (causal_conv1d, dict(bias=torch.zeros(4)), ValueError, r'bias must be \(O,\) = \(2,\), got shape \(4,\)'),
    (causal_conv1d, dict(backend='cudnn'), ValueError, "backend must be one of native, .*, got 'cudnn'"),
    (causal_conv1d, dict(backend='channels_last'), ValueError, "'channels_last' was requested .*: sequences have"),
    (causal_conv1d, dict(backend='triton'), ValueError, "'triton' was requested and cannot run: there is no Triton"),
    (causal_conv1d, dict(weight=torch.zeros(2, 4, 5).double()), TypeError, 'weight must have the dtype of x'),
    (causal_conv1d, dict(x=torch.zeros(1, 4, 8, dtype=torch.int64)), TypeError, 'x must be floating point'),
    (causal_conv1d, dict(bias=torch.zeros(2, device='meta')), ValueError, 'bias must be on the device of x, cpu'),
    (large_conv2d, dict(x=torch.zeros(4, 8, 8)), ValueError, r'x must be \(B, I, H, W\), got shape \(4, 8, 8\)'),
    (large_conv2d, dict(x=torch.zeros(1, 4, 8, 0)), ValueError, 'x must have H, W of at least 1, got shape'),
    (large_conv2d, dict(weight=torch.zeros(2, 4, 4, 5)), ValueError, r'odd KH and KW, got shape \(2, 4, 4, 5\)'),
    (large_conv2d, dict(weight=torch.zeros(4, 1, 5, 5)), ValueError, r'weight must be \(O, I, KH, KW\) with I = 4 as'),
    (large_conv2d, dict(backend='triton'), ValueError, "'triton' was requested and cannot run"),
])
def test_bad_input_is_named(function, change, error, message):
    one = function is causal_conv1d
    good = dict(x=torch.zeros(1, 4, 8, *[] if one else [8]), weight=torch.zeros(2, 4, 5, *[] if one else [5]),
                bias=torch.zeros(2))
    function(**good)
    with pytest.raises(error, match=message):
        function(**dict(good, **change))


def test_a_requested_backend():
    x, weight = tensors('causal', (2, 3, 4, 9, 9, 1), bias=False)
    with use_backend('fft'):
        by_fft = causal_conv1d(x, weight)
    assert torch.equal(by_fft, causal_conv1d(x, weight, backend='fft'))
    assert not torch.equal(by_fft, causal_conv1d(x, weight))
    with use_backend('channels_last'), pytest.raises(ValueError, match='sequences have one memory format'):
        causal_conv1d(x, weight)
    with use_backend('fft'):
        assert torch.equal(causal_conv1d(x, weight, backend='native'), causal_conv1d(x, weight, backend='native'))


def test_gradients_of_taps_that_meet_nothing_are_zero():
    """Nothing but padding, or zeros before or behind all other values; Adam would make steps of rounding noise."""
    for family, case in (('causal', (2, 2, 3, 90, 90, 1)), ('causal', (5, 2, 3, 90, 200, 1)),
                         ('same', (2, 2, 3, 40, 6, 41, 11)), ('same', (5, 2, 3, 6, 40, 5, 41))):
        x, weight = tensors(family, case, torch.float32, bias=False)
        dim = 2 + (x.ndim == 4 and x.shape[3] > x.shape[2])
        for first, end in ((0, 0), (3, 2), (70 if x.shape[dim] == 90 else 30, 1)):
            some = x.clone()
            some.narrow(dim, 0, first).zero_()
            some.narrow(dim, x.shape[dim] - end, end).zero_()
            some[:, 1] = 0 if first == 3 else some[:, 1]  # a dead channel
            some.requires_grad_()
            cotangent = torch.randn(x.shape[0], weight.shape[0], *x.shape[2:])
            cotangent.narrow(dim, 0, 1).zero_()
            grads = []
            for function in (ours(family, case, 'fft'), reference(family, case)):
                dtype = torch.float64 if grads else torch.float32
                leaf = weight.to(dtype).requires_grad_()
                grads.append(torch.autograd.grad(function(some.to(dtype), leaf), leaf, cotangent.to(dtype))[0])
            assert difference(*grads) < 1e-5
            assert torch.equal(grads[0] == 0, grads[1] == 0)


def test_inputs_for_which_an_fft_is_inaccurate_are_computed_directly():
    """One value 10⁶ times larger than the others, an infinity or a NaN: the outputs that do not see it are exact."""
    for family, case in (('causal', (3, 8, 8, 1600, 1600, 1)), ('same', (3, 16, 16, 32, 32, 33, 33))):
        x, weight = tensors(family, case, torch.float32, bias=False)
        before = [k - 1 if family == 'causal' else k // 2 for k in weight.shape[2:]]
        assert choose_over_channels(x, weight, before, 1, False) == 'fft'
        for value in (1e6, float('inf'), float('nan')):
            x[1, 1, -1] = value
            y, expected = ours(family, case)(x, weight), reference(family, case)(x.double(), weight.double())
            unseen = (slice(None), slice(None), slice(0, 11 if family == 'same' else 399))
            assert difference(y[unseen], expected[unseen]) < 1e-5
            by_fft = ours(family, case, 'fft')(x, weight)
            assert difference(by_fft[::2], expected[::2]) < 1e-5
            with pytest.raises(AssertionError):
                assert difference(by_fft[unseen], expected[unseen]) < 1e-5
