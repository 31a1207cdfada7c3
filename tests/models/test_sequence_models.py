"""The CIFAR-10 and sequence networks as timm users meet them. Their numbers: test_authors_networks.py."""
import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import reference_smp
import timm
import torch
import torch.nn as nn
from conftest import SEQUENCE_MODELS, TOLERANCE, difference, shake_norms, wake_weights
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

from timm_smpconv import CheckpointError, MergeError, SMPKernel, prepack
from timm_smpconv.layers.merged import MergedConv1d, MergedLargeConv2d
from timm_smpconv.ops import use_backend
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn

FACTS = {  # name: (parameters, input, classes, kernel size, start radius, bias, dropout, dropout of the input)
    'smpconv_resnet_cifar10': (489_646, (3, 32, 32), 10, (33, 33), .12, False, .1, 0.),
    'smpconv_tcn_smnist': (370_960, (1, 28, 28), 10, (784,), .002, False, 0., .1),
    'smpconv_tcn_pmnist': (370_960, (1, 28, 28), 10, (784,), .002, False, 0., .1),
    'smpconv_tcn_scifar10': (373_480, (3, 32, 32), 10, (1024,), .002, True, 0., 0.),
    'smpconv_tcn_ct': (373_790, (3, 1, 182), 20, (182,), .012, True, 0., 0.),
    'smpconv_tcn_sc': (391_840, (20, 1, 161), 10, (161,), .012, True, .2, 0.),
    'smpconv_tcn_scraw': (370_960, (1, 1, 16000), 10, (16000,), .0002, False, .1, 0.),
}
SMALL = {
    'smpconv_resnet_cifar10': dict(dims=(6, 6, 8), kernel_size=9, points=5),
    'smpconv_tcn_smnist': dict(seq_len=24, dim=6, depth=3, points=5, radius=0.2, in_chans=3),
    'smpconv_tcn_pmnist': dict(seq_len=24, dim=6, depth=3, points=5, radius=0.2, in_chans=3),
}


