"""The four models as timm users meet them. timm's own model tests run in test_timm_contract.py."""
import copy
import math
import threading
from collections import Counter
from itertools import starmap

import pytest
import timm
import torch
import torch.nn as nn
from conftest import IMAGENET_MODELS, MODELS, SMALL, TOLERANCE, difference, small_model, wake_weights
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torchvision.models.feature_extraction import create_feature_extractor

from timm_smpconv import SMPKernel
from timm_smpconv.models.smpconv import SMPConvNet
from timm_smpconv.ops import use_backend

FACTS = {  # name: (trainable parameters, GMACs at 224 unmerged, stochastic depth, points per stage)
    'smpconv_tiny': (26_705_248, 5.707, 0.1, (240, 210, 182, 42)),
    'smpconv_base': (79_546_520, 16.610, 0.5, (240, 210, 182, 42)),
    'smpconv_mobile31': (2_892_494, 1.325, 0.0, (120, 105, 91, 21)),
    'smpconv_mobile51': (3_066_884, 2.445, 0.0, (325, 300, 276, 21)),
}


def macs(model, shape):
    """Multiply-accumulates of all convolutions and linear layers for an input, counted by their output shapes."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features
        else:
            total += output[0].numel() * math.prod(module.kernel_size) * module.in_channels // module.groups

    for module in model.modules():
        if isinstance(module, nn.Linear) or hasattr(module, 'kernel_size'):
            module.register_forward_hook(count)
    model(torch.zeros(1, *shape, device='meta'))
    return total


@pytest.mark.parametrize('name', IMAGENET_MODELS)
def test_parameters_and_macs_are_the_published_ones(name):
    parameters, gmacs, drop_path, points = FACTS[name]
    model = timm.create_model(name, device='meta').eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(macs(model, (3, 224, 224)) / 1e9, 3) == gmacs
    assert tuple(s.blocks[0].dwconv.large.conv.kernel.coords.shape[1] for s in model.stages) == points
    blocks = [b for s in model.stages for b in s.blocks]
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0. for b in blocks]
    assert rates[::2] == rates[1::2]  # the two blocks of a pair
    pairs = len(rates) // 2
    assert rates[::2] == pytest.approx([drop_path * i / (pairs - 1) for i in range(pairs)])


def test_start_values():
    model = timm.create_model('smpconv_mobile31')
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, SMPKernel):
            assert torch.equal(module.radius, torch.full_like(module.radius, 4 / module.size[0]))


@pytest.mark.parametrize('h,w', [(32, 32), (33, 47), (64, 224), (97, 40)])
def test_any_input_size(model, h, w):
    x = torch.randn(2, 3, h, w)
    assert model(x).shape == (2, 10)
    assert model.forward_features(x).shape == (2, 32, -(-h // 32), -(-w // 32))


def test_one_image_of_a_batch_does_not_see_the_others(model, images):
    assert difference(model(images)[1:], model(images[1:])) < TOLERANCE[torch.float32]


def test_layouts_give_the_same_logits(model, images):
    expected = model(images)
    assert difference(model(images.contiguous(memory_format=torch.channels_last)), expected) < TOLERANCE[torch.float32]
    model.to(memory_format=torch.channels_last)
    assert difference(model(images), expected) < TOLERANCE[torch.float32]


def test_features_only(model, images):
    levels = timm.create_model('smpconv_mobile31', features_only=True).eval()
    assert levels.feature_info.channels() == [64, 128, 256, 320]
    assert levels.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(f.shape) for f in levels(images)] == [
        (2, 64, 16, 24), (2, 128, 8, 12), (2, 256, 4, 6), (2, 320, 2, 3)]


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'getter', 'fx', 'hook'])
def test_features_are_the_stages_outputs(images, feature_cls):
    levels = small_model(features_only=True, out_indices=(1, 3), feature_cls=feature_cls)
    outputs = levels(images)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    expected = small_model().forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    assert all(starmap(torch.equal, zip(outputs, expected, strict=True)))


def test_intermediates_are_the_stages_outputs(model, images):
    seen = []
    hooks = [s.register_forward_hook(lambda module, args, output: seen.append(output)) for s in model.stages]
    final = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    x, intermediates = model.forward_intermediates(images)
    assert torch.equal(x, final)
    assert all(map(torch.equal, intermediates, seen))
    assert len(model.forward_intermediates(images, indices=2, intermediates_only=True)) == 2
    early, some = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert torch.equal(early, seen[1]) and len(some) == 2
    normed = model.forward_intermediates(images, indices=[3], norm=True, intermediates_only=True)[0]
    assert difference(normed.mean((2, 3)), model.forward_head(final, pre_logits=True)) < TOLERANCE[torch.float32]


def test_prune_intermediate_layers(model, images):
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.stages) == 2 and not any('head' in k for k in model.state_dict())
    assert torch.equal(model.forward_intermediates(images, indices=[1], intermediates_only=True)[0], expected)


def test_head_and_classifier(model, images):
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), model(images))
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(images), pooled)
    model.reset_classifier(7, 'catavgmax')
    assert model.head_hidden_size == 64 and model(images).shape == (2, 7)
    model.reset_classifier(0, '')
    assert model(images).shape == (2, 32, 2, 3)
    model.reset_classifier(4)
    assert model(images).shape == (2, 4, 2, 3)
    assert not any(m.training for m in model.modules())
    assert small_model(num_classes=0, global_pool='')(images).shape == (2, 32, 2, 3)


def test_dropout_acts_in_training_only(images):
    model = small_model(drop_rate=0.5)
    assert torch.equal(model(images), model(images))
    model.head.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(in_chans):
    assert small_model(in_chans=in_chans)(torch.randn(1, in_chans, 40, 40)).shape == (1, 10)


def test_grad_checkpointing_changes_no_gradient(images):
    model = small_model()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_every_parameter_learns(images):
    model = small_model(drop_path_rate=0.).train()
    model(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_layer_groups():
    model = timm.create_model('smpconv_tiny', device='meta')
    fine = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(fine) == set(coarse) == {n for n, _ in model.named_parameters()}
    # The stem, 28 blocks (a downsampling goes with the block behind it, the head's norm with the last), the classifier.
    assert max(fine.values()) + 1 == 1 + 28 + 1 and max(coarse.values()) + 1 == 1 + 4 + 1
    assert fine['stem.0.conv.weight'] == 0 and fine['head.fc.weight'] == max(fine.values())
    assert fine['head.norm.weight'] == fine['stages.3.blocks.3.pw1.conv.weight']
    order = [fine[f'stages.2.blocks.{i}.norm.weight'] for i in range(16)]
    assert order == sorted(set(order))


def test_no_weight_decay_names_positions_and_radii():
    model = timm.create_model('smpconv_tiny', device='meta')
    names = dict(model.named_parameters())
    expected = {n for n in names if n.endswith(('.kernel.coords', '.kernel.radius'))}
    assert len(expected) == 28 and model.no_weight_decay() == expected
    groups = create_optimizer_v2(model, 'adamw', lr=1., weight_decay=0.05).param_groups
    decayed = {id(p) for g in groups if g['weight_decay'] for p in g['params']}
    for name, p in names.items():
        assert (id(p) in decayed) == (p.ndim > 1 and name not in expected)


def test_kernel_sizes_and_points_are_arguments(images):
    model = small_model(kernel_sizes=(5, 7, 9, 11), points=(1, 2, 3, 4), small_kernel=3)
    kernels = [s.blocks[0].dwconv.large.conv.kernel for s in model.stages]
    assert [k.size[0] for k in kernels] == [5, 7, 9, 11]
    assert [k.coords.shape[1] for k in kernels] == [1, 2, 3, 4]
    assert model.stages[0].blocks[0].dwconv.small.conv.kernel_size == (3, 3)
    assert model(images).shape == (2, 10)


def test_dtype_and_device_reach_every_constructor():
    meta = timm.create_model('smpconv_mobile31', device='meta')
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    for dtype in (torch.float64, torch.bfloat16):
        model = timm.create_model('smpconv_mobile31', dtype=dtype).eval()
        for name, p in model.named_parameters():
            kept = name.endswith(('.coords', '.radius')) and dtype == torch.bfloat16
            assert p.dtype == (torch.float32 if kept else dtype), name
        assert model(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_close(model, images, dtype):
    expected = model(images)
    half = copy.deepcopy(model).to(dtype)
    assert difference(half(images.to(dtype)), expected) < TOLERANCE[dtype] * 2  # over all layers
    with torch.autocast('cpu', dtype=dtype):
        assert difference(model(images), expected) < TOLERANCE[dtype] * 2


def test_torchscript(model, images):
    scripted = torch.jit.script(model)
    assert difference(scripted(images), model(images)) < TOLERANCE[torch.float32]
    traced = torch.jit.trace(model, images, check_trace=False)
    assert difference(traced(images[:, :, :40]), model(images[:, :, :40])) < TOLERANCE[torch.float32]


def test_fx_tracing(model, images):
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(images), model(images))
    nodes = create_feature_extractor(model, {'stages.1': 'a', 'head.fc': 'b'})(images)
    assert torch.equal(nodes['b'], model(images))


@pytest.mark.slow
@pytest.mark.parametrize('inference_mode', [False, True])
def test_compile_is_one_graph_in_evaluation(images, inference_mode):
    model = wake_weights(small_model(depths=(1, 1, 1, 1), inference_mode=inference_mode, shake=not inference_mode))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert difference(compiled(images), model(images)) < TOLERANCE[torch.float32]


@pytest.mark.slow
def test_compile_trains(images):
    """In float64: in float32 an input of ReLU that changes sign by rounding moves gradients by 1e-3."""
    model, twin = (small_model(depths=(1, 1, 1, 1), dtype=torch.float64) for _ in range(2))
    compiled = torch.compile(model)
    compiled(images.double()).square().sum().backward()
    twin(images.double()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert difference(p.grad, q.grad) < TOLERANCE[torch.float64], name


def test_registry_and_cfgs():
    assert timm.list_models('smpconv*') == sorted(MODELS)
    cfg = timm.get_pretrained_cfg('smpconv_tiny.in1k')
    assert cfg.tag == 'in1k' and cfg.input_size == (3, 224, 224) and cfg.crop_pct == 0.875
    assert cfg.interpolation == 'bicubic' and cfg.num_classes == 1000


def test_arguments_of_the_caller_win():
    model = timm.create_model('smpconv_base', depths=(1, 1, 1, 1), num_classes=3, drop_path_rate=0.)
    assert [len(s.blocks) for s in model.stages] == [2, 2, 2, 2] and model.num_classes == 3
    assert not any(isinstance(m, DropPath) for m in model.modules())
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('smpconv_base', no_such_argument=1)


@pytest.mark.parametrize('kwargs,message', [
    (dict(kernel_sizes=(31, 29, 26, 13)), r'kernel_size must be odd and positive, got \(26, 26\)'),
    (dict(points=(9, 9, 9, 0)), r'points must be four integers.*at least 1, got \(9, 9, 9, 0\)'),
    (dict(dims=(8, 16, 32)), r'dims must be four integers.*got \(8, 16, 32\)'),
    (dict(depths=(1, 0, 1, 1)), r'depths must be four integers.*got \(1, 0, 1, 1\)'),
    (dict(small_kernel=15), r'small_kernel must not be larger than kernel_size = \(13, 13\)'),
    (dict(points=7), 'points must be four integers.*got 7'),
    (dict(kernel_sizes=31), 'kernel_sizes must be four integers.*got 31'),
    (dict(points_divisor=0), 'points_divisor must be at least 1 .*got 0'),
    (dict(points_divisor=1000), 'points_divisor must be .* leave a point in every kernel, got 1000'),
    (dict(mlp_ratio=0), 'mlp_ratio must leave a hidden channel in every stage, got 0'),
    (dict(in_chans=0), 'in_chans must be at least 1, got 0'),
    (dict(num_classes=-1), 'num_classes must be 0 .*got -1'),
    (dict(drop_path_rate=2.), r'drop_path_rate must be at least 0 and below 1, got 2\.0'),
    (dict(drop_path_rate=1), 'drop_path_rate must be .* got 1'),
    (dict(drop_path_rate=-0.1), r'drop_path_rate must be .* got -0\.1'),
    (dict(drop_path_rate=float('nan')), 'drop_path_rate must be .* got nan'),
])
@pytest.mark.parametrize('inference_mode', [False, True])
def test_bad_arguments_are_named(kwargs, message, inference_mode):
    with pytest.raises(ValueError, match=message):
        SMPConvNet(device='meta', inference_mode=inference_mode, **kwargs)


@pytest.fixture(scope='module')
def entrances():
    """Functions of an image."""
    model = small_model()
    merged = small_model(inference_mode=True, shake=False)
    return model, model.forward_features, model.forward_intermediates, merged, small_model(features_only=True)


@pytest.mark.parametrize('x,error,message', [
    *((torch.zeros(shape), ValueError, r'x must be \(B, 3, H, W\) with H and W at least 32, got shape ')
      for shape in [(1, 3, 31, 64), (1, 3, 64, 16), (1, 4, 64, 64), (3, 64, 64)]),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, 'x must be floating point, got torch.uint8'),
    ([torch.zeros(3, 64, 64)], TypeError, r'x must be a tensor of shape \(B, 3, H, W\), got list'),
])
def test_bad_images_are_named(entrances, x, error, message):
    for call in entrances:
        with pytest.raises(error, match=message):
            call(x)


@pytest.mark.parametrize('inference_mode', [False, True])
@pytest.mark.parametrize('name,args,firsts', [
    ('smpconv_mobile31', SMALL, ['stem.0.conv']),
    ('smpconv_resnet_cifar10', dict(dims=(4, 6), kernel_size=9), ['stem.conv1']),
    ('smpconv_tcn_ct', dict(seq_len=40, dim=6, depth=2), ['blocks.0.conv1', 'blocks.0.shortcut'])])
def test_another_first_convolution_decides_on_the_channels(name, args, firsts, inference_mode):
    model = timm.create_model(name, **args, inference_mode=inference_mode).eval()
    shape = (33,) if name == 'smpconv_tcn_ct' else (32, 40)
    assert model.in_chans == 3
    for first in firsts:
        old = model.get_submodule(first)
        new = nn.Conv1d(8, 6, 1) if len(shape) == 1 else nn.Conv2d(
            8, getattr(old, 'out_channels', 4), 3, getattr(old, 'stride', 1), padding=1)
        model.set_submodule(first, new)
    assert model(torch.randn(2, 8, *shape)).isfinite().all() and model.in_chans == 8
    features = timm.models.FeatureListNet(copy.deepcopy(model), out_indices=(0,), flatten_sequential=True)
    assert features(torch.randn(2, 8, *shape))[0].shape[0] == 2
    with pytest.raises((ValueError, RuntimeError), match='8'):
        model(torch.randn(2, 3, *shape))
    if len(shape) == 2:
        with pytest.raises(ValueError, match=r'x must be \(B, 8, H, W\)'):
            model(torch.randn(2, 3, *shape))
    if not inference_mode:
        assert reparameterize_model(model)(torch.randn(2, 8, *shape)).isfinite().all()


def test_bad_output_format(model, images):
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(images, output_fmt='NLC')


@pytest.mark.parametrize('requested', ['fft', 'channels_last'])
def test_layers_computed_again_use_the_backend_of_the_forward_pass(requested, images, calls):
    """Also where the backward pass runs in another thread, as on GPUs."""
    model = small_model()
    model.set_grad_checkpointing()
    with use_backend(requested):
        loss = model(images).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    # The stem's convolution; the large and small one of five blocks, again; the gradients of all.
    gradients = ['gradients'] if requested == 'fft' else ['input_gradient', 'weight_gradient']
    assert Counter(calls) == {(requested, 'conv'): 1 + 5 * 2 * 2} | {(requested, g): 1 + 5 * 2 for g in gradients}
