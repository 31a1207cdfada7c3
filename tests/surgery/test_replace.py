"""`replace_depthwise` against the convolutions that were there, the oracle's loops, and NumPy's least squares."""
import math
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TOLERANCE, difference
from reference import kernel_loop
from timm.layers import Conv2dSame
from timm.utils import reparameterize_model
from torch.nn.utils import parametrize, prune

from timm_smpconv import SMPConv2d, replace_depthwise
from timm_smpconv.layers.merged import MergedConv2d
from timm_smpconv.layers.small_conv import DepthwiseConv2d
from timm_smpconv.surgery import replace


def depthwise(channels=6, size=7, **kwargs):
    """A depthwise convolution with smooth kernels of many shapes and a bias."""
    conv = nn.Conv2d(channels, channels, size, **{'padding': 'same', 'groups': channels, **kwargs})
    with torch.no_grad():
        for weight in conv.weight[:, 0]:
            y, x = (torch.linspace(-2, 2, k, dtype=weight.dtype) - torch.randn(()) / 3 for k in weight.shape)
            weight.copy_(torch.exp(-(y[:, None] * (0.6 + torch.rand(()))) ** 2 - x ** 2) * (1 + torch.randn(()) * x))
    return conv


class Net(nn.Module):
    """Two depthwise convolutions with a BatchNorm, an activation and dropout between them."""

    def __init__(self, **kwargs):
        super().__init__()
        self.first = depthwise(**kwargs)
        self.norm = nn.BatchNorm2d(6)
        self.rest = nn.Sequential(nn.Dropout(), nn.Conv2d(6, 6, 1), nn.GELU(), depthwise(size=5, **kwargs))

    def forward(self, x):
        return self.rest(self.norm(self.first(x)))


def snapshot(model):
    return {**dict(model.named_modules(remove_duplicate=False)), **dict(model.named_parameters())}, {
        key: value.clone() for key, value in model.state_dict().items()}, [m.training for m in model.modules()]


def assert_unchanged(model, before):
    objects, values, modes = snapshot(model)
    assert objects.keys() == before[0].keys() and all(objects[key] is before[0][key] for key in objects)
    assert all(torch.equal(values[key], before[1][key]) for key in values)
    assert modes == before[2]


