"""The oracle of the CIFAR-10 and sequence networks against the authors' own code, where a clone of it is at hand.

SMPCONV_AUTHORS names the clone. What the code imports beside PyTorch is replaced.
"""
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import difference
from reference_smp import CONFIGS, adam_updates, authors_state_dict, logits, parameters, permutation

pytestmark = pytest.mark.slow

FOLDER = os.environ.get('SMPCONV_AUTHORS')
if not FOLDER:
    pytest.skip("authors' code: SMPCONV_AUTHORS does not name its folder", allow_module_level=True)

COMMANDS = {  # dataset, permuted, mfcc, conv.use_fft in smp/README.md
    'smpconv_tcn_smnist': ('sMNIST', False, True),
    'smpconv_tcn_pmnist': ('sMNIST', False, True),
    'smpconv_tcn_scifar10': ('sCIFAR10', False, True),
    'smpconv_tcn_ct': ('CharTrajectories', True, False),
    'smpconv_tcn_sc': ('SpeechCommands', True, False),
    'smpconv_tcn_scraw': ('SpeechCommands', False, True),
    'smpconv_resnet_cifar10': ('CIFAR10', False, False),
}


@pytest.fixture(scope='module')
def code():
    """The modules of smp/, by name."""
    stubs = {
        'wandb': dict(run=SimpleNamespace(summary={})), 'omegaconf': dict(OmegaConf=object), 'pandas': {},
        'timm.models.layers': dict(trunc_normal_=torch.nn.init.trunc_normal_)}
    names = ('ckconv', 'models', 'model_constructor', 'optim')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(FOLDER, 'smp')))
        for name, values in stubs.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)  # torch asks for it when it imports its compiler
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
        before = set(sys.modules)
        yield {name: __import__(name) for name in names}
        for name in set(sys.modules) - before:
            if name.partition('.')[0] in names:
                del sys.modules[name]


@pytest.fixture
def double(monkeypatch):
    """Their code in float64: grids by the default dtype, and an FFT that does not end with `.float()`."""
    monkeypatch.setattr(torch.Tensor, 'float', lambda self: self)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(code, name):
    """Their network by their constructor, of the settings of their command."""
    dataset, mfcc, use_fft = COMMANDS[name]
    config = CONFIGS[name]
    images = dataset == 'CIFAR10'
    cfg = SimpleNamespace(
        dataset=dataset, dataset_params=SimpleNamespace(noise_padded=False, mfcc=mfcc, drop_rate=0),
        net=SimpleNamespace(
            type='ResNet' if images else 'TCN', no_hidden=config['widths'][0], no_blocks=len(config['widths']),
            block_width_factors=[1.0, 2, 1.5, 3, 2.0, 2] if images else [0.0], norm='BatchNorm', dropout=0.,
            nonlinearity='ReLU'),
        kernel=SimpleNamespace(
            dim_linear=0, n_points=config['points'], radius=config['radius'], coord_std=config['spread'] / 2),
        conv=SimpleNamespace(
            type='CKConv', use_fft=use_fft, horizon=33 if images else 'same', padding='same', stride=1,
            bias=config['bias'], small_kernel_size=config['small']))
    return code['model_constructor'].construct_model(cfg).module


def weights(name):
    """Of a network of full depth and width whose kernels have few samples, and an input."""
    images = name == 'smpconv_resnet_cifar10'
    sd = authors_state_dict(
        name, dtype=torch.float64, size=(9, 9) if images else (40,), radius=0.5 if images else 0.06)
    x = torch.randn(4, CONFIGS[name]['in_chans'], *((11, 11) if images else (40,)), dtype=torch.float64)
    return sd, x, x[:, :, permutation(40)] if name == 'smpconv_tcn_pmnist' else x


@pytest.mark.filterwarnings('ignore:torch.meshgrid')
@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
@pytest.mark.parametrize('name', CONFIGS)
def test_logits_gradients_and_updates(name, code, double):
    sd, x, their_x = weights(name)
    model = build(code, name)
    assert {k: v.shape for k, v in sd.items()} == {k: v.shape for k, v in model.state_dict().items()}
    cotangent = torch.randn(4, CONFIGS[name]['num_classes'])
    for training in False, True:
        model.load_state_dict(sd)
        theirs = model.train(training)(their_x)
        exact = {k: v.clone().requires_grad_(k in parameters(sd)) for k, v in sd.items()}
        ours = logits(exact, name, x, training)
        assert difference(ours, theirs) < 1e-12
        wanted = torch.autograd.grad(theirs, list(model.parameters()), cotangent)
        got = torch.autograd.grad(ours, [exact[k] for k, _ in model.named_parameters()], cotangent)
        for (key, _), g, w in zip(model.named_parameters(), got, wanted, strict=True):
            assert (g - w).abs().max() < 1e-12 * max(w.abs().max(), 1), key

    model.load_state_dict(sd)
    settings = SimpleNamespace(
        optimizer='Adam', lr=1e-3, radius_lr_factor=0.1, weight_decay=1e-5,
        optimizer_params=SimpleNamespace(momentum=-1, nesterov=False))
    optimizer = code['optim'].construct_optimizer(model, SimpleNamespace(train=settings))
    labels = torch.arange(4)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(their_x), labels).backward()
        optimizer.step()
        for module in model.modules():
            if hasattr(module, 'radius_clip'):
                module.radius_clip()
    found = adam_updates(sd, name, [(x, labels)] * 6, lr=1e-3)
    for key, value in model.named_parameters():
        assert (found[key] - value).abs().max() < 1e-8, key
