"""SMPConv1d, the dense SMPConv2d and what both merge into, against loops over the equation and PyTorch in float64."""
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import LAYOUTS, TOLERANCE, difference, shake_norms
from reference import kernel_loop

from timm_smpconv import SMPConv1d, SMPConv2d, SMPKernel
from timm_smpconv.layers.merged import MergedConv1d, MergedLargeConv2d
from timm_smpconv.layers.rep_conv import DenseRepSMPConv2d, RepSMPConv1d
from timm_smpconv.layers.small_conv import CausalConv1d

F64 = dict(dtype=torch.float64)


def spread(layer):
    """Points all over the kernel, radii that differ, weights and biases that are felt."""
    for module in layer.modules():
        if isinstance(module, SMPKernel):
            with torch.no_grad():
                nn.init.uniform_(module.coords, -1, 1)
                nn.init.uniform_(module.radius, 0.05, 0.9)
                nn.init.normal_(module.weight)
        elif isinstance(getattr(module, 'bias', None), nn.Parameter):
            nn.init.normal_(module.bias)
    return layer


def compare(layer, x, convolve):
    """Output and every gradient of a layer against `convolve(x, weight)` with the kernel of the equation."""
    x.requires_grad_()
    points = layer.kernel
    leaves = [x, *layer.parameters()]
    weight = kernel_loop(points.coords, points.radius, points.weight, layer.kernel_size, points.average)
    weight = weight.transpose(0, 1) if layer.depthwise else weight
    actual, expected = layer(x), convolve(x, weight)
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)):
        assert difference(a, e) < 10 * TOLERANCE[torch.float64]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('channels,groups', [((3, 4), 1), ((4, 6), 2), ((2, 2), 1), ((1, 1), 1)])
@pytest.mark.parametrize(
    'k,stride,padding,h,w', [(5, 1, 'same', 6, 9), (9, 1, 4, 5, 4), (3, 2, 1, 7, 6), (5, 1, 0, 8, 8)])