@pytest.mark.parametrize('old,new', [
    (7, None), (7, 31), (3, 3), (31, 51), ((3, 7), (5, 31)), ((1, 7), None), (1, 3)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_as_many_points_as_samples_give_the_old_convolution_with_its_gradients(old, new, dtype):
    model = nn.Sequential(depthwise(size=old, dtype=dtype)).eval()
    conv, x = model[0], torch.randn(2, 6, 9, 12, dtype=dtype, requires_grad=True)
    expected = conv(x)
    report = replace_depthwise(model, new, min_size=1, images=x.detach())
    smp = model[0]
    assert isinstance(smp, SMPConv2d) and not smp.training and smp.kernel.coords.abs().max() <= 1
    actual = smp(x)
    tolerance = min(TOLERANCE[dtype], 1e-6)
    assert difference(actual, expected) < tolerance
    cotangent = torch.randn_like(expected)
    for a, e in zip(
            torch.autograd.grad(actual, [x, smp.bias], cotangent),
            torch.autograd.grad(expected, [x, conv.bias], cotangent)):
        assert difference(a, e) < max(tolerance, TOLERANCE[dtype])
    rendered, grown = smp.render(), [(n - k) // 2 for n, k in zip(smp.kernel_size, conv.kernel_size)]
    assert difference(rendered, F.pad(conv.weight, [*grown[1:] * 2, *grown[:1] * 2])) < tolerance
    assert report.replaced[0].error < tolerance and report.logits < tolerance


@pytest.mark.parametrize('new', [7, 31])
def test_no_point_is_caught_where_it_starts(new):
    """Each point that stands for a sample has a gradient: on the samples themselves it would have none."""
    model = nn.Sequential(depthwise())
    replace_depthwise(model, new)
    kernel = model[0].kernel
    model(torch.randn(2, 6, 12, 12)).square().sum().backward()
    assert (kernel.coords.grad[0, :49] != 0).all() and (kernel.radius.grad[0, :49] != 0).all()
    assert (kernel.weight.grad != 0).all()  # of the points of weight 0 in a larger kernel, too
    assert (kernel.weight[..., 49:] == 0).all()


@pytest.mark.parametrize('old,new,points', [(7, 7, 12), (7, 13, 25), ((5, 9), (5, 11), 20), (3, 5, 3)])
def test_fewer_points_are_a_least_squares_fit_that_the_descent_betters(old, new, points, monkeypatch):
    errors = []
    for steps in (1, replace.STEPS):
        monkeypatch.setattr(replace, 'STEPS', steps)
        torch.manual_seed(0)
        model = nn.Sequential(depthwise(size=old, dtype=torch.float64))
        conv = model[0]
        row, = replace_depthwise(model, new, min_size=1, points=points).replaced
        kernel = model[0].kernel
        low, high = kernel.radius_range
        assert low <= kernel.radius.min() and kernel.radius.max() <= high and kernel.coords.abs().max() <= 1
        rendered = kernel_loop(kernel.coords, kernel.radius, kernel.weight, kernel.size)[0].detach()
        grown = [(n - k) // 2 for n, k in zip(kernel.size, conv.kernel_size)]
        target = F.pad(conv.weight[:, 0], [*grown[1:] * 2, *grown[:1] * 2]).detach()
        moved = (rendered - target).flatten(1).norm(dim=1), target.flatten(1).norm(dim=1)
        assert math.isclose(row.error, moved[0].norm() / moved[1].norm(), rel_tol=1e-9)
        assert math.isclose(row.worst, (moved[0] / moved[1]).max(), rel_tol=1e-9)
        cones = kernel_loop(kernel.coords, kernel.radius, torch.eye(points, dtype=torch.float64)[None], kernel.size)
        cones, flat = cones[0].flatten(1).T.detach().numpy(), target.flatten(1).T.numpy()
        best = np.linalg.lstsq(cones, flat, rcond=None)[0]
        least = np.linalg.norm(cones @ best - flat) / np.linalg.norm(flat)
        assert least <= row.error < 1.01 * least + 1e-4  # the ridge costs that much
        errors.append(row.error)
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize('weight', [torch.ones(7, 7), torch.arange(49.).reshape(7, 7) % 2 * 2 - 1])
def test_radii_stay_where_they_reach_a_sample_and_in_range(weight):
    """A constant kernel asks for the largest radii, a chessboard for the smallest."""
    model = nn.Sequential(depthwise(dtype=torch.float64))
    model[0].weight.data.copy_(weight)
    error = replace_depthwise(model, points=4).replaced[0].error
    kernel = model[0].kernel
    assert kernel.radius.min() >= replace.LEAST_RADIUS / 3 - 1e-12 and kernel.radius.max() <= 1
    assert error < 1 and (kernel_loop(kernel.coords, kernel.radius, kernel.weight, kernel.size) != 0).any()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Merging(nn.Sequential):
    def fuse(self):
        raise AssertionError


def hooked():
    conv = depthwise()
    conv.register_forward_hook(lambda module, inputs, output: output + 1)
    return conv


def assigned():
    conv = depthwise()
    conv.forward = lambda x: x
    return conv


class Quantised(torch.Tensor):
    """A tensor subclass, as torchao's quantised weights and FSDP's shards are."""


def quantised():
    conv = depthwise()
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Quantised))
    return conv


def tied():
    conv, other = depthwise(), depthwise()
    other.weight = conv.weight
    return nn.Sequential(conv, other)


LEFT = {
    'stride': (lambda: depthwise(padding=3, stride=2), 'has stride 2×2'),
    'dilation': (lambda: depthwise(padding=6, dilation=2), 'has dilation 2×2'),
    'even': (lambda: depthwise(size=8), 'has an even kernel, 8×8'),
    'mode': (lambda: depthwise(padding_mode='circular'), "has padding_mode 'circular'"),
    'valid': (lambda: depthwise(padding='valid'), "has padding 'valid', which does not keep the size"),
    'padding': (lambda: depthwise(padding=(3, 2)), 'has padding 3×2, which does not keep the size'),
    'small': (lambda: depthwise(size=(5, 9)), 'is 5×9, with a side shorter than min_size = 7'),
    'large': (lambda: depthwise(size=15), 'is 15×15, larger than kernel_size = 13×13'),
    'two': (lambda: nn.Conv2d(6, 12, 7, padding=3, groups=6), 'has 2 kernels per channel'),
    'sequence': (lambda: nn.Conv1d(6, 6, 7, padding=3, groups=6), 'is a Conv1d'),
    'doubled': (lambda: Doubled(6, 6, 7, padding=3, groups=6), 'is a Doubled with a forward of its own'),
    'assigned': (assigned, 'is a Conv2d with a forward of its own'),
    'merged': (
        lambda: MergedConv2d(6, 6, 7, 1, 3, 1, 6), 'is a MergedConv2d with a forward of its own'),
    'strided': (lambda: Conv2dSame(6, 6, 7, 2, groups=6), 'has stride 2×2'),
    'hooked': (hooked, 'has hooks'),
    'parametrised': (
        lambda: nn.utils.parametrizations.weight_norm(depthwise()), 'computes its weight from others'),
    'pruned': (lambda: prune.l1_unstructured(depthwise(), 'weight', 3), 'computes its weight from others'),
    'quantised': (quantised, 'computes its weight from others'),
}


def test_what_cannot_be_replaced_is_left_alone_and_the_report_says_why():
    model = nn.ModuleDict({name: make() for name, (make, _) in LEFT.items()})
    model['tied'], model['dense'], model['good'] = tied(), nn.Conv2d(6, 6, 7, padding=3), depthwise()
    model['merging'] = Merging(nn.Sequential(depthwise()))
    before = dict(model.named_modules())
    report = replace_depthwise(model, 13)
    assert [row.name for row in report.replaced] == ['good'] and isinstance(model['good'], SMPConv2d)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items() if name != 'good')
    assert parametrize.is_parametrized(model['parametrised'])
    reasons = {name: reason for name, (_, reason) in LEFT.items()}
    reasons.update({
        'tied.0': 'shares its weight with tied.1', 'tied.1': 'shares its weight with tied.0',
        'merging.0.0': 'is part of a Merging, which reads its weight to merge it'})
    assert report.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert report.left[name].startswith(reason), name
    text = str(report)
    assert all(name in text for name in ('good', '7×7 → 13×13', '(has stride 2×2): stride, strided.'))


@pytest.mark.parametrize('make', [
    lambda: Conv2dSame(6, 6, 7, groups=6),
    lambda: DepthwiseConv2d(6, 7),
    lambda: nn.Conv2d(6, 6, 7, padding='same', groups=6, bias=False),
    lambda: nn.Conv2d(1, 1, 7, padding=3),
])
def test_what_computes_a_plain_convolution_is_replaced(make):
    model = nn.Sequential(make())
    x = torch.randn(2, model[0].in_channels, 5, 8)
    expected = model(x)
    replace_depthwise(model, 9)
    assert isinstance(model[0], SMPConv2d) and difference(model(x), expected) < TOLERANCE[torch.float32]


def test_a_dict_names_modules_or_old_sizes_and_its_first_match_decides():
    model = nn.ModuleDict({'a': Net(), 'b': Net(), 'c': depthwise(size=9)})
    report = replace_depthwise(model, {'a.*.3': (5, 11), 'a.*': 13, (7, 7): None, 9: 9}, min_size=5)
    assert {row.name: (row.old_size, row.kernel_size, row.points) for row in report.replaced} == {
        'a.first': ((7, 7), (13, 13), 79), 'a.rest.3': ((5, 5), (5, 11), 32), 'b.first': ((7, 7), (7, 7), 49),
        'c': ((9, 9), (9, 9), 81)}
    assert report.left == {'b.rest.3': 'is matched by no entry of kernel_size'}


def test_a_module_in_two_places_stays_one():
    conv = depthwise()
    model = nn.Sequential(conv, nn.GELU(), conv, nn.Sequential(conv))
    x = torch.randn(1, 6, 8, 8)
    expected = model(x)
    report = replace_depthwise(model)
    assert [row.name for row in report.replaced] == ['0']
    assert isinstance(model[0], SMPConv2d) and model[0] is model[2] and model[0] is model[3][0]
    assert difference(model(x), expected) < TOLERANCE[torch.float32]


def test_parameters_and_modes_stay_what_they_were():
    model = Net()
    bias = model.first.bias
    model.first.weight.requires_grad_(False)
    model.rest.eval()
    replace_depthwise(model, min_size=5, images=torch.randn(2, 6, 9, 9))
    assert model.first.bias is bias and bias.requires_grad
    assert not any(p.requires_grad for p in model.first.kernel.parameters())
    assert all(p.requires_grad for p in model.rest[3].kernel.parameters())
    assert model.training and model.first.training and not model.rest[3].training
    assert model.norm.num_batches_tracked == 0


def test_the_fit_is_deterministic_and_draws_nothing():
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    state = torch.get_rng_state()
    replace_depthwise(nets[0], {7: 13, 5: 5}, 5, points=30, images=torch.ones(1, 6, 9, 9))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode(), torch.autocast('cpu', dtype=torch.bfloat16):
        replace_depthwise(nets[1], {7: 13, 5: 5}, 5, points=30)
    for (key, value), other in zip(nets[0].named_parameters(), nets[1].parameters()):
        assert torch.equal(value, other) and value.requires_grad and not other.is_inference(), key


def test_a_checkpoint_loads_into_a_network_replaced_without_fit():
    nets = [Net().eval() for _ in range(2)]
    replace_depthwise(nets[0], 13, min_size=5)
    replace_depthwise(nets[1], 13, min_size=5, fit=False)
    x = torch.randn(1, 6, 9, 9)
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](x), nets[1](x))
    with torch.device('meta'):
        net = Net()
    report = replace_depthwise(net, 13, min_size=5, fit=False, images=x)
    assert report.logits is None and math.isnan(report.replaced[0].error)
    net.load_state_dict(nets[0].state_dict(), assign=True)
    assert torch.equal(net.eval()(x), nets[0](x))


