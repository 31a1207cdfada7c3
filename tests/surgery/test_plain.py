"""`to_plain` against the merged model, and against a network written here with PyTorch's modules alone.

Tools that look inside (captum, NNCF, torchao) see the same in both.
"""
import copy
import io
import pickle
from collections import Counter

import captum.attr
import nncf
import pytest
import torch
import torch.fx
import torch.nn as nn
from captum.attr._utils.lrp_rules import EpsilonRule, IdentityRule
from conftest import FAMILIES, TOLERANCE, difference, small_model, wake_weights
from timm.utils import reparameterize_model
from torch.nn.utils import prune

from timm_smpconv import RepSMPConv2d, SMPConv1d, SMPConv2d, to_plain
from timm_smpconv.layers.heads import SelectSequencePool
from timm_smpconv.layers.merged import MergedBlock, MergedConv1d, MergedConv2d, MergedLargeConv2d

CONVOLUTIONS, ACTIVATIONS = (nn.Conv1d, nn.Conv2d), (nn.ReLU, nn.GELU)


@pytest.fixture(params=FAMILIES)
def family(request):
    """A merged model and an input of it."""
    make, shape = FAMILIES[request.param]
    return reparameterize_model(wake_weights(make().eval())), torch.randn(shape)


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def independent(state):
    """The network of a merged state dict of the ImageNet family, three channels in, without a class of the package."""
    def conv(name, stride=1):
        weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
        out, per_group, k, _ = weight.shape
        groups = out if per_group == 1 else 1
        module = nn.Conv2d(per_group * groups, out, k, stride, k // 2, groups=groups)
        module.weight, module.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        return module

    layers = []
    for i, stride in enumerate((2, 1, 1, 2)):
        layers += [conv(f'stem.{i}.conv', stride), nn.ReLU()]
    for stage in range(4):
        if f'stages.{stage}.downsample.0.conv.weight' in state:
            layers += [conv(f'stages.{stage}.downsample.0.conv'), nn.ReLU()]
            layers += [conv(f'stages.{stage}.downsample.1.conv', 2), nn.ReLU()]
        i = 0
        while f'stages.{stage}.blocks.{i}.pw1.weight' in state:
            name = f'stages.{stage}.blocks.{i}'
            inner = [nn.ReLU(), conv(f'{name}.dwconv'), nn.ReLU()] if i % 2 == 0 else [nn.GELU()]
            layers.append(Residual(conv(f'{name}.pw1'), *inner, conv(f'{name}.pw2')))
            i += 1
    fc = nn.Linear(*reversed(state['head.fc.weight'].shape))
    fc.weight, fc.bias = (nn.Parameter(state[f'head.fc.{name}'].clone()) for name in ('weight', 'bias'))
    return nn.Sequential(*layers, conv('head.norm.conv'), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc).eval()


def test_every_module_is_one_of_pytorch(family):
    merged, x = family
    plain = to_plain(merged)
    leaves = [m for m in plain.modules() if not list(m.children())]
    assert {type(m) for m in leaves} <= {
        *CONVOLUTIONS, *ACTIVATIONS, nn.Identity, nn.Dropout, nn.Linear, nn.ConstantPad1d, nn.Flatten,
        nn.AdaptiveAvgPool2d, SelectSequencePool}
    assert not any(m.inplace for m in leaves if isinstance(m, (nn.ReLU, nn.Dropout)))
    calls = Counter()
    for module in leaves:
        module.register_forward_hook(lambda m, inputs, output: calls.update([m]))
    plain(x)
    called = [m for m in leaves if isinstance(m, (*CONVOLUTIONS, *ACTIVATIONS))]
    assert called and all(calls[m] == 1 for m in called)
    merged_convolutions = [m for m in merged.modules() if isinstance(m, CONVOLUTIONS)]
    assert len([m for m in leaves if isinstance(m, CONVOLUTIONS)]) == len(merged_convolutions)


def test_logits_and_gradients(family):
    merged, x = family
    before = copy.deepcopy(merged.state_dict())
    plain = to_plain(merged)
    assert str(merged) != str(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    results = []
    for network in (merged, plain):
        inputs = x.clone().requires_grad_()
        logits = network(inputs)
        logits.square().sum().backward()
        results.append([logits, inputs.grad, *(p.grad for p in network.parameters())])
    for actual, expected in zip(*reversed(results)):
        assert difference(actual, expected) < 1e-4
    assert difference(results[1][0], results[0][0]) < TOLERANCE[torch.float32]
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


def test_a_merged_checkpoint_loads(family):
    merged, x = family
    plain = to_plain(merged)
    expected = plain(x)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(x), expected)


def test_inplace_and_again(family):
    merged, x = family
    expected = to_plain(merged)(x)
    plain = to_plain(merged, inplace=True)
    assert plain is merged
    twice = to_plain(plain)
    assert str(twice) == str(plain) and torch.equal(plain(x), expected) and torch.equal(twice(x), expected)
    assert str(reparameterize_model(plain)) == str(plain)


@pytest.mark.parametrize('training', [True, False])
def test_modes_and_what_needs_gradients_stay(family, training):
    merged, _ = family
    merged.train(training)
    first, *_ = merged.parameters()
    first.requires_grad_(False)
    plain = to_plain(merged)
    assert all(m.training == training for m in plain.modules())
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in merged.parameters()]


