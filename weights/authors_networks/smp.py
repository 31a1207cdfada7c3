"""The CIFAR-10 and the sequence networks written plainly: the oracle of conversions and tests.

State dicts have the layout of the authors' code (smp/models, smp/ckconv/nn). Sequences have one dimension, images two.

Independent of the rest of this package, and meant to stay so: it imports PyTorch and NumPy only, and shares no code
with the layers and kernels that it verifies.

B batch, I input channels, O output channels, P points, K kernel size (one or two numbers), N size of the input
"""
import re
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ['SIZES', 'convolve', 'in_authors_layout', 'logits', 'permutation', 'positions', 'render']

SIZES: Dict[str, Tuple[int, ...]] = {  # of the kernels
    'smpconv_tcn_smnist': (784,),
    'smpconv_tcn_pmnist': (784,),
    'smpconv_tcn_scifar10': (1024,),
    'smpconv_tcn_ct': (182,),
    'smpconv_tcn_sc': (161,),
    'smpconv_tcn_scraw': (16000,),
    'smpconv_resnet_cifar10': (33, 33),
}


def positions(count: int, like: torch.Tensor) -> torch.Tensor:
    """Of the samples of a kernel, in [-1, 1]: (count,)."""
    return torch.zeros_like(like[:1]) if count == 1 else torch.arange(count, dtype=like.dtype) * (2 / (count - 1)) - 1


def render(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: Sequence[int],
        last: Optional[int] = None,
) -> torch.Tensor:
    """As `imagenet.kernel_loop` with the average, all entries at once, or the last ones in one dimension.

    coords (O, P, D), radius (O, P), weight (O, I, P).
    """
    x, *y = coords.unsqueeze(-1).unbind(2)  # (O, P, 1)
    distance = (positions(size[-1], coords.flatten())[-last if last else 0:] - x).abs()  # (O, P, K); to the right
    if y:
        distance = (-positions(size[0], coords.flatten()) - y[0]).abs()[..., None] + distance[..., None, :]  # upwards
    terms = (1 - distance.flatten(2) / radius[..., None]).clamp(min=0)
    average = terms / ((terms != 0).sum(1, keepdim=True, dtype=terms.dtype) + 1e-6)
    return (weight @ average).unflatten(-1, distance.shape[2:])  # (O, I, *K)


def convolve(x: torch.Tensor, kernel: torch.Tensor, causal: bool) -> torch.Tensor:
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


def permutation(length: int) -> torch.Tensor:
    """The authors' first draw after they seed NumPy with 0 (trainer.py, tester.py)."""
    return torch.from_numpy(np.random.RandomState(0).permutation(length))


def logits(sd: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, training: bool = False) -> torch.Tensor:
    """The authors' network, from sequences (B, C, L) or images (B, C, H, W) to logits.

    Args:
        sd: Weights of any sizes in the authors' layout.
        name: Its name says which permutation there is, and the kernel size if sd does not have it.
        x: Normalised input of the dtype of sd.
        training: By the statistics of the batch. There is no dropout.
    """
    dims = len(SIZES[name])
    trained = [value for key, value in sd.items() if key.endswith('train_length')]
    size = (int(trained[0]),) * dims if trained else SIZES[name]
    per_channel = (slice(None), *(None,) * dims)

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        if training:
            over = [0, *range(2, x.ndim)]
            mean, var = x.mean(over), x.var(over, unbiased=False)
        else:
            mean, var = sd[f'{key}.running_mean'], sd[f'{key}.running_var']
        scale = sd[f'{key}.weight'] / (var + 1e-5).sqrt()
        return x * scale[per_channel] + (sd[f'{key}.bias'] - mean * scale)[per_channel]

    def add_bias(x: torch.Tensor, key: str) -> torch.Tensor:
        return x + sd[key][per_channel] if key in sd else x

    def conv(x: torch.Tensor, prefix: str, number: int) -> torch.Tensor:
        key = f'{prefix}cconv{number}'
        coords, radius, weight = (sd[f'{key}.Kernel.{part}'] for part in ('weight_coord', 'radius', 'weights'))
        last = min(size[0], x.shape[2]) if dims == 1 else None  # no other entry meets a sample of x
        # Rendered again in the backward pass: with 16,000 samples its intermediate results take 8 GB.
        kernel = checkpoint(render, coords, radius.flatten(1), weight, size, last, use_reentrant=False)
        large = add_bias(convolve(x, kernel, causal=dims == 1), f'{key}.bias')
        small = add_bias(convolve(x, sd[f'{key}s.weight'], causal=dims == 1), f'{key}s.bias')
        return norm(large, f'{prefix}norm{number}') + norm(small, f'{prefix}norm{number}s')

    def shortcut(x: torch.Tensor, block: str) -> torch.Tensor:
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


def in_authors_layout(sd: Mapping[str, Any]) -> Dict[str, Any]:
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
