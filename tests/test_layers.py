"""The modules against the oracle's loops; merging against the module itself before merging."""
import pytest
import timm
import torch
import torch.nn as nn
from conftest import LAYOUTS, TOLERANCE, difference, shake_norms
from reference import conv_loop, kernel_loop
from timm.utils import reparameterize_model

from timm_smpconv import RepSMPConv2d, SMPConv2d, SMPKernel
from timm_smpconv.layers import ConvNorm, NormClassifierHead

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
    layer = SMPConv2d(c, c, k, stride, padding, points=6, radius=0.7, dtype=torch.float64)
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
    layer = SMPConv2d(4, 4, (5, 9), padding=(2, 4), dtype=dtype).eval()
    x = torch.randn(2, 4, 6, 7, dtype=dtype)
    merged = layer.fuse()
    assert isinstance(merged, nn.Conv2d) and merged.weight.dtype == dtype and not merged.training
    assert difference(merged(x), layer(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize('layer', [SMPConv2d(4, 4, 7, padding=3), RepSMPConv2d(4, 7)])
def test_autocast_gives_the_low_precision_result(layer):
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = layer.eval()(x)
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


@pytest.mark.parametrize('act_layer', [None, nn.ReLU])
@pytest.mark.parametrize('conv', [
    nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=True), nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False)])
def test_conv_norm_merges(conv, act_layer):
    layer = shake_norms(ConvNorm(conv, act_layer)).eval()
    x = torch.randn(2, conv.in_channels, 8, 9)
    merged = layer.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
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
    assert merged.norm_in_fc == (num_classes > 0 and pool in ('avg', 'fastavg', 'fast', ''))
    assert merged.fuse() is merged


def test_a_classifier_of_its_own_keeps_its_norm_before_it():
    head = shake_norms(NormClassifierHead(8, 5)).eval()
    head.fc = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    x = torch.randn(2, 8, 3, 4)
    merged = head.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert difference(merged(x), head(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('module', [
    SMPConv2d(4, 4, 5), RepSMPConv2d(4, 7), ConvNorm(nn.Conv2d(3, 4, 1)), NormClassifierHead(8, 5)])
def test_merging_in_training_mode_is_refused(module):
    with pytest.raises(RuntimeError, match='merges in evaluation mode only, got a module in training mode'):
        module.train().fuse()


def test_merging_draws_no_random_numbers_and_leaves_the_module_alone():
    layer = shake_norms(RepSMPConv2d(4, 7)).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = torch.get_rng_state()
    layer.fuse()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_a_batchnorm_without_statistics_cannot_merge():
    layer = ConvNorm(nn.Conv2d(3, 4, 1)).eval()
    layer.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(ValueError, match='needs running statistics'):
        layer.fuse()


@pytest.mark.parametrize('make,message', [
    (lambda: SMPConv2d(4, 4, 6), r'kernel_size must be odd and positive, got \(6, 6\)'),
    (lambda: SMPConv2d(4, 4, (5, 4)), r'kernel_size must be odd and positive, got \(5, 4\)'),
    (lambda: SMPConv2d(4, 4, -3), 'kernel_size must be odd and positive'),
    (lambda: SMPConv2d(4, 8, 5), 'out_channels must equal in_channels = 4 .*got 8'),
    (lambda: SMPConv2d(4, 4, 5, groups=1), 'groups must equal in_channels = 4 .*got 1'),
    (lambda: SMPConv2d(4, 4, 5, dilation=2), 'dilation must be 1.*got 2'),
    (lambda: SMPConv2d(4, 4, 5, padding_mode='circular'), "padding_mode must be 'zeros', got 'circular'"),
    (
        lambda: SMPConv2d(4, 4, 5, padding='full'),
        "padding must be numbers, 'valid' or, at stride 1, 'same', got 'full'"),
    (lambda: SMPConv2d(4, 4, 5, stride=2, padding='same'), 'padding must be'),
    (lambda: SMPConv2d(4, 4, 5, points=0), 'points must be at least 1, got 0'),
    (lambda: SMPConv2d(4, 4, 5, radius=-0.1), r'radius must be in radius_range \(0.001, 1.0\), got -0.1'),
    (lambda: RepSMPConv2d(4, 5, small_kernel=7), r'small_kernel must not be larger than kernel_size = \(5, 5\), got'),
    (lambda: RepSMPConv2d(4, 5, small_kernel=2), 'small_kernel must be odd and positive'),
])
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