def test_script_and_trace(family):
    merged, x = family
    plain = to_plain(merged)
    expected = plain(x)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(plain), buffer)
    buffer.seek(0)
    for network in (torch.jit.load(buffer), torch.fx.symbolic_trace(plain), pickle.loads(pickle.dumps(plain))):
        assert difference(network(x), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('name,strict', [
    ('images', False), ('CIFAR-10', True), ('sequences', True), pytest.param('images', True, marks=pytest.mark.slow)])
def test_export(name, strict):
    make, shape = FAMILIES[name]
    merged, x = reparameterize_model(wake_weights(make().eval())), torch.randn(shape)
    plain = to_plain(merged)
    program = torch.export.export(plain, (x,), strict=strict)
    assert {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)} == {'aten'}
    assert difference(program.module()(x), plain(x)) < TOLERANCE[torch.float32]


def test_layers_in_other_networks():
    """A causal convolution needs its padding, an activation a module: both beside the convolution."""
    model = nn.Sequential(
        SMPConv2d(3, 3, 9, padding=4, groups=3), SMPConv2d(3, 4, 9, padding='same'), RepSMPConv2d(4, 7),
        nn.SiLU(inplace=True), nn.Flatten(2), SMPConv1d(4, 6, 8, causal=True), SMPConv1d(6, 6, 5, padding=2, groups=6))
    merged = reparameterize_model(wake_weights(model).eval())
    assert {type(m) for m in merged} == {MergedConv2d, MergedLargeConv2d, MergedConv1d, nn.SiLU, nn.Flatten}
    plain = to_plain(merged)
    x = torch.randn(2, 3, 8, 9)
    assert [type(m) for m in plain] == [
        nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.SiLU, nn.Flatten, nn.Sequential, nn.Conv1d]
    assert [type(m) for m in plain[5]] == [nn.ConstantPad1d, nn.Conv1d]
    assert difference(plain(x), merged(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('activation,kinds', [('none', None), ('relu', nn.ReLU), ('gelu', nn.GELU)])
def test_one_convolution(activation, kinds):
    conv = MergedConv2d(4, 6, (3, 5), 2, (0, 2), (1, 2), 2, activation=activation)
    plain = to_plain(conv)
    assert type(plain) is nn.Conv2d if kinds is None else [type(m) for m in plain] == [nn.Conv2d, kinds]
    x = torch.randn(1, 4, 9, 12) * 100
    assert difference(plain(x), conv(x)) < TOLERANCE[torch.float32]
    with torch.no_grad():
        assert difference(plain(x), conv(x.contiguous(memory_format=torch.channels_last))) < TOLERANCE[torch.float32]


def test_a_block_keeps_the_activations_behind_its_convolutions():
    block = MergedBlock(
        MergedConv2d(4, 4, 1, activation='relu'), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(),
        MergedConv2d(4, 4, 1, activation='gelu'))
    plain = to_plain(block)
    assert [type(m) for m in plain.act1] == [nn.ReLU, nn.Tanh] and type(plain.act2) is nn.Sigmoid
    x = torch.randn(1, 4, 5, 6)
    assert difference(plain(x), block(x)) < TOLERANCE[torch.float32]


def test_a_model_that_is_not_merged(model):
    with pytest.raises(ValueError, match=r'model must be merged .* got SMPConvNet with the kernel stages\.0\.'):
        to_plain(model)


def attributions(model, x):
    """By methods that change the gradient of each module. LRP has no rule for some: there the relevance passes on."""
    x = x.clone().requires_grad_()
    found = [
        captum.attr.DeepLift(model).attribute(x, torch.zeros_like(x), target=1),
        captum.attr.GuidedBackprop(model).attribute(x, target=1),
        captum.attr.Deconvolution(model).attribute(x, target=1),
    ]
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.rule = IdentityRule()
        elif isinstance(module, nn.Flatten):
            module.rule = EpsilonRule()
    return [*found, captum.attr.LRP(model).attribute(x, target=1)]


@pytest.mark.filterwarnings('ignore:Setting (forward, )?backward hooks')  # captum, of what it does
@pytest.mark.filterwarnings('ignore:Input Tensor .* did not already require gradients')
def test_captum():
    merged = reparameterize_model(small_model())
    x = torch.randn(2, 3, 64, 64)
    plain = to_plain(merged)
    plain.stages[0].downsample = nn.Dropout(0.).eval()  # LRP mistakes what an Identity passes on
    actual, expected = attributions(plain, x), attributions(independent(merged.state_dict()), x)
    for name, one, other in zip(('DeepLift', 'GuidedBackprop', 'Deconvolution', 'LRP'), actual, expected):
        assert other.any() and difference(one, other) < 1e-3, name
    assert difference(actual[0], actual[1]) > 0.1


@pytest.mark.slow
def test_nncf():
    """It quantises the weights of all convolutions and of the classifier, and what goes into them."""
    plain = to_plain(reparameterize_model(small_model()))
    # Without the correction of biases it does not run what it quantised, for which it compiles C++ code.
    quantized = nncf.quantize(
        plain, nncf.Dataset(list(torch.randn(4, 1, 3, 64, 64))), subset_size=4,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True))
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in plain.modules())
    quantizers = [name for name, m in quantized.named_modules() if 'Quantizer' in type(m).__name__]
    assert sum('pre_hooks' in name and name.endswith('__1.0') for name in quantizers) == layers  # the second argument
    assert len(quantizers) >= 2 * layers


