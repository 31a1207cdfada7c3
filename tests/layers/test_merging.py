"""Merging whole models with timm's own tool, against the model before merging and the authors' mathematics."""
import copy
import re
from functools import partial

import pytest
import reference
import timm
import torch
import torch.nn as nn
from conftest import IMAGENET_MODELS, SMALL as SMALL_ARGS, TOLERANCE, difference, shake_norms, small_model, wake_weights
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d, LayerScale2d, convert_sync_batchnorm
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch.nn.utils import prune

from timm_smpconv import RepSMPConv2d, SMPConv2d, SMPKernel
from timm_smpconv.layers._folding import MergeError
from timm_smpconv.layers.merged import MergedConv2d
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn

SMALL = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernels=(9, 7, 7, 5), divisor=4, ratio=4)  # small_model()


def leaves(model):
    return {type(m).__name__ for m in model.modules() if not list(m.children())}


@pytest.mark.parametrize('name', ['small', *(pytest.param(name, marks=pytest.mark.slow) for name in IMAGENET_MODELS)])
def test_merged_logits_and_what_is_left(name, monkeypatch):
    monkeypatch.setitem(reference.CONFIGS, 'small', SMALL)
    sd = reference.authors_state_dict(name, num_classes=50)
    for key in sd:
        if key.endswith('.radius'):
            sd[key].clamp_(max=1.)  # small kernels start with larger ones, which are out of range
    model = small_model(num_classes=50) if name == 'small' else timm.create_model(name, num_classes=50).eval()
    model.load_state_dict(checkpoint_filter_fn(sd, model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merged = reparameterize_model(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in merged.modules())
    for part in (merged.stem, merged.stages):
        assert leaves(part) <= {'MergedConv2d', 'ReLU', 'Identity'}
    assert not any(isinstance(m, (nn.modules.batchnorm._BatchNorm, SMPKernel)) for m in merged.modules())
    for size in ((64, 64), (40, 96)):
        x = torch.randn(2, 3, *size)
        assert difference(merged(x), model(x)) < TOLERANCE[torch.float32]
        assert difference(merged(x), reference.logits(sd, name, x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('inplace', [True, False])
def test_inplace(model, images, inplace):
    expected = model(images)
    merged = reparameterize_model(model, inplace=inplace)
    assert (merged is model) == inplace
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]


def test_merging_twice_is_harmless(model, images):
    once = reparameterize_model(model)
    twice = reparameterize_model(once)
    thrice = reparameterize_model(twice.train())
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert torch.equal(once(images), twice.eval()(images))
    assert torch.equal(once(images), thrice.eval()(images))


@pytest.mark.parametrize('which', [0, 1])
def test_a_block_whose_parts_are_merged_merges(model, which):
    block = model.stages[0].blocks[which]
    x = torch.randn(1, 8, 16, 20)
    once = reparameterize_model(block)  # a root stays, its children merge
    assert leaves(once) == {'BatchNorm2d', 'MergedConv2d', 'Identity', 'GELU' if which else 'ReLU'}
    twice = reparameterize_model(nn.Sequential(once))
    assert leaves(twice) == {'MergedConv2d', 'Identity'}
    for merged in (once, twice):
        assert difference(merged(x), block(x)) < TOLERANCE[torch.float32]


class TwoModels(nn.Module):
    def __init__(self, features, net):
        super().__init__()
        self.features = features
        self.net = net
        self.decoder = nn.Conv2d(32, 2, 1)

    def forward(self, x):
        return self.decoder(self.features(x)[-1]) + self.net(x).mean()


@pytest.mark.parametrize('make,kernels', [
    (small_model, 5),
    (lambda: nn.Sequential(small_model()), 5),
    (partial(timm.create_model, 'smpconv_resnet_cifar10', dims=(4, 6), kernel_size=9), 5),
    (partial(timm.create_model, 'smpconv_resnet_cifar10', features_only=True, dims=(4, 6), kernel_size=9), 5),
    (partial(timm.create_model, 'smpconv_tcn_ct', seq_len=40, dim=6, depth=2), 4),
    (partial(small_model, features_only=True), 5),
    (partial(small_model, features_only=True, feature_cls='getter'), 5),
    (lambda: TwoModels(small_model(features_only=True, out_indices=(0, 3)), small_model()), 10),
    (lambda: nn.Sequential(SMPConv2d(3, 3, 9, groups=3)), 1),
])
@pytest.mark.parametrize('inplace', [True, False])
def test_every_kernel_is_rendered_once(make, kernels, inplace, monkeypatch):
    model, rendered = make().eval(), []
    render = SMPKernel.forward
    monkeypatch.setattr(SMPKernel, 'forward', lambda kernel: rendered.append(kernel) or render(kernel))
    merged = reparameterize_model(model, inplace=inplace)
    assert len(rendered) == len(set(rendered)) == kernels
    assert not any(isinstance(m, SMPKernel) for m in merged.modules())
    assert len(reparameterize_model(merged).state_dict()) == len(merged.state_dict()) and len(rendered) == kernels


# What is put where, and what the refusal says. The last parts of a network are here: all before them could merge.
REFUSED = [
    ('stages.3.blocks.1.norm', partial(nn.GroupNorm, 2, 32), 'must be a BatchNorm or an Identity .* got GroupNorm'),
    ('stages.3.blocks.1.norm', partial(BatchNormAct2d, 32), r'act must be an Identity to be merged, got ReLU'),
    ('stages.3.blocks.0.dwconv.large.bn', partial(nn.GroupNorm, 2, 32), 'must be a BatchNorm or an Identity'),
    ('stages.3.blocks.0.drop_path', partial(LayerScale2d, 32), 'must be a DropPath or an Identity .* got LayerScale2d'),
    ('stages.3.blocks.0.pw1', partial(nn.Conv2d, 32, 32, 3, padding=1), 'must be a 1×1 convolution'),
    ('stages.3.blocks.0.pw1.act', nn.SiLU, 'must be an Identity'),
    ('stages.3.blocks.1.pw2', nn.Sequential, 'must be an SMPConv1d, SMPConv2d.* got Sequential'),
    ('stages.3.downsample.1.bn', partial(nn.GroupNorm, 2, 32), 'must be a BatchNorm or an Identity'),
    ('head.norm', partial(nn.GroupNorm, 2, 32), 'must be a BatchNorm or an Identity'),
    ('stem.3.bn', partial(nn.GroupNorm, 2, 8), 'must be a BatchNorm or an Identity'),
]


@pytest.mark.parametrize('where,make,message', REFUSED)
def test_a_refusal_names_the_part_and_leaves_the_callers_model_alone(where, make, message):
    """Its name within the stage, the stem or the head, which merge one by one."""
    model = small_model(drop_path_rate=0.5)
    model.set_submodule(where, make().eval())
    before = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    name = re.sub(r'^(stages\.\d|head|stem)\.', '', where)
    with pytest.raises(MergeError, match=rf'^{name}.*{message}'):
        reparameterize_model(model)
    assert dict(model.named_modules()) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def keep(module, inputs, output=None):
    """A hook that changes nothing, which nobody can see from outside."""


def halve(module, inputs, output):
    return output / 2


class Conv2d(nn.Module):
    """Wraps a layer under the name of another, as peft's adapters do."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) * 1.5


def prune_weight(module):
    prune.l1_unstructured(module, 'weight', 0.5)


def assign(module):
    module.forward = partial(type(module).forward, module)


def put_adapter(model, where):
    model.set_submodule(where, Conv2d(model.get_submodule(where)))


ADDED = {
    'pruned': (prune_weight, r'Conv2d with the forward pre-hook L1Unstructured \(prune.remove removes it\)'),
    'weight_norm': (
        nn.utils.weight_norm, r'Conv2d with the forward pre-hook WeightNorm \(remove_weight_norm removes it\)'),
    'spectral_norm': (nn.utils.spectral_norm, r'the forward pre-hook SpectralNorm \(remove_spectral_norm removes it\)'),
    'forward assigned': (assign, r'with another forward assigned \(del module.forward removes it\)'),
}
DROPPED = [
    'stem.3', 'stem.3.conv', 'stem.3.bn', 'stages.3.downsample.1', 'stages.3.blocks.0', 'stages.3.blocks.1',
    'stages.3.blocks.0.norm', 'stages.3.blocks.0.pw1', 'stages.3.blocks.0.pw1.act', 'stages.3.blocks.0.dwconv',
    'stages.3.blocks.0.dwconv.large', 'stages.3.blocks.0.dwconv.small.conv', 'stages.3.blocks.0.drop_path',
    'stages.3.blocks.1.drop_path', 'stages.3.blocks.1.pw2.bn', 'head.norm']


@pytest.mark.parametrize('where,hook,register', [
    *((where, halve, 'register_forward_hook') for where in DROPPED),
    (DROPPED[1], keep, 'register_forward_hook'), (DROPPED[2], keep, 'register_forward_pre_hook')])
def test_forward_hooks_of_a_part_that_goes_are_refused(where, hook, register):
    model = small_model(drop_path_rate=0.5)
    getattr(model.get_submodule(where), register)(hook)
    name = re.sub(r'^(stages\.\d|head|stem)\.', '', where)
    part = model.get_submodule(where)
    kind = type(part).__name__
    rule = rf'must compute what its class does to be merged, got {kind} with the forward \S+ {hook.__name__} '
    with pytest.raises(MergeError, match=rf'^({name}|{kind}) {rule}\(handle.remove removes it\)'):
        reparameterize_model(model)


@pytest.mark.parametrize('where', ['stem.1.conv', 'stages.1.blocks.0.pw1.conv', 'stages.0.blocks.0.dwconv.small.conv'])
@pytest.mark.parametrize('change', ADDED)
def test_what_changes_a_part_without_its_class_is_refused(model, images, change, where):
    change, message = ADDED[change]
    change(model.get_submodule(where))
    with torch.no_grad():
        model(images)  # after which the weights that a hook computes can be copied
    name = re.sub(r'^(stages\.\d|stem)\.', '', where)
    with pytest.raises(MergeError, match=f'^{name} must compute what its class does to be merged, got .*{message}'):
        reparameterize_model(model)


def test_a_layer_by_itself_with_hooks_is_refused():
    for layer in (SMPConv2d(4, 4, 5, padding=2, groups=4), RepSMPConv2d(4, 5), small_model().stem[0]):
        layer.register_forward_hook(halve)
        with pytest.raises(MergeError, match='must compute what its class does to be merged'):
            layer.fuse()

    class Doubled(RepSMPConv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(MergeError, match=r'must be a RepConv to be merged, got test_merging\.Doubled'):
        Doubled(4, 5).fuse()


def test_accelerates_wrappers_are_named(model):
    hooks = pytest.importorskip('accelerate.hooks')
    conv = model.stages[1].blocks[0].pw1.conv
    hooks.add_hook_to_module(conv, hooks.ModelHook())
    with pytest.raises(MergeError, match=r'got Conv2d with another forward.*accelerate.hooks.remove_hook_from_module'):
        reparameterize_model(model)
    hooks.remove_hook_from_module(conv)
    reparameterize_model(model)


@pytest.mark.parametrize('where', ['stem.1.conv', 'stages.1.blocks.0.pw1', 'stages.1.blocks.0.dwconv.small.conv'])
def test_adapters_that_were_left_in_are_named(model, where):
    put_adapter(model, where)
    with pytest.raises(MergeError, match=r'must be .* to be merged, got test_merging\.Conv2d\('):
        reparameterize_model(model)


def test_a_compiled_convolution_is_named(model):
    block = model.stages[1].blocks[0]
    block.pw1.conv = torch.compile(block.pw1.conv)
    with pytest.raises(MergeError, match=r'pw1.conv must compute what .* got OptimizedModule with torch.compile'):
        reparameterize_model(model)


@pytest.mark.parametrize('where', ['', 'stages.1', 'stages.1.blocks.0'])
def test_compiled_parts_merge(model, images, where):
    expected = model(images)
    if where:
        model.set_submodule(where, torch.compile(model.get_submodule(where), backend='eager'))
        model(images)
    else:
        model = torch.compile(model, backend='eager')
    merged = reparameterize_model(model)
    assert not any(isinstance(m, (nn.BatchNorm2d, SMPKernel)) for m in merged.modules())
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]


HARMLESS = {
    'backward hooks': lambda m: (m.register_full_backward_hook(keep), m.register_full_backward_pre_hook(keep)),
    'hooks that stay': lambda m: [
        part.register_forward_hook(halve)
        for part in (m.stages[1], m.stages[0].blocks, m.stem, m.head, m.stages[1].blocks[0].act2)],
    'hooks of kernels': lambda m: [
        part.register_forward_hook(halve) for part in m.modules() if isinstance(part, SMPKernel)],
    'pruned kernels': lambda m: [prune_weight(part) for part in m.modules() if isinstance(part, SMPKernel)],
    'pruned for good': lambda m: (prune_weight(m.stem[1].conv), prune.remove(m.stem[1].conv, 'weight')),
    'forward assigned to itself': lambda m: [
        setattr(part, 'forward', part.forward) for part in m.modules() if isinstance(part, nn.Conv2d)],
    'parametrizations': lambda m: [
        nn.utils.parametrizations.spectral_norm(part) if i % 2 else nn.utils.parametrizations.weight_norm(part)
        for i, part in enumerate(m.modules()) if isinstance(part, (nn.Conv2d, SMPKernel))],
}


@pytest.mark.parametrize('change', HARMLESS)
@pytest.mark.parametrize('training', [False, True])
def test_what_is_folded_or_stays(model, images, change, training):
    HARMLESS[change](model)
    with torch.no_grad():
        expected = model.eval()(images)
    state = copy.deepcopy(model.state_dict())
    merged = reparameterize_model(model.train(training)).eval()
    assert not any(isinstance(m, (nn.BatchNorm2d, SMPKernel)) for m in merged.modules())
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('where', ['stages.3.blocks.1.norm', 'stages.3.downsample.1.bn', 'stem.3.bn'])
def test_a_part_of_a_network_merges_whole_or_not_at_all(model, where):
    """In place, too: a stage, and the stem."""
    model.set_submodule(where, nn.GroupNorm(2, 8 if 'stem' in where else 32))
    part = model.get_submodule('stem' if 'stem' in where else 'stages.3')
    before = dict(part.named_modules())
    for network in (model, nn.Sequential(model)):
        with pytest.raises(MergeError, match='must be a BatchNorm'):
            reparameterize_model(network, inplace=True)
        assert dict(part.named_modules()) == before


@pytest.mark.parametrize('name', ['smpconv_mobile31', 'smpconv_resnet_cifar10', 'smpconv_tcn_ct'])
def test_a_model_in_training_mode_merges_into_what_it_computes_in_evaluation_mode(name, images):
    """Running statistics, no DropPath and no dropout: timm's scripts merge before they call `eval()`."""
    args, x = {
        'smpconv_mobile31': (dict(SMALL_ARGS, drop_path_rate=0.5), images),
        'smpconv_resnet_cifar10': (dict(dims=(4, 6), kernel_size=9), images),
        'smpconv_tcn_ct': (dict(seq_len=40, dim=6, depth=2, drop_rate=0.5), torch.randn(2, 3, 33)),
    }[name]
    model = wake_weights(shake_norms(timm.create_model(name, **args)))
    expected = model.eval()(x)
    merged = reparameterize_model(model.train()).eval()
    assert not any(isinstance(m, (nn.modules.batchnorm._BatchNorm, SMPKernel)) for m in merged.modules())
    assert difference(merged(x), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('make', [
    nn.SiLU, nn.PReLU, nn.Identity, nn.ReLU, nn.GELU, partial(nn.GELU, approximate='tanh'),
    partial(nn.ReLU6, inplace=True)])
def test_other_activations_are_kept(model, images, make):
    """In every place at once, and one of them in each place alone."""
    places = ['stem.0.act', 'stages.1.downsample.0.act', 'stages.1.blocks.0.act1', 'stages.1.blocks.0.act2',
              'stages.1.blocks.1.act']
    for chosen in (places, *([place] for place in places if make is nn.SiLU)):
        changed = copy.deepcopy(model)
        for place in chosen:
            changed.set_submodule(place, make().eval())
        merged = reparameterize_model(changed)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
        assert difference(merged(images), changed(images)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('make', [
    partial(nn.Conv2d, 16, 16, 5, padding=2, groups=16, padding_mode='reflect'),
    partial(nn.Conv2d, 16, 16, 3, padding='same'),
    lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 16)),
    partial(SMPConv2d, 16, 16, 5, padding=2, groups=16),
    partial(MergedConv2d, 16, 16, 5, padding=2, groups=16, activation='gelu'),
    nn.Identity,
])
def test_another_dwconv_is_kept(model, images, make):
    model.stages[1].blocks[0].dwconv = make().eval()
    merged = reparameterize_model(model)
    assert not any(isinstance(m, (nn.BatchNorm2d, SMPKernel)) for m in merged.modules())
    assert difference(merged(images), model(images)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('where', [
    'stem.1.bn', 'stages.1.blocks.0.norm', 'stages.1.blocks.0.pw1.bn', 'stages.1.blocks.0.dwconv.large.bn',
    'stages.1.blocks.1.pw2.bn', 'head.norm'])
def test_a_norm_that_was_left_out_stays_out(model, images, where):
    model.set_submodule(where, nn.Identity())
    merged = reparameterize_model(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert difference(merged(images), model(images)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('inference_mode', [False, True])
def test_the_default_dtype_does_not_matter(images, inference_mode):
    model = small_model()
    expected = model(images)
    torch.set_default_dtype(torch.float16)
    try:
        merged = reparameterize_model(model)
        if inference_mode:
            built = small_model(inference_mode=True, shake=False, dtype=torch.float32)
            built.load_state_dict(merged.state_dict())
            merged = built
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        assert difference(merged(images), expected) < TOLERANCE[torch.float32]
    finally:
        torch.set_default_dtype(torch.float32)


def test_bfloat16(model, images):
    expected = model(images)
    low = copy.deepcopy(model).to(torch.bfloat16)
    merged = reparameterize_model(low)
    assert all(p.dtype == torch.bfloat16 for p in merged.parameters())
    error = difference(merged(images.bfloat16()), expected)
    assert error < TOLERANCE[torch.bfloat16]
    late = reparameterize_model(model).to(torch.bfloat16)
    assert difference(late(images.bfloat16()), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize('kwargs', [
    {},
    dict(num_classes=0, global_pool='', dtype=torch.float64),
    dict(num_classes=3, in_chans=1, global_pool=''),
    dict(global_pool='max', dims=(4, 6, 10, 12), mlp_ratio=2.5, drop_rate=0.5, drop_path_rate=0.5),
    dict(global_pool='catavgmax', kernel_sizes=(5, 7, 9, 11), small_kernel=3, points=(1, 2, 3, 4)),
    dict(depths=(2, 1, 1, 3), points_divisor=8, dtype=torch.bfloat16),
])
def test_the_merged_architecture_is_what_merging_makes(kwargs, monkeypatch):
    merged = reparameterize_model(small_model(**kwargs))
    monkeypatch.delattr(SMPKernel, '__init__')  # no point is created
    built = small_model(inference_mode=True, shake=False, **kwargs)
    assert [(k, v.shape, v.dtype) for k, v in built.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in merged.state_dict().items()]
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in merged.parameters()]
    assert str(built) == str(merged)
    assert not any(m.training for m in merged.modules()) and all(m.training for m in built.train().modules())


def test_a_new_merged_model_has_start_values_and_learns(images):
    model = small_model(inference_mode=True, shake=False).train()
    for name, p in model.named_parameters():
        if name.startswith('head.norm') or name.endswith('bias'):
            assert (p == (name == 'head.norm.conv.weight')).all()
        elif p.numel() > 500:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
    wake_weights(model)(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    'kwargs', [{}, dict(num_classes=0), dict(num_classes=0, global_pool=''), dict(global_pool='max')])
def test_save_and_reload(images, tmp_path, kwargs):
    merged = reparameterize_model(small_model(**kwargs))
    expected = merged(images)
    save_file({k: v.contiguous() for k, v in merged.state_dict().items()}, tmp_path / 'merged.safetensors')
    again = small_model(inference_mode=True, shake=False, **kwargs)
    again.load_state_dict(load_file(tmp_path / 'merged.safetensors'))
    assert torch.equal(again(images), expected)
    built = small_model(
        inference_mode=True, shake=False, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'merged.safetensors'), num_classes=10), **kwargs)
    assert torch.equal(built(images), expected)


def test_a_merged_checkpoint_without_its_classifier_gives_the_features(model, images, tmp_path):
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    merged = reparameterize_model(model)
    actual = merged.forward_head(merged.forward_features(images), pre_logits=True)
    assert difference(actual, expected) < TOLERANCE[torch.float32]
    torch.save(merged.state_dict(), tmp_path / 'merged.pth')
    overlay = dict(file=str(tmp_path / 'merged.pth'))
    encoder = small_model(
        num_classes=0, inference_mode=True, shake=False, pretrained=True, pretrained_cfg_overlay=overlay)
    assert difference(encoder(images), expected) < TOLERANCE[torch.float32]
    merged.reset_classifier(0)
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]


def test_a_new_classifier_on_a_merged_model_survives_a_reload(model, images):
    merged = reparameterize_model(model)
    merged.reset_classifier(4)
    again = small_model(num_classes=4, inference_mode=True, shake=False)
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(images), merged(images))


def test_as_the_encoder_of_a_larger_model(images):
    whole = wake_weights(shake_norms(TwoModels(small_model(features_only=True), small_model(num_classes=0)))).eval()
    merged = reparameterize_model(whole)
    assert not any(isinstance(m, (nn.BatchNorm2d, SMPKernel)) for m in merged.modules())
    assert difference(merged(images), whole(images)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('convert,eval_first', [
    (nn.SyncBatchNorm.convert_sync_batchnorm, False), (convert_sync_batchnorm, True),
    (freeze_batch_norm_2d, False), (freeze_batch_norm_2d, True)])
def test_a_norm_that_was_synchronised_or_frozen_merges(model, images, convert, eval_first):
    expected = model(images)
    converted = convert(model) if eval_first else convert(model.train()).eval()
    merged = reparameterize_model(converted)
    assert merged.state_dict().keys() == small_model(inference_mode=True, shake=False).state_dict().keys()
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]


def test_the_merged_architecture_is_built_on_meta():
    state = torch.get_rng_state()
    merged = timm.create_model('smpconv_tiny', inference_mode=True, device='meta')
    assert all(p.is_meta for p in merged.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any('bn' in k or 'kernel' in k for k in merged.state_dict())


@torch.no_grad()
def test_only_merged_blocks_overwrite_what_a_hook_sees(model, images):
    """A research model's hidden activations are those before GELU, with and without gradients."""
    seen = []
    block = model.stages[0].blocks[1]
    handle = block.pw1.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].clone(), output)))
    model(images)
    handle.remove()
    inputs, output = seen[0]
    assert torch.equal(output, block.pw1(inputs))
    assert (output < -0.2).any()  # GELU ends at -0.17
    merged = reparameterize_model(model)
    with torch.enable_grad():
        expected = merged(images)
    assert torch.equal(merged(images), expected)
