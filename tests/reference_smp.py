"""The oracle for the CIFAR-10 and the sequence networks, written plainly, with nothing of the package under test.

State dicts have the layout of the authors' code (smp/models, smp/ckconv/nn). Sequences have one dimension, images two.

B batch, I input channels, O output channels, P points, K kernel size (one or two numbers), N size of the input
"""
import re
from typing import Any, Dict

import numpy as np
import torch
import torch.nn.functional as F
from reference import RandomWeights
from torch.utils.checkpoint import checkpoint

_SEQUENCE = dict(in_chans=1, num_classes=10, widths=(30,) * 6, points=30, small=5, bias=False, spread=0.2, gain=1)

# Radii at the start of a training; `spread` of the coordinates and `gain` of the weights are of random state dicts.
CONFIGS: Dict[str, Dict[str, Any]] = {
    'smpconv_tcn_smnist': dict(_SEQUENCE, size=(784,), radius=0.002),
    'smpconv_tcn_pmnist': dict(_SEQUENCE, size=(784,), radius=0.002),
    'smpconv_tcn_scifar10': dict(_SEQUENCE, size=(1024,), radius=0.002, in_chans=3, bias=True),
    'smpconv_tcn_ct': dict(_SEQUENCE, size=(182,), radius=0.012, in_chans=3, num_classes=20, bias=True),
    'smpconv_tcn_sc': dict(_SEQUENCE, size=(161,), radius=0.012, in_chans=20, bias=True),
    'smpconv_tcn_scraw': dict(_SEQUENCE, size=(16000,), radius=0.0002),
    'smpconv_resnet_cifar10': dict(
        in_chans=3, num_classes=10, widths=(24, 24, 36, 36, 36, 48, 48), points=16, small=3, bias=False,
        spread=0.3, gain=0.3, size=(33, 33), radius=0.12),
}


def positions(count, like):
    return torch.zeros_like(like[:1]) if count == 1 else torch.arange(count, dtype=like.dtype) * (2 / (count - 1)) - 1


def render(coords, radius, weight, size, last=None):
    """As `reference.kernel_loop` with the average, all entries at once, or the last ones in one dimension.

    coords (O, P, D), radius (O, P), weight (O, I, P).
    """
    x, *y = coords.unsqueeze(-1).unbind(2)  # (O, P, 1)
    distance = (positions(size[-1], coords.flatten())[-last if last else 0:] - x).abs()  # (O, P, K); to the right
    if y:
        distance = (-positions(size[0], coords.flatten()) - y[0]).abs()[..., None] + distance[..., None, :]  # upwards
    terms = (1 - distance.flatten(2) / radius[..., None]).clamp(min=0)
    average = terms / ((terms != 0).sum(1, keepdim=True, dtype=terms.dtype) + 1e-6)
    return (weight @ average).unflatten(-1, distance.shape[2:])  # (O, I, *K)