def test_without_fit_kernels_start_as_those_of_a_new_layer():
    model = nn.Sequential(depthwise())
    torch.manual_seed(3)
    report = replace_depthwise(model, 13, fit=False, points=20)
    torch.manual_seed(3)
    new = SMPConv2d(6, 6, 13, padding=6, groups=6, points=20)
    assert model[0].kernel.state_dict().keys() == new.kernel.state_dict().keys()
    for key, value in new.kernel.state_dict().items():
        assert torch.equal(model[0].kernel.state_dict()[key], value), key
    assert report.replaced[0].error > 0.5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_moves_by_rounding(dtype):
    model = nn.Sequential(depthwise()).to(dtype)
    conv, x = model[0], torch.randn(1, 6, 9, 9, dtype=dtype)
    report = replace_depthwise(model, 13, images=x.float())
    assert model[0].kernel.weight.dtype == dtype and model[0].kernel.coords.dtype == torch.float32
    assert report.replaced[0].error < torch.finfo(dtype).eps
    assert difference(model(x), conv(x)) < TOLERANCE[dtype]


def test_kernels_of_zeros_stay_zeros():
    for points in (12, 49):
        model = nn.Sequential(depthwise(), depthwise())
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[1].weight[:1])
        reports = replace_depthwise(model, points=points).replaced
        assert (model[0].render() == 0).all() and reports[0][4:] == (0, 0)
        assert difference(model[1].render()[:1], torch.zeros(1, 1, 7, 7)) == 0 and 0 < reports[1].worst < 1