def test_smp_conv2d_over_channels(channels, groups, k, stride, padding, h, w, layout):
    layer = spread(SMPConv2d(*channels, k, stride, padding, groups=groups, points=7, average=True, **F64))
    x = LAYOUTS[layout](torch.randn(2, channels[0], h, w, **F64)).detach()
    compare(layer, x, lambda x, weight: F.conv2d(
        x, weight, layer.bias, stride, k // 2 if padding == 'same' else padding, groups=groups))


@pytest.mark.parametrize('channels,groups', [((3, 4), 1), ((4, 6), 2), ((4, 4), 4), ((1, 3), 1)])
@pytest.mark.parametrize('k,length', [(7, 7), (8, 8), (2, 5), (9, 4), (4, 1), (5, 12)])
def test_a_causal_smp_conv1d_sees_no_later_sample(channels, groups, k, length):
    layer = spread(SMPConv1d(*channels, k, groups=groups, causal=True, points=6, **F64))
    x = torch.randn(2, channels[0], length, **F64)
    compare(layer, x, lambda x, weight: F.conv1d(F.pad(x, (k - 1, 0)), weight, layer.bias, groups=groups))
    later = x.detach().clone()
    later[..., length // 2 + 1:] += 1
    assert difference(layer(later)[..., :length // 2 + 1], layer(x)[..., :length // 2 + 1]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('channels,groups', [((3, 4), 1), ((4, 4), 4)])
@pytest.mark.parametrize('k,stride,padding', [(7, 1, 'same'), (7, 1, 3), (5, 2, 2), (3, 1, 0), (5, 1, 'valid')])
def test_a_centred_smp_conv1d_is_a_drop_in_for_conv1d(channels, groups, k, stride, padding):
    layer = spread(SMPConv1d(*channels, k, stride, padding, groups=groups, points=6, **F64))
    x = torch.randn(2, channels[0], 11, **F64)
    compare(layer, x, lambda x, weight: F.conv1d(x, weight, layer.bias, stride, padding, groups=groups))
    conv = nn.Conv1d(*channels, k, stride, padding, groups=groups)
    for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'dilation', 'groups'):
        assert getattr(layer, name) == getattr(conv, name)


def test_causal_points_start_near_the_current_sample():
    kernel = SMPConv1d(30, 30, 784, causal=True).kernel
    # The authors draw from a normal of 0.1 in [-1, 0] and map it by 2x + 1: mean 1 - 0.2 * sqrt(2 / pi), all below 1.
    assert kernel.coords.max() <= 1 and abs(kernel.coords.mean().item() - (1 - 0.2 * (2 / torch.pi) ** 0.5)) < 0.02
    assert kernel.weight.shape == (30, 30, 30) and kernel.radius_range == (1e-4, 1.)
    assert abs(kernel.radius[0, 0].item() - 2 / 784) < 1e-9


@pytest.mark.parametrize('make,shape', [
    (partial(RepSMPConv1d, 3, 4, 9, 5, bias=True, points=6), (2, 3, 9)),
    (partial(RepSMPConv1d, 3, 3, 4, 4, points=6), (2, 3, 11)),  # even, and all of it small
    (partial(DenseRepSMPConv2d, 3, 4, 9, 3, points=6), (2, 3, 7, 8)),
    (partial(DenseRepSMPConv2d, 4, 4, (9, 5), 5, bias=True, small_bias=True), (2, 4, 9, 6)),
    (partial(DenseRepSMPConv2d, 1, 1, 5), (2, 1, 5, 5)),
])
def test_branches_merge_into_one_convolution(make, shape):
    layer = shake_norms(spread(make(**F64))).eval()
    x = torch.randn(shape, **F64)
    merged = layer.fuse()
    assert type(merged) is (MergedConv1d if len(shape) == 3 else MergedLargeConv2d)
    assert merged.kernel_size == layer.large.conv.kernel_size and not merged.training
    assert isinstance(merged, nn.Conv1d if len(shape) == 3 else nn.Conv2d)
    with torch.no_grad():
        expected = layer(x)
        assert difference(merged(x), expected) < TOLERANCE[torch.float64]
        plain = nn.Conv1d if len(shape) == 3 else nn.Conv2d
        conv = plain(shape[1], len(merged.weight), merged.kernel_size, padding=merged.padding, **F64)
        conv.load_state_dict(merged.state_dict())
        padded = F.pad(x, (merged.kernel_size[0] - 1, 0)) if len(shape) == 3 else x
        assert difference(conv(padded), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('make,shape', [
    (partial(SMPConv1d, 3, 4, 7, causal=True), (2, 3, 9)),
    (partial(SMPConv1d, 3, 4, 7, padding=3), (2, 3, 9)),
    (partial(SMPConv1d, 4, 4, 7, 2, groups=4), (2, 4, 9)),
    (partial(SMPConv1d, 3, 4, 8, 3, causal=True), (2, 3, 9)),
    (partial(SMPConv2d, 3, 4, 7, padding='same'), (2, 3, 5, 6)),
    (partial(SMPConv2d, 3, 4, 5, 2, 1), (2, 3, 9, 8)),
    (partial(SMPConv2d, 4, 4, 5, padding=2, groups=2), (2, 4, 9, 8)),
])
def test_a_bare_layer_merges(make, shape):
    layer = spread(make(**F64)).eval()
    x = torch.randn(shape, **F64)
    with torch.no_grad():
        assert difference(layer.fuse()(x), layer(x)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('make,message', [
    (lambda: SMPConv1d(4, 4, 1, causal=True), 'kernel_size must be at least 2, got 1'),
    (lambda: SMPConv1d(4, 4, 6), 'kernel_size must be odd and at least 3, unless causal, got 6'),
    (lambda: SMPConv1d(4, 4, 6, padding=5, causal=True), 'padding must be 0 in a causal convolution.*got 5'),
    (lambda: SMPConv1d(4, 4, (5, 5)), r'kernel_size must be an integer, got \(5, 5\)'),
    (lambda: SMPConv1d(4, 6, 5, groups=4), 'out_channels must be a positive multiple of groups = 4, got 6'),
    (lambda: SMPConv1d(4, 4, 5, dilation=2), 'dilation must be 1.*got 2'),
    (lambda: SMPConv1d(4, 4, 5, radius=2.), 'radius must be in radius_range'),
    (lambda: RepSMPConv1d(4, 4, 4, 5), 'small_kernel must be at least 1 and not larger than kernel_size = 4, got 5'),
    (lambda: SMPConv1d(4, 4, 5)(torch.zeros(4, 5)), r'x must be \(B, 4, L\) with L at least 1, got shape \[4, 5\]'),
    (lambda: SMPConv1d(4, 4, 5)(torch.zeros(1, 3, 5)), r'x must be \(B, 4, L\)'),
    (lambda: SMPConv1d(4, 4, 5)(torch.zeros(1, 4, 0)), r'x must be \(B, 4, L\) with L at least 1'),
    (lambda: SMPConv1d(4, 4, 5)(torch.zeros(1, 4, 9, dtype=torch.uint8)), 'x must be floating point, got torch.uint8'),
    (lambda: SMPConv1d(4, 4, 5)([0.]), 'x must be a tensor .* got list'),
])
def test_bad_arguments_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_small_convolutions_start_as_in_the_paper():
    assert abs(CausalConv1d(30, 30, 5, bias=False).weight.std().item() - 0.02) < 1e-3
    assert MergedConv1d(30, 30, 50, causal=True).bias.abs().max() == 0
