"""The CIFAR-10 and sequence networks with the authors' checkpoints: logits, gradients and updates of the oracle.

Oracle: tests/reference_smp.py, which test_authors_code.py compares with the authors' own code.
"""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import difference
from reference import kernel_loop
from reference_smp import CONFIGS, adam_updates, authors_state_dict, convolve, in_authors_layout, logits, render
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch.overrides import TorchFunctionMode

from timm_smpconv import CheckpointError

IMAGES = 'smpconv_resnet_cifar10'
BEFORE_A_NORM = ('cconv1.bias', 'cconv2.bias', 'cconv1s.bias')  # biases that have no effect in training
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


class Small:
    """A narrow network of the oracle and of the package, and an input."""

    def __init__(self, name, dtype=torch.float64, **changes):
        self.name, self.dtype = name, dtype
        if name == IMAGES:
            self.args = dict(dims=(4, 4, 6), kernel_size=9, points=5, small_kernel=3)
            sizes = dict(widths=(4, 4, 6), size=(9, 9), points=5, radius=0.5)
        else:
            self.args = dict(depth=3, dim=6, points=5, seq_len=40, small_kernel=5)
            sizes = dict(widths=(6,) * 3, size=(40,), points=5, radius=0.06)
        self.sd = authors_state_dict(name, dtype=dtype, **{**sizes, **changes})
        self.x = torch.randn(3, CONFIGS[name]['in_chans'], *((10, 12) if name == IMAGES else (40,)), dtype=dtype)

    def load(self, tmp_path, prefix='', **kwargs):
        return load(self.name, self.sd, tmp_path, prefix, **{**self.args, **kwargs}).to(self.dtype)


def load(name, sd, tmp_path, prefix='', **kwargs):
    """From a file as the authors' trainer.py writes it."""
    file = tmp_path / 'checkpoint.pt'
    torch.save({
        'model': {prefix + key: value for key, value in sd.items()}, 'optimizer': {'state': {}, 'param_groups': []},
        'lr_scheduler': {'lr': 1e-4}, 'epoch': 200}, file)
    dtype = next(value.dtype for value in sd.values())
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), dtype=dtype, **kwargs)
    return model.eval()


def compare(model, name, sd, x, training=False):
    """Logits and the gradients of the input and of every parameter, relative to the largest entry of each."""
    tolerance = TOLERANCE[x.dtype]
    named = in_authors_layout(dict(model.named_parameters()))
    exact = {k: v.double().requires_grad_(k in named) if v.is_floating_point() else v for k, v in sd.items()}
    x_exact, x = x.detach().double().requires_grad_(), x.detach().requires_grad_()
    expected, actual = logits(exact, name, x_exact, training), model.train(training)(x)
    assert difference(actual, expected) < tolerance
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [x_exact, *(exact[k] for k in named)], cotangent)
    got = torch.autograd.grad(actual, [x, *named.values()], cotangent.to(x.dtype))
    for key, g, w in zip(['input', *named], got, wanted, strict=True):
        scale = 1 if training and key.endswith(BEFORE_A_NORM) else w.abs().max()  # a gradient of rounding
        assert (g - w.reshape(g.shape)).abs().max() <= tolerance * scale, key


class Activations(TorchFunctionMode):
    """Notes how near the input of a ReLU comes to 0, where its derivative jumps. A sum of zeros of ReLUs stays 0."""
    least = math.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.relu:
            magnitude = args[0].detach().abs()
            self.least = min(self.least, magnitude.where(magnitude > 0, 1).min().item())
        return func(*args, **(kwargs or {}))


def draw_input(name, sd, shape, training):
    """A random input for which float32 rounds no activation of the network to the other side of a ReLU."""
    while True:
        x = torch.randn(shape)
        activations = Activations()
        with torch.no_grad(), activations:
            logits(double(sd), name, x.double(), training)
        if activations.least > 1e-5:
            return x


def double(sd):
    return {k: v.double() if v.is_floating_point() else v for k, v in sd.items()}


@pytest.mark.parametrize('size', [(7,), (8,), (2,), (1,), (5, 5), (3, 7)])
def test_the_oracle_renders_as_the_loop(size):
    coords = torch.rand(3, 5, len(size), dtype=torch.float64) * 2 - 1
    radius, weight = torch.rand(3, 5, dtype=torch.float64) + 0.1, torch.randn(3, 4, 5, dtype=torch.float64)
    kernel = render(coords, radius, weight, size)
    assert difference(kernel, kernel_loop(coords, radius, weight, size, average=True)) < 1e-12
    if len(size) == 1:
        assert torch.equal(render(coords, radius, weight, size, last=1), kernel[..., -1:])


@pytest.mark.parametrize('causal,size,kernel_size', [
    (True, (300,), (300,)), (True, (300,), (251,)), (True, (301,), (500,)), (False, (20, 24), (17, 15))])