class Outputs(nn.Module):
    """Returns its features in containers, as segmentation networks do."""

    def __init__(self):
        super().__init__()
        self.conv = depthwise()

    def forward(self, x):
        y = self.conv(x)
        return {'out': y, 'aux': [y[:, :1] * 2, (None, 'text')]}


class Boxes(Outputs):
    def forward(self, x):
        y = self.conv(x)
        return y[y > (2 if isinstance(self.conv, SMPConv2d) else 0)]


def test_the_outputs_are_compared_in_evaluation_mode():
    model, x = Outputs(), torch.randn(2, 6, 9, 9)
    before = model.conv(x)
    logits = replace_depthwise(model, points=12, images=x).logits
    after, before = (torch.cat([y.flatten(), 2 * y[:, 0].flatten()]) for y in (model.conv(x), before))
    assert logits > 0.01 and math.isclose(logits, ((after - before).norm() / before.norm()).item(), rel_tol=1e-4)
    assert replace_depthwise(Boxes(), images=x).logits is None
    assert replace_depthwise(Net()).logits is None
    assert math.isnan(replace_depthwise(Outputs(), images=math.nan * x).logits)
    net = Net()  # in training mode, with dropout
    assert replace_depthwise(net, images=x).logits < 1e-5


class Particular(nn.Module):
    """A network that reads the weight of its convolution."""

    def __init__(self, error=None):
        super().__init__()
        self.conv, self.error = depthwise(), error
        self.other = nn.Sequential(self.conv, nn.Dropout())

    def forward(self, x):
        if self.error and not isinstance(self.conv, nn.Conv2d):
            raise self.error
        return F.conv2d(x, self.conv.weight, padding=3, groups=6)


@pytest.mark.parametrize('error', [None, KeyboardInterrupt()])
def test_an_error_leaves_the_network_as_it_was(error):
    model = Particular(error)
    model.other.eval()
    before = snapshot(model)
    with pytest.raises(AttributeError if error is None else KeyboardInterrupt):
        replace_depthwise(model, images=torch.randn(1, 6, 9, 9))
    assert_unchanged(model, before)