def convolve(x, kernel, causal):
    """Output n is the sum of x[n + m - before] · kernel[m]: by definition if that is small, in frequencies otherwise.

    Causal: the last entry of the kernel multiplies the current sample. Else the kernel is centred.
    """
    size, kernel_size = x.shape[2:], kernel.shape[2:]
    before = [k - 1 if causal else k // 2 for k in kernel_size]
    dims = list(range(2, x.ndim))
    if size.numel() * kernel_size.numel() <= 2 ** 16:
        padding = [n for k, b in zip(reversed(kernel_size), reversed(before)) for n in (b, k - 1 - b)]
        return (F.conv1d if x.ndim == 3 else F.conv2d)(F.pad(x, padding), kernel)
    total = [n + k - 1 for n, k in zip(size, kernel_size)]  # at least: without wrapping around
    frequencies = torch.einsum(
        'bi...,oi...->bo...', torch.fft.rfftn(x, total, dims), torch.fft.rfftn(kernel.flip(dims), total, dims))
    y = torch.fft.irfftn(frequencies, total, dims)
    for dim, n, k, b in zip(dims, size, kernel_size, before):
        y = y.narrow(dim, k - 1 - b, n)
    return y


def permutation(length):
    """The authors' first draw after they seed NumPy with 0 (trainer.py, tester.py)."""
    return torch.from_numpy(np.random.RandomState(0).permutation(length))


def authors_state_dict(name, seed=0, dtype=torch.float32, **changes):
    """Random weights with non-trivial BatchNorm statistics in the authors' layout.

    Points are spread over more samples than at the start of a training, and no sample lies on an edge, where a kernel
    or its derivative jumps. Changes are to the entries of `CONFIGS`.
    """
    config = {**CONFIGS[name], **changes}
    size, points, small = config['size'], config['points'], config['small']
    dims = len(size)
    draw = RandomWeights(seed, dtype)
    sd = draw.sd

    def smp(key, in_chs, out_chs, bias):
        radius = config['radius'] * 2 ** (torch.rand(out_chs, points, generator=draw.generator) * 4 - 1)
        radius = sd[f'{key}.Kernel.radius'] = radius.clamp(max=1).to(dtype).reshape(out_chs, points, *(1,) * dims)
        coords = sd[f'{key}.Kernel.weight_coord'] = torch.zeros(out_chs, points, dims, dtype=dtype)
        bad = torch.ones(out_chs, points, dtype=torch.bool)
        while bad.any():
            drawn = torch.randn(int(bad.sum()), dims, generator=draw.generator) * config['spread']
            drawn = 1 - drawn.abs() if dims == 1 else drawn
            coords[bad] = drawn.clamp(-1, 1).to(dtype)
            bad[bad.clone()] = on_edge(coords[bad], radius.flatten(1)[bad], size)
        reached = min(points * (2 * config['radius'] * size[0]) ** dims, size[0] ** dims)  # samples, about
        draw.normal(f'{key}.Kernel.weights', out_chs, in_chs, points, std=config['gain'] * (in_chs * reached) ** -0.5)
        if bias:
            draw.normal(f'{key}.bias', out_chs, std=0.2)
        sd[f'{key}.train_length'] = torch.tensor([size[0]], dtype=torch.int32)

    def pair(prefix, number, in_chs, out_chs, small_bias):
        smp(f'{prefix}cconv{number}', in_chs, out_chs, config['bias'])
        taps = (small,) * dims
        std = 0.5 * (in_chs * small ** dims) ** -0.5
        draw.normal(f'{prefix}cconv{number}s.weight', out_chs, in_chs, *taps, std=std)
        if small_bias:
            draw.normal(f'{prefix}cconv{number}s.bias', out_chs, std=0.2)
        draw.norm(f'{prefix}norm{number}', out_chs)
        draw.norm(f'{prefix}norm{number}s', out_chs)

    width, widths = config['in_chans'], config['widths']
    if dims == 2:
        pair('', 1, width, widths[0], small_bias=True)
        width = widths[0]
    for i, (in_chs, out_chs) in enumerate(zip((width, *widths), widths)):
        block = f'{"backbone" if dims == 1 else "blocks"}.{i}.'
        pair(block, 1, in_chs, out_chs, small_bias=False)
        pair(block, 2, out_chs, out_chs, small_bias=False)
        if in_chs != out_chs:
            draw.normal(f'{block}shortcut.0.weight', out_chs, in_chs, *(1,) * dims, std=in_chs ** -0.5)
            draw.normal(f'{block}shortcut.0.bias', out_chs, std=0.2)
    head, ones = ('finallyr', ()) if dims == 1 else ('out_layer', (1, 1))
    draw.normal(f'{head}.weight', config['num_classes'], widths[-1], *ones, std=widths[-1] ** -0.5)
    draw.normal(f'{head}.bias', config['num_classes'], std=0.2)
    return sd


def on_edge(coords, radius, size):
    """Whether a sample is so near to the edge or to a corner of a point that float32 may put it on the other side.

    coords (N, D), radius (N,).
    """
    def gaps(position, count):
        index = (position + 1) * (count - 1) / 2
        return (index - index.round()).abs() * 2 / (count - 1)

    x, *y = coords.double()[..., None].unbind(1)  # (N, 1)
    reach = radius.double()[:, None]
    found = [gaps(x, size[-1])]
    if y:
        found.append(gaps(y[0], size[0]))
        reach = reach - (positions(size[0], y[0].flatten()) - y[0]).abs()  # (N, K), in each row
    found += [gaps(x - reach, size[-1]), gaps(x + reach, size[-1])]
    return torch.cat(found, 1).amin(1) < 2e-6


def logits(sd, name, x, training=False):
    """The authors' network, from sequences (B, C, L) or images (B, C, H, W) to logits.

    Args:
        sd: Weights of any sizes, as `authors_state_dict` gives them.
        name: Its name says which permutation there is, and the kernel size if sd does not have it.
        x: Normalised input of the dtype of sd.
        training: By the statistics of the batch. There is no dropout.
    """
    dims = len(CONFIGS[name]['size'])
    trained = [value for key, value in sd.items() if key.endswith('train_length')]
    size = (int(trained[0]),) * dims if trained else CONFIGS[name]['size']
    per_channel = (slice(None), *(None,) * dims)

    def norm(x, key):
        if training:
            over = [0, *range(2, x.ndim)]
            mean, var = x.mean(over), x.var(over, unbiased=False)
        else:
            mean, var = sd[f'{key}.running_mean'], sd[f'{key}.running_var']
        scale = sd[f'{key}.weight'] / (var + 1e-5).sqrt()
        return x * scale[per_channel] + (sd[f'{key}.bias'] - mean * scale)[per_channel]

    def add_bias(x, key):
        return x + sd[key][per_channel] if key in sd else x

    def conv(x, prefix, number):
        key = f'{prefix}cconv{number}'
        coords, radius, weight = (sd[f'{key}.Kernel.{part}'] for part in ('weight_coord', 'radius', 'weights'))
        last = min(size[0], x.shape[2]) if dims == 1 else None  # no other entry meets a sample of x
        # Rendered again in the backward pass: with 16,000 samples its intermediate results take 8 GB.
        kernel = checkpoint(render, coords, radius.flatten(1), weight, size, last, use_reentrant=False)
        large = add_bias(convolve(x, kernel, causal=dims == 1), f'{key}.bias')
        small = add_bias(convolve(x, sd[f'{key}s.weight'], causal=dims == 1), f'{key}s.bias')
        return norm(large, f'{prefix}norm{number}') + norm(small, f'{prefix}norm{number}s')

    def shortcut(x, block):
        if f'{block}shortcut.0.weight' not in sd:
            return x
        return add_bias(convolve(x, sd[f'{block}shortcut.0.weight'], causal=False), f'{block}shortcut.0.bias')

    if dims == 2:
        x = conv(x, '', 1).relu()
        i = 0
        while f'blocks.{i}.norm1.weight' in sd:
            block = f'blocks.{i}.'
            x = (conv(conv(x, block, 1).relu(), block, 2) + shortcut(x, block)).relu()
            i += 1
        return x.mean((2, 3)) @ sd['out_layer.weight'].flatten(1).T + sd['out_layer.bias']
    x = x.flatten(2)  # images row by row
    if name == 'smpconv_tcn_pmnist':
        x = x[:, :, permutation(x.shape[2])]
    i = 0
    while f'backbone.{i}.norm1.weight' in sd:
        block = f'backbone.{i}.'
        x = (conv(conv(x, block, 1).relu(), block, 2).relu() + shortcut(x, block)).relu()
        i += 1
    return x[:, :, -1] @ sd['finallyr.weight'].T + sd['finallyr.bias']


def parameters(sd):
    """The entries of a state dict that are trained."""
    return {k: v for k, v in sd.items() if v.is_floating_point() and 'running_' not in k}


def adam_updates(sd, name, batches, lr, weight_decay=1e-5):
    """Parameters after one update for each batch (x, y) of `batches`, as the authors' trainer.py and optim.py make it.

    Cross entropy; Adam with an L2 term, which one-dimensional parameters, biases, coordinates and radii do not have;
    radii at a tenth of the rate, and in [1e-4, 1] after each update.
    """
    params = {k: v.clone().requires_grad_() for k, v in parameters(sd).items()}
    first, second = ({k: torch.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for step, (x, y) in enumerate(batches, 1):
        loss = F.cross_entropy(logits({**sd, **params}, name, x, training=True), y)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        for key, param in params.items():
            grad, value = grads[key], param.detach()
            if value.ndim > 1 and not key.endswith(('weight_coord', 'radius')):
                grad = grad + weight_decay * value
            first[key] = 0.9 * first[key] + 0.1 * grad
            second[key] = 0.999 * second[key] + 0.001 * grad ** 2
            mean, variance = first[key] / (1 - 0.9 ** step), second[key] / (1 - 0.999 ** step)
            rate = lr * 0.1 if key.endswith('radius') else lr
            value = value - rate * mean / (variance.sqrt() + 1e-8)
            params[key] = (value.clamp(1e-4, 1) if key.endswith('radius') else value).requires_grad_()
    return {k: v.detach() for k, v in params.items()}


_THEIRS = (  # part of a key of this package: the authors'
    (r'\bconv(\d)\.large\.conv\.kernel\.coords$', r'cconv\1.Kernel.weight_coord'),
    (r'\bconv(\d)\.large\.conv\.kernel\.radius$', r'cconv\1.Kernel.radius'),
    (r'\bconv(\d)\.large\.conv\.kernel\.weight$', r'cconv\1.Kernel.weights'),
    (r'\bconv(\d)\.large\.conv\.bias$', r'cconv\1.bias'),
    (r'\bconv(\d)\.large\.bn\.', r'norm\1.'),
    (r'\bconv(\d)\.small\.conv\.', r'cconv\1s.'),
    (r'\bconv(\d)\.small\.bn\.', r'norm\1s.'),
    (r'\bshortcut\.(?=\w+$)', 'shortcut.0.'),
    (r'^stem\.(?=c|n)', ''),
)


def in_authors_layout(sd):
    """A state dict of this package under the authors' keys, for `logits`; one in their layout comes back as it is."""
    images = any(key.startswith('stem.conv1.') for key in sd)
    out = {}
    for key, value in sd.items():
        for ours, theirs in (
                *_THEIRS, (r'^head\.fc\.', 'out_layer.' if images else 'finallyr.'),
                (r'^blocks\.', 'blocks.' if images or 'out_layer.weight' in sd else 'backbone.')):
            key = re.sub(ours, theirs, key)
        out[key] = value
    return out