def test_the_oracle_convolves_in_frequencies_as_by_definition(causal, size, kernel_size):
    x, kernel = (torch.randn(2, 3, *n, dtype=torch.float64) for n in (size, kernel_size))
    k = kernel_size
    padding = (k[0] - 1, 0) if causal else (k[1] // 2, k[1] // 2, k[0] // 2, k[0] // 2)
    expected = (F.conv1d if causal else F.conv2d)(F.pad(x, padding), kernel)
    assert difference(convolve(x, kernel, causal), expected) < 1e-12


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', CONFIGS)
def test_small_networks(name, dtype, training, tmp_path):
    small = Small(name, dtype)
    x = draw_input(name, small.sd, small.x.shape, training).to(dtype)
    compare(small.load(tmp_path, drop_rate=0., input_drop_rate=0.), name, small.sd, x, training)


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('name', CONFIGS)
def test_other_inputs_and_merged_networks(name, prefix, tmp_path):
    """Shorter sequences and odd images; sequences that come as images; the same of the merged network."""
    small = Small(name)
    model = small.load(tmp_path, prefix)
    inputs = [small.x]
    if name == IMAGES:
        inputs.append(small.x[:, :, :7, :5])
    else:
        inputs.append(small.x.unflatten(2, (5, 8)))
        assert torch.equal(model(inputs[1]), model(small.x))
    if name not in (IMAGES, 'smpconv_tcn_pmnist'):
        inputs += [small.x[:, :, :11], small.x[:, :, :1]]
    merged = reparameterize_model(model)
    with torch.no_grad():
        for x in inputs:
            expected = logits(small.sd, name, x)
            for network in model, merged:
                assert difference(network(x), expected) < 1e-10


@pytest.mark.parametrize('change', [dict(small=3), dict(points=1), dict(in_chans=2), dict(num_classes=3)])
@pytest.mark.parametrize('name', ['smpconv_tcn_sc', IMAGES])
def test_other_arguments(name, change, tmp_path):
    if name == IMAGES and 'small' in change:
        change = dict(small=5)
    small = Small(name, **change)
    arguments = {{'small': 'small_kernel'}.get(key, key): value for key, value in change.items()}
    compare(small.load(tmp_path, **arguments), name, small.sd, small.x[:, :change.get('in_chans')])


@pytest.mark.parametrize('name', CONFIGS)
def test_six_updates(name, tmp_path):
    """By the optimizer's name in timm; radii that start at both ends of their range."""
    small = Small(name)
    for key, value in small.sd.items():
        if key.endswith('radius'):
            value[:, 0], value[0, 1] = 1., 1e-4
    model = small.load(tmp_path, drop_rate=0., input_drop_rate=0.).train()
    optimizer = create_optimizer_v2(model, opt='smpadam', lr=1e-2, weight_decay=1e-5)
    batches = [(torch.randn_like(small.x), torch.arange(3)) for _ in range(6)]
    for x, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    expected = adam_updates(small.sd, name, batches, lr=1e-2)
    found = in_authors_layout(dict(model.named_parameters()))
    assert found.keys() == expected.keys()
    radii = [value for key, value in found.items() if key.endswith('radius')]
    assert any((value == 1).any() for value in radii) and any((value < 1)[:, 0].any() for value in radii)
    for key, value in found.items():
        assert (value - expected[key].reshape(value.shape)).abs().max() < 1e-6, key
        moved = (value - small.sd[key].reshape(value.shape)).abs().max()
        assert moved > 1e-3 or key.endswith(BEFORE_A_NORM), key


@pytest.mark.parametrize('name,other,message', [
    ('smpconv_tcn_sc', 'smpconv_tcn_smnist', r'missing \(blocks.0.conv1.large.conv.bias, '),
    ('smpconv_tcn_smnist', 'smpconv_tcn_ct', r'12 extra \(blocks.0.conv1.large.conv.bias, '),
    ('smpconv_tcn_ct', 'smpconv_tcn_sc', r'train_length must be 182, the length of the kernels'),
    ('smpconv_tcn_smnist', IMAGES, 'extra .*stem.conv1'),
    (IMAGES, 'smpconv_tcn_smnist', 'missing .*stem.conv1'),
    ('smpconv_tiny', 'smpconv_tcn_smnist', 'missing'),
])
def test_a_checkpoint_of_another_task_is_refused(name, other, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(name, authors_state_dict(other), tmp_path)


@pytest.mark.parametrize('change,message', [
    (dict(points=29), r'conv.kernel.coords \(30, 29, 1\) instead of \(30, 30, 1\)'),
    (dict(widths=(20,) * 6), r'\(20, 30, 1\) instead of \(30, 30, 1\)'),
    (dict(widths=(30,) * 5), r'missing \(blocks.5'),
    (dict(small=3), r'small.conv.weight \(30, 30, 3\) instead of \(30, 30, 5\)'),
])
def test_a_checkpoint_of_another_shape_is_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load('smpconv_tcn_smnist', authors_state_dict('smpconv_tcn_smnist', **change), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('dtype,training', [(torch.float32, False), (torch.float64, False), (torch.float64, True)])
@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'smpconv_tcn_pmnist'])  # sMNIST's, permuted
def test_whole_networks(name, dtype, training, tmp_path):
    """Inputs are small in float32: among the activations of large ones, some are nearly 0."""
    sd = authors_state_dict(name, dtype=dtype)
    shape = (2, CONFIGS[name]['in_chans'], *((32, 32) if name == IMAGES else CONFIGS[name]['size']))
    if name == 'smpconv_tcn_scraw':
        shape = (2, 1, 1000)
    if dtype == torch.float32:
        x = draw_input(name, sd, (*shape[:2], *((9, 9) if name == IMAGES else (32,))), training)
    else:
        x = torch.randn(shape, dtype=dtype)
    compare(load(name, sd, tmp_path, drop_rate=0., input_drop_rate=0.), name, sd, x, training)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_logits_of_whole_inputs(name, tmp_path):
    sd = authors_state_dict(name)
    model = load(name, sd, tmp_path)
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    with torch.inference_mode():
        assert difference(model(x), logits(double(sd), name, x.double())) < 1e-4
