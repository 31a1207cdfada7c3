"""The modules against the oracle's loops; merging against the module itself before merging."""
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from conftest import LAYOUTS, TOLERANCE, difference, shake_norms
from reference import conv_loop, kernel_loop
from timm.utils import reparameterize_model

from timm_smpconv import RepSMPConv2d, SMPConv2d, SMPKernel
from timm_smpconv.layers._folding import MergeError
from timm_smpconv.layers.heads import NormClassifierHead
from timm_smpconv.layers.merged import MergedConv2d
from timm_smpconv.layers.rep_conv import ConvNorm
from timm_smpconv.layers.small_conv import DepthwiseConv2d

SHAPES = [  # (C, kernel_size, stride, padding, H, W)
    (3, 7, 1, 3, 9, 12),
    (1, 3, 1, 1, 1, 1),
    (4, (3, 9), 1, (1, 4), 5, 2),
    (2, 13, 1, 6, 4, 4),  # larger than the map
    (5, 3, 2, 1, 8, 7),
    (2, 5, 1, 0, 6, 9),  # nn.Conv2d's default padding
]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('c,k,stride,padding,h,w', SHAPES)
def test_smp_conv2d_equals_the_loops_with_every_gradient(c, k, stride, padding, h, w, layout):
    layer = SMPConv2d(c, c, k, stride, padding, groups=c, points=6, radius=0.7, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    nn.init.uniform_(layer.kernel.coords, -1, 1)
    x = LAYOUTS[layout](torch.randn(2, c, h, w, dtype=torch.float64)).requires_grad_()
    points = layer.kernel
    leaves = [x, points.coords, points.radius, points.weight, layer.bias]
    weight = kernel_loop(points.coords, points.radius, points.weight, layer.kernel_size).transpose(0, 1)
    expected = conv_loop(x, weight, layer.bias, stride, layer.padding)
    actual = layer(x)
    assert difference(actual, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)):
        assert difference(a, e) < TOLERANCE[torch.float64]


def test_smp_conv2d_takes_the_place_of_a_depthwise_conv2d():
    arguments = [  # as a network may write them
        ((6, 6, 7), dict(padding=3, groups=6)),
        ((6, 6, 5, 2, 2, 1, 6), {}),
        ((6, 6, (3, 5)), dict(groups=6, bias=False)),
        ((6, 6, 5), dict(padding='same', groups=6, padding_mode='zeros')),
        ((6, 6, 5), dict(padding='valid', groups=6)),
    ]
    x = torch.randn(2, 6, 11, 10)
    for args, kwargs in arguments:
        conv, smp = nn.Conv2d(*args, **kwargs), SMPConv2d(*args, **kwargs)
        assert smp(x).shape == conv(x).shape
        assert (smp.bias is None) == (conv.bias is None)
        for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'dilation', 'groups'):
            assert getattr(smp, name) == getattr(conv, name)