def small(name, **kwargs):
    """A narrow network that depends on its input, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL[name], 'num_classes': 7, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, SMPKernel):
            nn.init.uniform_(module.coords, -1, 1)
            nn.init.uniform_(module.radius, 0.1, 0.8)
    return wake_weights(shake_norms(model))


def inputs(name, batch=2, **dd):
    return torch.randn(batch, 3, *((7, 8) if 'resnet' in name else (4, 6)), **dd)


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return small(name)


@pytest.fixture
def x(name):
    return inputs(name)


@pytest.mark.parametrize('full', FACTS)
def test_numbers_of_the_paper(full):
    parameters, size, classes, kernel_size, radius, bias, drop, input_drop = FACTS[full]
    model = timm.create_model(full)
    assert sum(p.numel() for p in model.parameters()) == parameters
    cfg = model.pretrained_cfg
    assert (cfg['input_size'], cfg['num_classes'], len(cfg['mean'])) == (size, classes, size[0])
    assert (model.in_chans, model.num_classes, model.get_classifier().out_features) == (size[0], classes, classes)
    kernels = [m for m in model.modules() if isinstance(m, SMPKernel)]
    assert len(kernels) == (15 if 'resnet' in full else 12)
    for kernel in kernels:
        assert tuple(kernel.size) == kernel_size and kernel.radius_range == (1e-4, 1.) and kernel.average
        assert kernel.radius.unique().tolist() == pytest.approx([radius])
        assert kernel.coords.shape[1] == (16 if 'resnet' in full else 30)
    convs = [m for m in model.modules() if hasattr(m, 'kernel')]
    assert {m.bias is not None for m in convs} == {bias}
    rates = [m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and n.startswith('blocks')]
    assert set(rates) == {drop} and model.stem.drop.p == input_drop


def test_starts_as_in_the_paper():
    resnet, tcn = timm.create_model('smpconv_resnet_cifar10'), timm.create_model('smpconv_tcn_sc')
    assert abs(resnet.blocks[6].conv2.small.conv.weight.std().item() - 0.02) < 2e-3
    assert abs(resnet.blocks[5].shortcut.weight.std().item() - 0.02) < 2e-3
    assert resnet.blocks[5].shortcut.bias.abs().max() == 0
    assert abs(resnet.head.fc.weight.std().item() - (2 / 48) ** 0.5) < 0.03  # Kaiming normal
    assert abs(resnet.blocks[0].conv1.large.conv.kernel.coords.std().item() - 0.05) < 0.01
    assert abs(tcn.blocks[3].conv1.small.conv.weight.std().item() - 0.02) < 2e-3
    assert abs(tcn.head.fc.weight.std().item() - 0.01) < 2e-3
    assert tcn.blocks[0].shortcut.weight.abs().max() <= 20 ** -0.5  # torch's own for nn.Conv1d
    assert resnet.head.fc.bias.abs().max() == tcn.head.fc.bias.abs().max() == 0
    assert sorted(n for n, _ in resnet.named_parameters() if n.endswith('small.conv.bias')) == [
        'stem.conv1.small.conv.bias']


def test_images_are_read_row_by_row():
    model = small('smpconv_tcn_smnist')
    x = torch.randn(2, 3, 4, 6)
    rows = torch.cat([x[:, :, row] for row in range(4)], -1)
    assert torch.equal(model(x), model(rows))
    assert not torch.equal(model(x), model(x.transpose(2, 3)))


def test_the_permutation_is_the_authors_and_in_the_state_dict():
    model = timm.create_model('smpconv_tcn_pmnist')
    np.random.seed(0)
    assert model.stem.permutation.tolist() == np.random.permutation(784).tolist()
    assert 'stem.permutation' in model.state_dict()
    plain, permuted = small('smpconv_tcn_smnist'), small('smpconv_tcn_pmnist')
    x = torch.randn(2, 3, 24)
    assert torch.equal(permuted(x), plain(x[..., permuted.stem.permutation]))
    state = permuted.state_dict()
    state['stem.permutation'] = state['stem.permutation'].flip(0)
    permuted.load_state_dict(state)
    assert torch.equal(permuted(x), plain(x[..., state['stem.permutation']]))


def test_shorter_sequences_see_the_recent_end_of_the_kernel():
    model = small('smpconv_tcn_smnist').double()
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    # Features of a causal network do not depend on what follows.
    whole, part = model.forward_features(x), model.forward_features(x[..., :9])
    assert difference(part, whole[..., :9]) < TOLERANCE[torch.float64]


def test_merging(name, model, x):
    before = model.state_dict()
    merged = reparameterize_model(model)
    assert not any(isinstance(m, (SMPKernel, nn.modules.batchnorm._BatchNorm)) for m in merged.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert difference(merged(x), model(x)) < TOLERANCE[torch.float32]
    empty = timm.create_model(name, num_classes=7, inference_mode=True, **SMALL[name]).eval()
    assert [(n, type(m)) for n, m in empty.named_modules()] == [(n, type(m)) for n, m in merged.named_modules()]
    empty.load_state_dict(merged.state_dict())
    assert torch.equal(empty(x), merged(x))
    inplace = copy.deepcopy(model)
    assert reparameterize_model(inplace, inplace=True) is inplace
    assert torch.equal(inplace(x), merged(x))
    with torch.no_grad(), use_backend('fft'):
        expected = model(x)
        packed = prepack(merged)
        for _ in range(2):  # the second time from the kept transforms
            assert difference(packed(x), expected) < TOLERANCE[torch.float32]
        convs = [m for m in packed.modules() if isinstance(m, (MergedConv1d, MergedLargeConv2d))]
        assert all(m.kept._derived is not None for m in convs) and len(convs) > 2


def test_merged_heads_and_classifiers_mean_the_same(model, x):
    merged = reparameterize_model(model)
    for net in (model, merged):
        features = net.forward_features(x)
        assert torch.equal(net.get_classifier()(net.forward_head(features, pre_logits=True)), net(x))


def test_a_merge_that_is_refused_leaves_the_callers_model_alone(model, x):
    model.blocks[-1].conv2.small.bn = nn.GroupNorm(1, model.blocks[-1].conv2.small.conv.out_channels)
    expected, names = model(x), [n for n, _ in model.named_modules()]
    with pytest.raises(MergeError, match=r'^conv2\.small\.bn must be a BatchNorm or an Identity .* got GroupNorm'):
        reparameterize_model(model)
    assert names == [n for n, _ in model.named_modules()] and torch.equal(model(x), expected)


@pytest.mark.parametrize('merged', [False, True])
def test_checkpoints_of_the_other_kind_are_refused_by_the_filter(name, model, merged):
    state = (model if merged else reparameterize_model(model)).state_dict()
    other = timm.create_model(name, num_classes=7, inference_mode=merged, **SMALL[name])
    with pytest.raises(CheckpointError, match=r'merged .*timm\.utils\.reparameterize_model'):
        checkpoint_filter_fn(state, other)


@pytest.mark.parametrize('source,target', [
    ('smpconv_tcn_smnist', 'smpconv_tcn_scraw'), ('smpconv_tcn_scraw', 'smpconv_tcn_smnist'),
    ('smpconv_tcn_scifar10', 'smpconv_tcn_sc'), ('smpconv_tcn_ct', 'smpconv_tcn_scifar10'),
])
@pytest.mark.parametrize('layout', ['ours', 'authors'])
def test_kernels_of_another_length_are_refused(source, target, layout, tmp_path):
    """The shapes of points do not tell it."""
    state = timm.create_model(source).state_dict()
    if layout == 'authors':
        state = reference_smp.authors_state_dict(source)
    torch.save({'model': state}, tmp_path / 'w.pth')
    message = f'must be {FACTS[target][3][0]}, the length of the kernels of the model, got .?{FACTS[source][3][0]}'
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(target, pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'w.pth'))


def test_authors_weights_for_a_model_on_the_meta_device():
    state = reference_smp.authors_state_dict('smpconv_tcn_pmnist')
    model = timm.create_model('smpconv_tcn_pmnist', device='meta')
    model.load_state_dict(checkpoint_filter_fn(state, model), assign=True)
    expected = timm.create_model('smpconv_tcn_pmnist')
    assert torch.equal(model.stem.permutation, expected.stem.permutation)
    with torch.device('meta'):
        model = timm.create_model('smpconv_tcn_pmnist')
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device='cpu')
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert torch.equal(model.stem.permutation, expected.stem.permutation)
    assert model(torch.randn(2, 1, 28, 28)).isfinite().all()


@pytest.mark.parametrize('args', [dict(seq_len=64), dict(kernel_size=64), dict(seq_len=64, radius=0.5), {}])
def test_points_of_shorter_kernels_reach_samples(args):
    model = timm.create_model('smpconv_tcn_smnist', **args)
    radius = model.blocks[0].conv1.large.conv.kernel.radius.unique().item()
    assert radius == pytest.approx(args.get('radius', 2 / 64 if args else 0.002))


def test_other_input_channels_by_timms_rule(tmp_path):
    for name in ('smpconv_resnet_cifar10', 'smpconv_tcn_smnist'):
        model = small(name)
        torch.save(model.state_dict(), tmp_path / 'w.pth')
        args = dict(SMALL[name], num_classes=7, pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'w.pth'))
        gray = timm.create_model(name, **{**args, 'in_chans': 1}).eval()
        x = inputs(name)[:, :1]
        assert difference(gray(x), model(x.expand(-1, 3, -1, -1))) < TOLERANCE[torch.float32]
        torch.save(gray.state_dict(), tmp_path / 'gray.pth')
        args['pretrained_cfg_overlay'] = dict(file=tmp_path / 'gray.pth')
        with pytest.raises(CheckpointError, match=r'must have the shapes of the model, got .* instead of'):
            timm.create_model(name, **{**args, 'in_chans': 4})


def test_features(name, model, x):
    count = len(model.blocks)
    last, all_features = model.forward_intermediates(x)
    assert len(all_features) == count and torch.equal(last, model.forward_features(x))
    assert torch.equal(model.forward_head(last), model(x))
    assert [f.shape[1] for f in all_features] == [info['num_chs'] for info in model.feature_info]
    torch.manual_seed(0)
    listed = timm.create_model(name, features_only=True, out_indices=(0, count - 1), **SMALL[name]).eval()
    listed.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('head.')}, strict=False)
    flat = dict(zip(listed.state_dict(), (v for k, v in model.state_dict().items() if not k.startswith('head.'))))
    listed.load_state_dict(flat)
    for actual, expected in zip(listed(x), (all_features[0], all_features[-1])):
        assert torch.equal(actual, expected)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers(1) == [count - 1]
    assert difference(pruned.forward_features(x), last) == 0 and pruned(x).shape == last.shape
    assert pruned.prune_intermediate_layers([0]) == [0] and len(pruned.blocks) == 1
    assert torch.equal(pruned.forward_features(x), all_features[0])
    with pytest.raises(ValueError, match='output_fmt must be'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('wrapper', ['list', 'dict', 'getter', 'hook', 'fx'])
def test_every_wrapper_gives_features(name, wrapper, x):
    model = timm.create_model(name, features_only=True, feature_cls=wrapper, out_indices=(0, 2), **SMALL[name]).eval()
    features = model(x)
    features = list(features.values()) if isinstance(features, dict) else features
    assert [f.shape[1] for f in features] == model.feature_info.channels() and len(features) == 2


def test_features_by_default():
    counts = {}
    for name, args in (('smpconv_tcn_smnist', dict(depth=2)), ('smpconv_resnet_cifar10', dict(dims=(6, 6)))):
        model = timm.create_model(name, features_only=True, **{**SMALL[name], **args})
        counts[name] = model.feature_info.channels()
    assert counts == {'smpconv_tcn_smnist': [6, 6], 'smpconv_resnet_cifar10': [6]}
    assert timm.create_model(
        'smpconv_resnet_cifar10', features_only=True, device='meta').feature_info.channels() == [24, 36, 48]


def test_resetting_the_classifier(name, model, x):
    model.half()
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float16 and model.float()(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(4, '')
    assert model(x).shape[:2] == (2, 4) and model(x).ndim == model.forward_features(x).ndim


def test_parameter_groups(model):
    kinds = {n for n, _ in model.named_parameters() if n.endswith(('.coords', '.radius'))}
    assert model.no_weight_decay() == kinds and kinds
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) >= len(model.blocks) + 1
    optimizer = create_optimizer_v2(model, opt='smpadam', lr=1e-3, weight_decay=1e-5)
    decayed = {id(p) for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    for key, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and key not in kinds)


def test_checkpointing_changes_neither_loss_nor_gradients(name):
    results = []
    for enable in (False, True):
        model = small(name, drop_rate=0.).train().double()
        model.set_grad_checkpointing(enable)
        x = inputs(name, dtype=torch.float64, batch=3).requires_grad_()
        model.stem.drop.p = 0.
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert difference(a, b) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('merged', [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize('name', ['smpconv_resnet_cifar10', 'smpconv_tcn_pmnist'])
def test_scripted_and_exported(name, merged):
    model = small(name, **(dict(dims=(6, 8)) if 'resnet' in name else dict(depth=2)))
    net, x = reparameterize_model(model) if merged else model, inputs(name)
    expected = net(x)
    assert difference(torch.jit.script(net)(x), expected) < TOLERANCE[torch.float32]
    assert difference(torch.jit.trace(net, x)(x), expected) < TOLERANCE[torch.float32]
    program = torch.export.export(net, (x,))
    targets = [n.target for n in program.graph.nodes if n.op == 'call_function']
    assert targets and all(t.namespace == 'aten' for t in targets if isinstance(t, torch._ops.OpOverload))
    assert difference(program.module()(x), expected) < TOLERANCE[torch.float32]


@pytest.mark.slow
def test_onnx_has_standard_operators(name, model, x, tmp_path):
    merged = reparameterize_model(model)
    path = tmp_path / 'm.onnx'
    torch.onnx.export(
        merged, (x,), str(path), input_names=['x'], dynamo=True, external_data=False,
        dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=64)}})
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {n.domain for n in graph.graph.node} <= {''} and not graph.functions
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for batch in (x, x[:1], inputs(name, 5)):
        actual = torch.from_numpy(session.run(None, {'x': batch.numpy()})[0])
        assert difference(actual, merged(batch)) < TOLERANCE[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize('name,args', [
    ('smpconv_resnet_cifar10', dict(dims=(6,))), ('smpconv_tcn_smnist', dict(depth=1)),
])
def test_compiled(name, args):
    model, x = small(name, **args), inputs(name)
    merged = reparameterize_model(model)
    with torch.no_grad():
        assert difference(torch.compile(merged)(x), merged(x)) < TOLERANCE[torch.float32]
    results = []
    for compiled in (False, True):
        training = small(name, drop_rate=0., input_drop_rate=0., **args).train()
        y = (torch.compile(training) if compiled else training)(x)
        y.square().sum().backward()
        # A bias in front of a BatchNorm has no gradient but rounding errors.
        results.append([p.grad for key, p in training.named_parameters() if not key.endswith('conv.bias')])
    for a, b in zip(*results):
        assert difference(b, a) < 1e-4  # of a radius, the sum of terms that cancel


@pytest.mark.parametrize('full', [*SEQUENCE_MODELS, 'smpconv_resnet_cifar10'])
def test_meta_device(full):
    model = timm.create_model(full, device='meta')
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, *FACTS[full][1], device='meta')).shape == (2, FACTS[full][2])


def test_half_precision_and_autocast(model, x):
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert difference(model(x).float(), expected) < 0.1
    assert difference(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected) < 0.2
    coords = copy.deepcopy(model).half().blocks[0].conv1.large.conv.kernel.coords
    assert coords.dtype == torch.float32


def test_dropout_acts_in_training_only(name):
    model = small(name, drop_rate=0.5, input_drop_rate=0.5)
    x = inputs(name)
    assert torch.equal(model(x), model(x))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert not torch.equal(model(x), model(x))
    assert (model.stem.drop(torch.ones(1000)) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize('make,message', [
    (lambda: small('smpconv_tcn_smnist')(torch.zeros(3, 24)), r'x must be \(B, C, L\) or .*got shape \[3, 24\]'),
    (lambda: small('smpconv_tcn_smnist')([0.]), r'x must be a tensor of shape \(B, C, L\) .*, got list'),
    (lambda: small('smpconv_tcn_smnist')(torch.zeros(1, 1, 4, 6)), r'x must be .* got shape \[1, 1, 24\]'),
    (lambda: small('smpconv_tcn_smnist')(torch.zeros(1, 2, 24)), r'x must be \(B, 3, L\) with .*got .*\[1, 2, 24\]'),
    (lambda: small('smpconv_tcn_smnist')(torch.zeros(1, 3, 0)), 'from 1 to seq_len = 24 samples'),
    (lambda: small('smpconv_tcn_smnist')(torch.zeros(1, 3, 25)), r'seq_len = 24 samples, got shape \[1, 3, 25\]'),
    (lambda: small('smpconv_tcn_pmnist')(torch.zeros(1, 3, 23)), r'must have seq_len = 24 samples, .*\[1, 3, 23\]'),
    (lambda: small('smpconv_tcn_smnist')(torch.zeros(1, 3, 24, dtype=torch.int)), 'x must be floating point'),
    (lambda: small('smpconv_tcn_smnist', kernel_size=1), 'kernel_size must be at least 2 .*, got 1'),
    (lambda: small('smpconv_tcn_smnist', kernel_size=25), 'at most seq_len = 24.*got 25'),
    (lambda: small('smpconv_tcn_smnist', seq_len=0), 'seq_len must be at least 1, got 0'),
    (lambda: small('smpconv_tcn_smnist', depth=0), 'depth must be at least 1, got 0'),
    (lambda: small('smpconv_tcn_smnist', global_pool='first'), "global_pool must be .*, got 'first'"),
    (lambda: small('smpconv_tcn_smnist', radius=2.), r'radius must be in radius_range \(0.0001, 1.0\), got 2.0'),
    (lambda: small('smpconv_tcn_smnist', drop_rate=1.5), 'drop_rate must be at least 0 and below 1, got 1.5'),
    (lambda: small('smpconv_resnet_cifar10', input_drop_rate=-1.), 'input_drop_rate must be at least 0 and below 1'),
    (lambda: small('smpconv_resnet_cifar10', kernel_size=8), 'kernel_size must be odd and positive'),
    (lambda: small('smpconv_resnet_cifar10', dims=()), 'dims must be integers, one for each block'),
    (lambda: small('smpconv_resnet_cifar10')(torch.zeros(1, 4, 8, 8)), r'x must be \(B, 3, H, W\)'),
])
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
