"""Kernels at other sizes: against the oracle's loops at that size, and against the integrals that sums approximate."""
import copy
import io
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from conftest import TOLERANCE, difference, shake_norms, small_model
from reference import conv_loop, kernel_loop
from timm.utils import ModelEmaV3, reparameterize_model

from timm_smpconv import RepSMPConv2d, SMPConv1d, SMPConv2d, SMPKernel, resize_kernels
from timm_smpconv.layers.rep_conv import DenseRepSMPConv2d, RepSMPConv1d
from timm_smpconv.layers.small_conv import DepthwiseConv2d


def kernel_sizes(model):
    return [m.kernel_size for m in model.modules() if isinstance(m, (SMPConv1d, SMPConv2d))]


def spread(kernel, low=-0.9, high=0.9):
    """Points everywhere, with radii and weights of their own."""
    with torch.no_grad():
        kernel.coords.uniform_(low, high)
        kernel.radius.uniform_(0.2, 0.6)
        kernel.weight.normal_()
    return kernel


def oracle(kernel, size):
    """The kernel at a size, by the loops, and by the cell areas of both grids."""
    area = math.prod((n - 1) / (k - 1) for n, k in zip(kernel.trained_size, size) if k > 1)
    return kernel_loop(kernel.coords, kernel.radius, kernel.weight, size, kernel.average) * area


@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('native,size', [
    ((7, 7), (13, 13)), ((9, 9), (5, 5)), ((5, 9), (11, 3)), ((3, 1), (9, 1)), ((8,), (15,)), ((40,), (9,))])
def test_a_resized_kernel_equals_the_loops_with_every_gradient(native, size, average):
    kernel = spread(SMPKernel(3, native, 6, groups=2, average=average, dtype=torch.float64))
    assert kernel.resize(size) is kernel
    actual, expected = kernel(), oracle(kernel, size)
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    leaves = [kernel.coords, kernel.radius, kernel.weight]
    cotangent = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)):
        assert difference(a, e) < TOLERANCE[torch.float64]


def test_entries_sum_to_the_integral_of_the_points():
    """A cone of radius r in the L1 norm is a pyramid over a square of area 2 r²: its integral is 2 r² / 3."""
    kernel = spread(SMPKernel(2, (25, 25), 5, dtype=torch.float64), -0.4, 0.4)
    integral = (kernel.weight * 2 / 3 * kernel.radius ** 2).sum(-1)  # (G, C)
    for k, tolerance in ((13, 0.1), (25, 0.03), (49, 0.01), (201, 1e-3)):
        total = kernel.resize((k, k))().sum((2, 3)) * (2 / 24) ** 2
        assert difference(total, integral) < tolerance, k


@pytest.mark.parametrize('s', [2, 3])
def test_a_finer_convolution_of_a_finer_map_is_the_same_continuous_one(s):
    """Against the integral ∫ K(u) x(t - u) du of a smooth map, computed with 16 times as many samples an axis."""
    conv = SMPConv2d(1, 1, 15, padding=7, groups=1, bias=False, points=4, average=False, dtype=torch.float64)
    spread(conv.kernel, -0.3, 0.3)

    def convolved(scale):
        t = torch.arange(-20 * scale, 20 * scale + 1, dtype=torch.float64) / scale  # in steps of the native grid
        x = torch.cos(0.3 * t) * torch.sin(0.2 * t + 1).unsqueeze(1)
        with torch.no_grad():
            y = conv.resize(scale * 14 + 1)(x[None, None])[0, 0, ::scale, ::scale]
        return y[8:-8, 8:-8]  # not at the padding

    exact = convolved(16)
    coarse, fine = ((convolved(scale) - exact).norm() / exact.norm() for scale in (1, s))
    assert fine < coarse / s and coarse < 0.15