def test_smp_conv2d_in_a_network_of_timm():
    net = timm.create_model('convnext_atto', num_classes=3).eval()
    for stage in net.stages:
        for block in stage.blocks:
            dim = block.conv_dw.in_channels
            block.conv_dw = SMPConv2d(dim, dim, 13, padding=6, groups=dim).eval()
    x = torch.randn(1, 3, 64, 64)
    merged = reparameterize_model(net)
    assert not any(isinstance(m, SMPKernel) for m in merged.modules())
    assert difference(merged(x), net(x)) < TOLERANCE[torch.float32]
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_smp_conv2d_merges_into_a_conv2d_of_its_dtype(dtype):
    layer = SMPConv2d(4, 4, (5, 9), padding=(2, 4), dtype=dtype, groups=4).eval()
    x = torch.randn(2, 4, 6, 7, dtype=dtype)
    merged = layer.fuse()
    assert isinstance(merged, nn.Conv2d) and merged.weight.dtype == dtype and not merged.training
    assert difference(merged(x), layer(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize('make', [partial(SMPConv2d, 4, 4, 7, padding=3, groups=4), partial(RepSMPConv2d, 4, 7)])
def test_autocast_gives_the_low_precision_result(make):
    layer = make().eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.bfloat16
    assert difference(actual, layer(x)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize('k,small,h,w', [(7, 5, 9, 12), ((5, 9), (3, 5), 4, 4), (3, 3, 1, 2), (13, 1, 5, 5)])
def test_rep_smp_conv2d_equals_the_loops_and_merges(k, small, h, w):
    layer = shake_norms(RepSMPConv2d(3, k, small, points=8, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, h, w, dtype=torch.float64)

    def branch(conv_norm, weight):
        bn = conv_norm.bn
        y = conv_loop(x, weight, None, 1, conv_norm.conv.padding) - bn.running_mean[:, None, None]
        return y / (bn.running_var + bn.eps).sqrt()[:, None, None] * bn.weight[:, None, None] + bn.bias[:, None, None]

    points = layer.large.conv.kernel
    large = kernel_loop(points.coords, points.radius, points.weight, layer.large.conv.kernel_size).transpose(0, 1)
    expected = branch(layer.large, large) + branch(layer.small, layer.small.conv.weight)
    assert difference(layer(x), expected) < TOLERANCE[torch.float64]
    merged = layer.fuse()
    assert isinstance(merged, nn.Conv2d)
    assert difference(merged(x), expected) < TOLERANCE[torch.float64]


class Lora(nn.Conv2d):
    """A subclass that computes something else than its weight says."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('act_layer', [None, nn.ReLU, nn.SiLU, nn.PReLU])
@pytest.mark.parametrize('make', [
    partial(nn.Conv2d, 3, 5, 3, stride=2, padding=1, bias=True),
    partial(nn.Conv2d, 4, 4, 5, padding=2, groups=4, bias=False),
    partial(SMPConv2d, 4, 4, 5, groups=4),
])
def test_conv_norm_merges(make, act_layer):
    layer = shake_norms(ConvNorm(make(), act_layer)).eval()
    x = torch.randn(2, layer.conv.in_channels, 8, 9)
    merged = layer.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert not any(m.training for m in merged.modules())
    assert difference(merged(x), layer(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('num_classes', [0, 5])
@pytest.mark.parametrize('pool', ['avg', 'fastavg', 'fast', 'max', 'avgmax', 'catavgmax', ''])
def test_head_merges_with_every_pooling(pool, num_classes):
    head = shake_norms(NormClassifierHead(8, num_classes, pool)).eval()
    x = torch.randn(2, 8, 3, 4)
    merged = head.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    for pre_logits in (False, True):
        assert difference(merged(x, pre_logits), head(x, pre_logits)) < TOLERANCE[torch.float32]
    assert torch.equal(merged.fc(merged(x, pre_logits=True)), merged(x))
    assert merged.fuse() is merged
    built = NormClassifierHead(8, num_classes, pool, inference_mode=True)
    built.load_state_dict(merged.state_dict())
    assert torch.equal(built.eval()(x), merged(x))


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_classifier_of_its_own_sees_normalised_features(when):
    head = shake_norms(NormClassifierHead(8, 5)).eval()
    x = torch.randn(2, 8, 3, 4)
    merged = head.fuse() if when == 'after' else head
    merged.fc = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    expected = merged.fc(head.norm(x).mean((2, 3)))
    assert difference(merged.fuse()(x), expected) < TOLERANCE[torch.float32]


def test_merging_draws_no_random_numbers_and_leaves_the_module_alone():
    layer = shake_norms(RepSMPConv2d(4, 7)).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = torch.get_rng_state()
    layer.fuse()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


REFUSED = {  # where: (what, message)
    'large.bn': [
        (partial(nn.BatchNorm2d, 4, track_running_stats=False), 'must have running statistics .* got BatchNorm2d'),
        (partial(nn.GroupNorm, 2, 4), r'must be a BatchNorm or an Identity to be merged, got GroupNorm\(2, 4'),
        (partial(nn.InstanceNorm2d, 4, track_running_stats=True), 'must be a BatchNorm .* got InstanceNorm2d'),
    ],
    'small.bn': [(partial(nn.LayerNorm, 4), 'must be a BatchNorm or an Identity .* got LayerNorm')],
    'small.conv': [
        (partial(nn.Conv2d, 4, 4, 5, padding=2, groups=4, padding_mode='reflect'), 'must be .*padded with zeros'),
        (partial(nn.Conv2d, 4, 4, 5, padding='same', groups=4), 'must be .*padded with zeros'),
        (partial(Lora, 4, 4, 5, padding=2, groups=4), 'must be an SMPConv1d, SMPConv2d.* got test_layers.Lora'),
        (nn.Identity, 'must be an SMPConv1d, SMPConv2d.* got Identity'),
    ],
    'small': [
        (partial(nn.Conv2d, 4, 4, 3, padding=1, dilation=2, groups=4), 'must be a convolution that keeps'),
        (partial(nn.Conv2d, 4, 4, 5, padding=2), 'must have the channels, groups and alignment'),
        (partial(nn.Conv2d, 4, 4, 9, padding=4, groups=4), 'must not be larger than the large branch'),
        (partial(MergedConv2d, 4, 4, 5, 1, 2, groups=4, activation='relu'), 'must be an SMPConv1d, SMPConv2d'),
    ],
    'large.act': [(nn.SiLU, 'must be an Identity to be merged, got SiLU')],
}


@pytest.mark.parametrize('where,make,message', [(w, *case) for w, cases in REFUSED.items() for case in cases])
def test_what_cannot_be_folded_is_refused_by_name(where, make, message):
    layer = RepSMPConv2d(4, 7).eval()
    layer.set_submodule(where, make().eval())
    with pytest.raises(MergeError, match=f'^{where} {message}'):
        layer.fuse()


def test_what_can_be_folded_is():
    """A norm left out, a bias, a parametrisation, a convolution without its norm: against the layer itself."""
    layer = shake_norms(RepSMPConv2d(4, 7))
    layer.large.bn = nn.Identity()
    layer.small.conv = nn.utils.parametrizations.weight_norm(DepthwiseConv2d(4, 3))
    x = torch.randn(2, 4, 8, 9)
    assert difference(layer.eval().fuse()(x), layer(x)) < TOLERANCE[torch.float32]
    layer.small = DepthwiseConv2d(4, 5, bias=False)
    assert difference(layer.eval().fuse()(x), layer(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('x,error,message', [
    (torch.zeros(4, 9, 9), ValueError, r'x must be \(B, 4, H, W\) .*got shape \[4, 9, 9\]'),
    (torch.zeros(2, 3, 9, 9), ValueError, r'x must be \(B, 4, H, W\) .*got shape \[2, 3, 9, 9\]'),
    (torch.zeros(2, 4, 9, 9, dtype=torch.uint8), TypeError, 'x must be floating point, got torch.uint8'),
    ([0.], TypeError, 'x must be a tensor of shape .*got list'),
])
@pytest.mark.parametrize('padding', [0, 2])
def test_bad_images_are_named(x, error, message, padding):
    with pytest.raises(error, match=message):
        SMPConv2d(4, 4, 5, padding=padding, groups=4)(x)


@pytest.mark.parametrize('make,message', [
    (lambda: SMPConv2d(4, 4, 6, groups=4), r'kernel_size must be odd and positive, got \(6, 6\)'),
    (lambda: SMPConv2d(4, 4, (5, 4), groups=4), r'kernel_size must be odd and positive, got \(5, 4\)'),
    (lambda: SMPConv2d(4, 4, -3, groups=4), 'kernel_size must be odd and positive'),
    (lambda: SMPConv2d(4, 9, 5, groups=2), 'out_channels must be a positive multiple of groups = 2, got 9'),
    (lambda: SMPConv2d(4, 4, 5, groups=3), 'in_channels must be a positive multiple of groups = 3, got 4'),
    (lambda: SMPConv2d(4, 4, 5, groups=0), 'in_channels must be a positive multiple of groups = 0, got 4'),
    (lambda: SMPConv2d(4, 4, 5, dilation=2, groups=4), 'dilation must be 1.*got 2'),
    (lambda: SMPConv2d(4, 4, 5, padding_mode='circular', groups=4), "padding_mode must be 'zeros', got 'circular'"),
    (
        lambda: SMPConv2d(4, 4, 5, padding='full', groups=4),
        "padding must be numbers, 'valid' or, at stride 1, 'same', got 'full'"),
    (lambda: SMPConv2d(4, 4, 5, stride=2, padding='same', groups=4), 'padding must be'),
    (lambda: SMPConv2d(4, 4, 5, points=0, groups=4), 'points must be at least 1, got 0'),
    (lambda: SMPConv2d(4, 4, 5, radius=-0.1, groups=4), r'radius must be in radius_range \(0.001, 1.0\), got -0.1'),
    (lambda: RepSMPConv2d(4, 5, small_kernel=7), r'small_kernel must not be larger than kernel_size = \(5, 5\), got'),
    (lambda: RepSMPConv2d(4, 5, small_kernel=2), 'small_kernel must be odd and positive'),
])
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
