"""Merging whole models with timm's own tool, against the model before merging."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from conftest import MODELS, TOLERANCE, difference, shake_norms, small_model, wake_weights
from reference import authors_state_dict, logits
from safetensors.torch import load_file, save_file
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d

from timm_smpconv import SMPKernel
from timm_smpconv.checkpoint import checkpoint_filter_fn


def leaves(model):
    return {type(m).__name__ for m in model.modules() if not list(m.children())}


@pytest.mark.parametrize('name', MODELS)
def test_merged_logits_and_what_is_left(name):
    sd = authors_state_dict(name, num_classes=50)
    model = timm.create_model(name, num_classes=50).eval()
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
        assert difference(merged(x), logits(sd, name, x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('inplace', [True, False])
def test_inplace(model, images, inplace):
    expected = model(images)
    merged = reparameterize_model(model, inplace=inplace)
    assert (merged is model) == inplace
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]


def test_merging_twice_is_harmless(model, images):
    once = reparameterize_model(model)
    twice = reparameterize_model(once)
    thrice = reparameterize_model(twice.train())  # nothing is left to merge, so the mode does not matter
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert torch.equal(once(images), twice.eval()(images))
    assert torch.equal(once(images), thrice.eval()(images))


@pytest.mark.parametrize('which', [0, 1])
def test_a_block_merged_by_itself_is_left_alone(model, which):
    block = model.stages[0].blocks[which]
    x = torch.randn(1, 8, 16, 20)
    once = reparameterize_model(block)  # a root stays, its children merge
    twice = reparameterize_model(nn.Sequential(once))
    assert difference(once(x), block(x)) < TOLERANCE[torch.float32]
    assert torch.equal(twice(x), once(x))


def test_merging_in_training_mode_is_refused_and_changes_nothing(model):
    keys = model.train().state_dict().keys()
    with pytest.raises(RuntimeError, match=r'merges in evaluation mode only.*call eval\(\) on the model first'):
        reparameterize_model(model, inplace=True)
    assert model.state_dict().keys() == keys


def test_bfloat16(model, images):
    expected = model(images)
    low = copy.deepcopy(model).to(torch.bfloat16)
    merged = reparameterize_model(low)
    assert all(p.dtype == torch.bfloat16 for p in merged.parameters())
    error = difference(merged(images.bfloat16()), expected)
    assert error < TOLERANCE[torch.bfloat16]
    late = reparameterize_model(model).to(torch.bfloat16)
    assert difference(late(images.bfloat16()), expected) < TOLERANCE[torch.bfloat16]


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
    assert difference(merged.forward_head(merged.forward_features(images), pre_logits=True), expected) < 1e-5
    torch.save(merged.state_dict(), tmp_path / 'merged.pth')
    overlay = dict(file=str(tmp_path / 'merged.pth'))
    encoder = small_model(
        num_classes=0, inference_mode=True, shake=False, pretrained=True, pretrained_cfg_overlay=overlay)
    assert difference(encoder(images), expected) < TOLERANCE[torch.float32]
    merged.reset_classifier(0)
    assert difference(merged(images), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('num_classes', [0, 3])
@pytest.mark.parametrize('pool', ['avg', 'max', 'catavgmax', ''])
def test_a_replaced_head(model, images, num_classes, pool):
    model.reset_classifier(num_classes, pool)
    merged = reparameterize_model(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert difference(merged(images), model(images)) < TOLERANCE[torch.float32]


def test_a_new_classifier_on_a_merged_model_survives_a_reload(model, images):
    merged = reparameterize_model(model)
    merged.reset_classifier(4)
    again = small_model(num_classes=4, inference_mode=True, shake=False)
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(images), merged(images))


def test_as_the_encoder_of_a_larger_model(images):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = small_model(features_only=True)
            self.global_encoder = small_model(num_classes=0)
            self.decoder = nn.Conv2d(32, 2, 1)

        def forward(self, x):
            return self.decoder(self.encoder(x)[-1]) + self.global_encoder(x).mean()

    whole = wake_weights(shake_norms(Segmenter())).eval()
    merged = reparameterize_model(whole)
    assert not any(isinstance(m, (nn.BatchNorm2d, SMPKernel)) for m in merged.modules())
    assert difference(merged(images), whole(images)) < TOLERANCE[torch.float32]


def test_a_norm_that_was_synchronised_or_frozen_merges(model, images):
    expected = model(images)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    for converted in (synchronised, frozen):
        assert difference(reparameterize_model(converted.eval())(images), expected) < TOLERANCE[torch.float32]


def test_the_merged_architecture_is_built_on_meta():
    merged = timm.create_model('smpconv_tiny', inference_mode=True, device='meta')
    assert all(p.is_meta for p in merged.parameters())
    assert not any('bn' in k or 'kernel' in k for k in merged.state_dict())


def test_a_merged_model_still_trains(model, images):
    merged = reparameterize_model(model).train()
    merged(images).square().sum().backward()
    assert [n for n, p in merged.named_parameters() if p.grad is None] == ['head.norm.weight', 'head.norm.bias']
    assert not any(p.requires_grad for p in merged.head.norm.parameters())


@torch.no_grad()
def test_only_merged_blocks_overwrite_what_a_hook_sees(model, images):
    """A research model's hidden activations are those before GELU, with and without gradients."""
    seen = []
    block = model.stages[0].blocks[1]
    block.pw1.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].clone(), output)))
    model(images)
    inputs, output = seen[0]
    assert torch.equal(output, block.pw1(inputs))
    assert (output < -0.2).any()  # GELU ends at -0.17
    merged = reparameterize_model(model)
    with torch.enable_grad():
        expected = merged(images)
    assert torch.equal(merged(images), expected)