BAD = [
    (dict(kernel_size=8), 'kernel_size must be one or two positive odd integers, got 8'),
    (dict(kernel_size=(7, 7, 7)), 'kernel_size must be one or two positive odd integers, got (7, 7, 7)'),
    (dict(kernel_size={7: 12}), 'kernel_size must be one or two positive odd integers, got 12'),
    (dict(kernel_size={0: 13}), 'an old size in kernel_size must be one or two positive integers, got 0'),
    (dict(kernel_size={'first': 13, 'last': 13}), "that no entry before it matches, got 'last', which matches none"),
    (dict(kernel_size={'*': 13, 7: 15}), 'that no entry before it matches, got (7, 7), which matches none'),
    (dict(kernel_size={}), 'got Net, where first is matched by no entry of kernel_size, and 1 more'),
    (dict(min_size=9), 'got Net, where first is 7×7, with a side shorter than min_size = 9, and 1 more'),
    (dict(kernel_size=5), 'got Net, where first is 7×7, larger than kernel_size = 5×5, and 1 more'),
    (dict(min_size=0), 'min_size must be an integer of at least 1, got 0'),
    (dict(points=2.5), 'points must be an integer of at least 1, got 2.5'),
    (dict(images=torch.ones(1, 6, 9, 9, dtype=torch.uint8)), 'images must be a floating-point tensor, got torch.uint8'),
]


@pytest.mark.parametrize('kwargs,message', BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused_in_one_sentence(kwargs, message):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        replace_depthwise(model, **kwargs)
    assert '\n' not in str(error.value)
    assert_unchanged(model, before)


def test_bad_networks_are_refused_in_one_sentence():
    broken, meta = Net(), Net().to('meta')
    broken.rest[3].weight.data[2, 0, 1, 1] = math.nan
    narrow = timm.create_model('convnext_atto', patch_size=2)
    narrow.pretrained_cfg = dict(narrow.pretrained_cfg, input_size=(3, 0, 0))
    for model, message in (
            (nn.Sequential(nn.Conv2d(3, 3, 7)), 'depthwise convolution that can be replaced, got Sequential without'),
            (depthwise(), 'got Conv2d, where the convolution is the model itself'),
            (broken, 'finite kernels to fit points to, got NaN or infinity in rest.3.weight'),
            (meta, 'finite kernels to fit points to, got the meta device in first.weight'),
            (narrow, 'images must be given for a model that fails on random ones, got ')):
        objects = dict(model.named_modules())
        with pytest.raises(ValueError, match=re.escape(message)):
            replace_depthwise(model, min_size=5)
        assert all(module is objects[name] for name, module in model.named_modules())


def test_convnext_goes_on_merges_and_trains():
    model = timm.create_model('convnext_atto', num_classes=5, ls_init_value=1., in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = model(x)
    report = replace_depthwise(model, {'stages.0.*': 31, 'stages.1.*': 13, 'stages.2.*': None})
    assert len(report.replaced) == 10 and len(report.left) == 2 and report.logits < 1e-5
    with torch.no_grad():
        merged = reparameterize_model(model)
        assert difference(model(x), expected) < 1e-4 and difference(merged(x), expected) < 1e-4
    assert not any(isinstance(m, SMPConv2d) for m in merged.modules())
    optimizer = timm.optim.create_optimizer_v2(model.train(), opt='smpadamw', lr=1e-2, weight_decay=0.05)
    points = [m.kernel for m in model.modules() if isinstance(m, SMPConv2d)]
    before = [kernel.coords.clone() for kernel in points]
    F.cross_entropy(model(x), torch.tensor([0, 3])).backward()
    optimizer.step()
    for kernel, coords in zip(points, before):
        low, high = kernel.radius_range
        assert low <= kernel.radius.min() and kernel.radius.max() <= high
        assert (kernel.coords != coords).all(-1)[0, :49].any()


def test_mobilenetv4_goes_on():
    model = timm.create_model('mobilenetv4_conv_small', num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64)
    report = replace_depthwise(model, min_size=5, images=images)
    assert {row.name.split('.')[-2] for row in report.replaced} == {'dw_start', 'dw_mid'}
    assert {row.old_size for row in report.replaced} == {(5, 5)} and report.logits < 1e-5
    assert {'has stride 2×2', 'is 3×3, with a side shorter than min_size = 5'} == set(report.left.values())
    with torch.no_grad():
        assert difference(reparameterize_model(model)(images), model(images)) < TOLERANCE[torch.float32]


def test_resizing_takes_a_third_of_the_response_of_a_replaced_kernel():
    model = nn.Sequential(depthwise(bias=False, dtype=torch.float64))
    nn.init.ones_(model[0].weight)
    replace_depthwise(model)
    found = [model[0].resize(k).render()[0].sum().item() / 49 for k in (7, 11, 13)]
    assert abs(found[0] - 1) < 1e-6 and min(found[1:]) > 0.65 and max(found[1:]) < 0.7  # docs/replace.md tells it
