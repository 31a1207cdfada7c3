"""What counters of operations and parameters report, against counts from the shapes of convolutions."""
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from conftest import IMAGENET_MODELS, small_model
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary

from timm_smpconv import causal_conv1d, large_conv2d, to_plain
from timm_smpconv.ops import dense

SIZE = (3, 96, 128)  # the last maps are 3×4: no part of a kernel meets padding alone, which would not be computed


def published():
    """Model → (GMACs, parameters) of the merged networks, from the table in docs/deployment.md."""
    page = (Path(__file__).parents[2] / 'docs' / 'deployment.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(smpconv_\w+)` \| ([\d.]+) \| ([\d,]+) \|$', page, re.MULTILINE)
    return {name: (float(macs), int(parameters.replace(',', ''))) for name, macs, parameters in rows}


def macs_of(model, x):
    """Multiplications of the convolutions and linear layers of a merged network, by the shapes that they meet."""
    counts = []

    def count(module, inputs, output):
        counts.append(output.numel() * module.weight[0].numel())

    layers = (nn.Conv1d, nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, layers)]
    model(x)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter


def rendering(counter):
    """The products that render the kernels."""
    return sum(n for name, n in counter.get_flop_counts()['Global'].items() if 'bmm' in str(name))


@pytest.mark.parametrize('name', IMAGENET_MODELS)
def test_published_counts_of_merged_networks(name):
    model = timm.create_model(name, inference_mode=True, device='meta').eval()
    x = torch.empty(1, 3, 224, 224, device='meta')
    macs, parameters = published()[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(macs_of(model, x) / 1e9, 3) == macs
    assert flops(model, x).get_total_flops() == 2 * macs_of(model, x)


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('chosen', ['native', 'fft'])
def test_flop_counter(grad, chosen, fastest):
    """The whole of a model: before merging, too, where a block has one small convolution more."""
    fastest(chosen)
    model = small_model()
    merged = reparameterize_model(model)
    x = torch.randn(2, *SIZE)
    expected = 2 * macs_of(merged, x)
    small = []
    for module in model.modules():
        if hasattr(module, 'large'):
            module.small.conv.register_forward_hook(lambda m, i, y: small.append(2 * y.numel() * m.weight[0].numel()))
        elif module is model.head.norm:
            module.register_forward_hook(lambda m, i, y: small.append(-2 * y.numel()))
    with torch.set_grad_enabled(grad):
        assert flops(merged, x).get_total_flops() == flops(to_plain(merged), x).get_total_flops() == expected
        counter = flops(model, x)
    assert rendering(counter) > 0
    assert counter.get_total_flops() - rendering(counter) == expected + sum(small)


@pytest.mark.parametrize('recorded,passes', [((), 0), ((0,), 1), ((1,), 1), ((0, 1), 2)])
@pytest.mark.parametrize('function,shapes,arguments', [
    (causal_conv1d, ((2, 4, 20), (6, 2, 20)), (None, 2)),
    (large_conv2d, ((2, 3, 12, 14), (4, 3, 9, 11)), ()),
])
def test_flops_of_transforms_are_those_of_the_direct_convolution(
        recorded, passes, function, shapes, arguments, monkeypatch):
    """And as many for each gradient."""
    monkeypatch.setattr(dense, 'choose_over_channels', lambda *args: 'fft')
    x, weight = (torch.randn(shape) for shape in shapes)
    for i in recorded:
        (x, weight)[i].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = function(x, weight, *arguments)
    expected = 2 * y.numel() * weight[0].numel()
    assert counter.get_total_flops() == expected
    if recorded:
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == passes * expected


def test_torchinfo():
    """It multiplies parameters, biases among them, by positions."""
    model = reparameterize_model(small_model())
    biases = []
    hooks = [
        m.register_forward_hook(lambda m, i, y: biases.append(y.numel()))
        for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    macs = macs_of(model, torch.randn(1, *SIZE))
    for hook in hooks:
        hook.remove()
    for network in (model, to_plain(model)):
        found = summary(network, (1, *SIZE), verbose=0)
        assert found.total_mult_adds == macs + sum(biases)
        assert found.total_params == sum(p.numel() for p in model.parameters())