@pytest.mark.slow
def test_pt2e():
    """Every convolution takes quantised weights and a quantised input."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain = to_plain(reparameterize_model(small_model()))
    images = torch.randn(4, 3, 64, 64)
    exported = torch.export.export(plain, (images,), strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    prepared(images)
    quantized = convert_pt2e(prepared)
    convolutions = [n for n in quantized.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    for node in convolutions:
        assert all('dequantize_per' in str(source.target) for source in node.args[:2]), node
    assert difference(quantized(images), plain(images)) < 0.1


@pytest.mark.parametrize('add, message', [
    (lambda m: prune.l1_unstructured(m, 'weight', 0.5), r'the forward pre-hook L1Unstructured \(prune.remove'),
    (lambda m: m.register_forward_hook(lambda *args: None), r'the forward hook <lambda> \(handle.remove'),
    (nn.utils.parametrizations.weight_norm, r'a parametrization \(parametrize.remove_parametrizations')])
@pytest.mark.parametrize('where', ['stages.1.blocks.0.pw1', 'stem.1.conv', 'head.norm.conv'])
def test_what_would_be_lost_is_refused(add, message, where):
    merged = reparameterize_model(small_model())
    add(merged.get_submodule(where))
    with pytest.raises(ValueError, match=f'model must be as it was merged, got {where} with {message}'):
        to_plain(merged)