def interpolated(weight, scale, size):
    """Each tap's share of the samples around its place, by loops over one axis after the other."""
    for axis in (2, 3):
        samples = [0] * size[axis - 2]
        for tap, part in enumerate(weight.unbind(axis)):
            place = size[axis - 2] // 2 + (tap - weight.shape[axis] // 2) * scale
            shares = [max(0, 1 - abs(n - place) / max(scale, 1)) for n in range(len(samples))]
            samples = [s + part * share / sum(shares) for s, share in zip(samples, shares)]
        weight = torch.stack(samples, axis)
    return weight


@pytest.mark.parametrize('k,scale,size', [
    (5, 2, (11, 11)), (5, 1, (5, 5)), (5, 4 / 3, (7, 7)), (5, 2 / 3, (5, 5)), (5, 0.5, (3, 3)), ((3, 5), 3, (11, 17)),
    ((1, 3), 2, (3, 7))])
def test_a_small_kernel_is_interpolated_with_its_gradients(k, scale, size):
    conv = DepthwiseConv2d(3, k, dtype=torch.float64)
    conv.rescale(scale, (31, 31))
    assert tuple(conv.size) == size
    expected = interpolated(conv.weight, scale, size)
    assert difference(conv.render(), expected) < TOLERANCE[torch.float64]
    assert difference(expected.sum((2, 3)), conv.weight.sum((2, 3))) < 1e-12
    x = torch.randn(2, 3, 12, 13, dtype=torch.float64, requires_grad=True)
    actual, expected = conv(x), conv_loop(x, expected, conv.bias, 1, [n // 2 for n in size])
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(expected)
    for a, e in zip(*(torch.autograd.grad(y, [x, conv.weight], cotangent) for y in (actual, expected))):
        assert difference(a, e) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('k,scale,large,small', [
    (9, 2, (17, 17), [11, 11]), (5, 2, (9, 9), [9, 9]), (9, 0.3, (3, 3), [3, 3]), (9, 1, (9, 9), [5, 5])])
def test_both_branches_of_a_scaled_layer_merge_exactly(k, scale, large, small):
    layer = shake_norms(RepSMPConv2d(3, k, dtype=torch.float64)).eval()
    spread(layer.large.conv.kernel)
    resize_kernels(layer, scale=scale)
    assert (layer.large.conv.kernel_size, layer.small.conv.size) == (large, small)
    x = torch.randn(2, 3, 12, 13, dtype=torch.float64)
    parts = reparameterize_model(layer)  # each branch by itself
    for merged in (layer.fuse(), parts, parts.fuse()):
        assert difference(merged(x), layer(x)) < TOLERANCE[torch.float64]


SIZES = [(7, 13), (7, 5), ((5, 9), (9, 5)), (13, 31)]


@pytest.mark.parametrize('k,size', SIZES)
def test_a_resized_layer_equals_the_loops_and_keeps_its_padding(k, size):
    for padding, stride in (('same', 1), (0, 1), (3, 2)):
        conv = SMPConv2d(3, 3, k, stride, padding, groups=3, points=5, dtype=torch.float64).eval()
        spread(conv.kernel)
        x = torch.randn(2, 3, 32, 33, dtype=torch.float64)
        before = conv(x).shape
        conv.resize(size)
        weight = oracle(conv.kernel, conv.kernel_size).transpose(0, 1)
        assert weight.shape[2:] == torch.Size([size, size] if isinstance(size, int) else size)
        expected = conv_loop(x, weight, conv.bias, stride, conv.padding)
        assert difference(conv(x), expected) < TOLERANCE[torch.float64]
        assert difference(conv.fuse()(x), expected) < TOLERANCE[torch.float64]
        assert (expected.shape == before) == (padding != 0)


@pytest.mark.parametrize('make,shape,size', [
    (partial(SMPConv2d, 4, 6, 7, padding='same'), (2, 4, 9, 12), 11),
    (partial(SMPConv2d, 4, 8, 7, padding=3, groups=2), (2, 4, 9, 12), 11),
    (partial(RepSMPConv2d, 4, 7, 5), (2, 4, 9, 12), 5),
    (partial(DenseRepSMPConv2d, 4, 6, 7, bias=True), (2, 4, 9, 12), (3, 13)),
    (partial(SMPConv1d, 4, 6, 20, causal=True), (2, 4, 50), 41),
    (partial(SMPConv1d, 4, 4, 9, padding=4, groups=4), (2, 4, 50), 5),
    (partial(RepSMPConv1d, 4, 6, 20), (2, 4, 50), 10),
])
def test_every_layer_merges_exactly_after_resizing(make, shape, size):
    layer = shake_norms(make(dtype=torch.float64)).eval()
    spread(next(m for m in layer.modules() if isinstance(m, SMPKernel)))
    x = torch.randn(shape, dtype=torch.float64)
    before = layer(x)
    assert layer.resize(size) is layer
    assert layer(x).shape == before.shape
    assert difference(layer(x), before) > 1e-3
    assert difference(layer.fuse()(x), layer(x)) < TOLERANCE[torch.float64]


def test_a_resized_model_has_the_loops_kernels_and_merges(model, images):
    kernels = [m for m in model.modules() if isinstance(m, SMPKernel)]
    assert resize_kernels(model, scale=1.5) is model
    assert kernel_sizes(model) == [(13, 13), (9, 9), (9, 9), (9, 9), (7, 7)]  # 6 * 1.5 = 9 steps: 8, the even one
    for kernel in kernels:
        assert difference(kernel(), oracle(kernel, kernel.size)) < TOLERANCE[torch.float32]
    merged = reparameterize_model(model)
    assert difference(merged(images), model(images)) < TOLERANCE[torch.float32]
    rebuilt = small_model(inference_mode=True, shake=False, kernel_sizes=(13, 9, 9, 7))
    rebuilt.load_state_dict(merged.state_dict())
    assert torch.equal(rebuilt(images), merged(images))


def test_state_dicts_go_both_ways(model, images):
    before = model(images)
    other = resize_kernels(small_model(shake=False), scale=2)
    other.load_state_dict(model.state_dict())
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert torch.equal(other(images), resize_kernels(copy.deepcopy(model), scale=2)(images))
    again = small_model(shake=False)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(images), before)
    assert torch.equal(resize_kernels(other, scale=1)(images), before)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def scripted(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize('copied', [
    copy.deepcopy, pickled, scripted, torch.fx.symbolic_trace, lambda model: ModelEmaV3(model).module,
    pytest.param(
        lambda model: torch.export.export(model, (torch.randn(1, 3, 64, 96),)).module(), marks=pytest.mark.slow),
])
def test_the_size_survives(copied):
    model, x = small_model(depths=(1, 1, 1, 1)), torch.randn(1, 3, 64, 96)
    unlike = model(x)
    resize_kernels(model, scale=2)
    assert difference(copied(model)(x), model(x)) < TOLERANCE[torch.float32]
    assert difference(unlike, model(x)) > 0.01


def test_features_are_resized(images):
    features = small_model(features_only=True)
    expected = resize_kernels(copy.deepcopy(features), kernel_sizes={9: 17, 7: 13, 5: (9, 9)})(images)
    for layer in features.modules():
        if isinstance(layer, RepSMPConv2d):
            layer.resize(2 * layer.large.conv.kernel_size[0] - 1)
    assert kernel_sizes(features) == [(17, 17), (13, 13), (13, 13), (13, 13), (9, 9)]
    assert all(map(torch.equal, features(images), expected))


def test_sizes_of_the_stages(model):
    resize_kernels(model, kernel_sizes=(51, (7, 9), 7, 11))
    assert kernel_sizes(model) == [(51, 51), (7, 9), (7, 7), (7, 7), (11, 11)]
    resize_kernels(model, kernel_sizes={51: 9})
    assert kernel_sizes(model) == [(9, 9), (7, 9), (7, 7), (7, 7), (11, 11)]
    resize_kernels(model, kernel_sizes=15)
    assert set(kernel_sizes(model)) == {(15, 15)}


def test_a_sequence_network_takes_sequences_of_another_rate():
    """A smooth sequence, sampled as in training and three times as densely."""
    args = dict(num_classes=4, depth=1, dim=6, seq_len=41, small_kernel=1)
    net = shake_norms(timm.create_model('smpconv_tcn_ct', in_chans=1, **args)).eval().double()
    for kernel in (m for m in net.modules() if isinstance(m, SMPKernel)):
        spread(kernel, -0.5, 0.5)
    with pytest.raises(ValueError, match='seq_len = 41'):
        net(torch.randn(1, 1, 121, dtype=torch.float64))

    def logits(count):
        x = torch.linspace(0, 1, count, dtype=torch.float64)
        return net((5 * x).sin()[None, None])

    before = logits(41)
    resize_kernels(net, scale=3)
    assert kernel_sizes(net) == [(121,)] * 2
    assert difference(logits(121), before) < 0.05
    merged = reparameterize_model(net)
    x = torch.randn(2, 1, 121, dtype=torch.float64)
    assert difference(merged(x), net(x)) < TOLERANCE[torch.float64]
    resize_kernels(net, scale=1)
    assert torch.equal(logits(41), before)


def test_a_resized_sequence_network_loads_after_merging():
    args = dict(in_chans=1, num_classes=4, depth=1, dim=6)
    net = timm.create_model('smpconv_tcn_ct', seq_len=50, kernel_size=41, **args).eval()
    resize_kernels(net, scale=0.15)
    assert (net.seq_len, net.kernel_length) == (8, 41)  # 50 * 6 / 40 = 7.5
    resize_kernels(net, scale=1)
    assert net.seq_len == net.stem.seq_len == 50
    resize_kernels(net, scale=3)
    assert net.seq_len == 150
    merged, x = reparameterize_model(net), torch.randn(2, 1, 150)
    rebuilt = timm.create_model('smpconv_tcn_ct', seq_len=150, kernel_size=121, inference_mode=True, **args).eval()
    rebuilt.load_state_dict(merged.state_dict())
    assert torch.equal(rebuilt(x), merged(x))
    assert merged.kernel_length == 121 and net.kernel_length == 41
    again = timm.create_model('smpconv_tcn_ct', seq_len=50, kernel_size=41, **args)
    again.load_state_dict(net.state_dict())


def test_each_sequence_network_is_resized_by_its_own_kernels():
    nets = nn.ModuleList(
        timm.create_model('smpconv_tcn_ct', depth=1, dim=6, seq_len=seq_len) for seq_len in (41, 81))
    resize_kernels(nets, kernel_sizes={41: 61, 81: 41})
    assert [net.seq_len for net in nets] == [62, 41]


@pytest.mark.parametrize('name,seq_len', [('smpconv_tcn_ct', 182), ('smpconv_tcn_smnist', 784)])
def test_a_scale_of_two_takes_twice_the_samples(name, seq_len):
    net = resize_kernels(timm.create_model(name, depth=1, dim=6).eval(), scale=2)
    assert net.seq_len == 2 * seq_len and kernel_sizes(net) == [(2 * seq_len - 1,)] * 2
    assert net(torch.randn(1, net.in_chans, 2 * seq_len)).isfinite().all()


REFUSED = [
    (dict(), 'takes either scale or kernel_sizes, got scale=None'),
    (dict(scale=2, kernel_sizes=9), 'takes either scale or kernel_sizes, got scale=2 and kernel_sizes=9'),
    (dict(scale=0), 'scale must be a positive and finite number, got 0'),
    (dict(scale=math.nan), 'scale must be a positive and finite number, got nan'),
    (dict(scale=0.1), r'kernel_size must be at least 3 .*got \(1, 1\) for a kernel of \(9, 9\)'),
    (dict(kernel_sizes=(9, 7, 7, 3)), r'stages.3.*not be smaller than the kernel beside it, \(5, 5\), got \(3, 3\)'),
    (dict(kernel_sizes=8), r'stages.0.blocks.0.dwconv.large.conv: kernel_size must be odd and positive, got \(8, 8\)'),
    (dict(kernel_sizes=(11, 9.0, 7, 5)), r'stages.1.*kernel_size must be one or two integers, got 9.0'),
    (dict(kernel_sizes=(9, 7, 7)), r'kernel_sizes must be a number, .*got \(9, 7, 7\) for SMPConvNet with 4 stages'),
    (dict(kernel_sizes={31: 51}), r'kernel_sizes must map sizes that the model has, .*got 31'),
]


@pytest.mark.parametrize('arguments,message', REFUSED)
def test_what_is_refused_leaves_the_model_unchanged(model, arguments, message):
    before = kernel_sizes(model)
    with pytest.raises(ValueError, match=message):
        resize_kernels(model, **arguments)
    assert kernel_sizes(model) == before
    assert all(m.size == m.trained_size and m.scale == 1 for m in model.modules() if isinstance(m, SMPKernel))


@pytest.mark.parametrize('make,message', [
    (lambda: reparameterize_model(small_model()), 'model must be unmerged .*got a merged model: resize before merging'),
    (lambda: nn.Conv2d(3, 3, 3), 'have an SMPConv2d or SMPConv1d, got Conv2d without one'),
    (lambda: timm.create_model('smpconv_tcn_pmnist', depth=1), 'model must not permute its samples'),
    (lambda: small_model(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
    (lambda: RepSMPConv2d(4, 7, dilation=0), 'dilation must be at least 1, got 0'),
])
def test_models_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        resize_kernels(make(), scale=2)


@pytest.mark.parametrize('make,args,message', [
    (partial(SMPConv2d, 4, 4, 7), (6,), r'kernel_size must be odd and positive, got \(6, 6\)'),
    (partial(SMPConv2d, 4, 4, 7), (1,), r'kernel_size must be at least 3 .*got \(1, 1\)'),
    (partial(SMPConv2d, 4, 4, (7, 1)), (7,), r'and 1 where it was built with 1 sample, got \(7, 7\)'),
    (partial(SMPConv2d, 4, 4, 9, padding=2), (5,), r'must leave some of the padding \(2, 2\), .*got \(5, 5\)'),
    (partial(SMPConv1d, 4, 4, 9), (8,), 'kernel_size must be odd and at least 3, unless causal, got 8'),
    (partial(SMPConv1d, 4, 4, 9, causal=True), (1,), 'kernel_size must be at least 2, got 1'),
    (partial(RepSMPConv2d, 4, 9, (5, 7)), ((9, 5),), r'must not be smaller than the kernel beside it, \(5, 7\), got'),
    (lambda: reparameterize_model(RepSMPConv2d(4, 9).eval()), (9,), 'must be an SMP convolution .* got Merged'),
    (partial(SMPKernel, 4, (9, 9), 5), ((9,),), r'size must be at least 2 on each axis, .*\(9, 9\) is 1, got \(9,\)'),
    (partial(RepSMPConv2d, 4, 9), (5, 3.), r'must hold the kernel beside it, \(5, 5\), at small_scale = 3.0, got'),
    (partial(RepSMPConv2d, 4, 9), (9, 0.), 'small_scale must be positive and finite, got 0.0'),
])
def test_a_layer_that_refuses_a_size_is_unchanged(make, args, message):
    layer = make()
    before = {name: vars(m).copy() for name, m in layer.named_modules()}
    with pytest.raises(ValueError, match=message):
        layer.resize(*args)
    for name, m in layer.named_modules():
        assert {k: v for k, v in vars(m).items() if not k.startswith('_')} == {
            k: v for k, v in before[name].items() if not k.startswith('_')}


def dilated(weight, d):
    """The taps of a kernel, d apart."""
    holes = torch.zeros(d, d, dtype=weight.dtype)
    holes[0, 0] = 1
    return torch.kron(weight, holes)[..., :(1 - d) or None, :(1 - d) or None]


@pytest.mark.parametrize('k,small,d', [(5, 3, 2), ((7, 5), (3, 5), 4), (5, 5, 1)])
def test_a_dilated_layer_equals_the_loops_and_merges(k, small, d):
    layer = shake_norms(RepSMPConv2d(3, k, small, 6, dilation=d, dtype=torch.float64)).eval()
    kernel = spread(layer.large.conv.kernel)
    size = layer.large.conv.kernel_size
    assert size == tuple(d * (n - 1) + 1 for n in kernel.trained_size)
    assert layer.state_dict().keys() == RepSMPConv2d(3, k, small, 6).state_dict().keys()
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64)
    expected = 0
    for branch, weight in (
            (layer.large, oracle(kernel, size).transpose(0, 1)), (layer.small, dilated(layer.small.conv.weight, d))):
        y = conv_loop(x, weight, None, 1, [n // 2 for n in weight.shape[2:]])
        expected = expected + branch.bn(y)
    assert difference(layer(x), expected) < TOLERANCE[torch.float64]
    assert difference(layer.fuse()(x), expected) < TOLERANCE[torch.float64]
    resize_kernels(layer, scale=1)
    assert layer.large.conv.kernel_size == size
    assert difference(layer.resize(tuple(n + 4 for n in size)).fuse()(x), layer(x)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('output_stride,reductions,sizes', [
    (32, [4, 8, 16, 32], [9, 7, 7, 5]), (16, [4, 8, 16, 16], [9, 7, 7, 9]), (8, [4, 8, 8, 8], [9, 7, 13, 17])])
def test_output_stride(model, images, output_stride, reductions, sizes):
    args = dict(output_stride=output_stride, shake=False)
    strided = small_model(**args)
    strided.load_state_dict(model.state_dict())
    assert [stage.blocks[0].dwconv.large.conv.kernel_size[0] for stage in strided.stages] == sizes
    if output_stride == 32:
        assert torch.equal(strided(images), model(images))
    features = small_model(features_only=True, **args)
    features.load_state_dict({
        k.replace('stages.', 'stages_', 1): v for k, v in model.state_dict().items() if not k.startswith('head.')})
    assert features.feature_info.reduction() == reductions
    maps = features(images)
    assert [64 // m.shape[2] for m in maps] == [96 // m.shape[3] for m in maps] == reductions

    x = strided.forward_features(images)
    assert difference(maps[-1], x) < TOLERANCE[torch.float32]
    assert difference(torch.jit.script(strided)(images), strided(images)) < TOLERANCE[torch.float32]
    merged = reparameterize_model(strided)
    assert difference(merged.forward_features(images), x) < TOLERANCE[torch.float32]
    rebuilt = small_model(inference_mode=True, **args)
    rebuilt.load_state_dict(merged.state_dict())
    assert torch.equal(rebuilt(images), merged(images))
    x.sum().backward()


@pytest.mark.parametrize('output_stride', [16, 8])
def test_a_stage_that_keeps_its_stride_computes_what_the_other_does_and_more(model, output_stride):
    """Its downsampling layers; at every second position of the denser map they are those of the strided network."""
    strided = small_model(output_stride=output_stride, shake=False)
    strided.load_state_dict(model.state_dict())
    for i in range(1, 4):
        density = max(1, 4 * 2 ** (i - 1) // output_stride)  # of the map in front of the stage
        within = max(1, 4 * 2 ** i // output_stride)
        x = torch.randn(2, model.stages[i].downsample[0].conv.in_channels, 16, 24)
        expected = model.stages[i].downsample(x[..., ::density, ::density])
        actual = strided.stages[i].downsample(x)[..., ::within, ::within]
        assert difference(actual, expected) < TOLERANCE[torch.float32]


def test_the_scale_refers_to_the_sizes_of_the_output_stride(images):
    model = small_model(output_stride=16)
    resize_kernels(model, scale=2)
    assert kernel_sizes(model)[-1] == (17, 17)
    with pytest.raises(ValueError, match=r'kernel beside it, \(9, 9\), got \(5, 5\)'):
        resize_kernels(model, kernel_sizes=(17, 13, 13, 5))
    merged = reparameterize_model(model)
    assert difference(merged(images), model(images)) < TOLERANCE[torch.float32]
