"""The oracle: the mathematics of SMPConv written plainly, with nothing of the package under test.

The kernel of all networks, and the ImageNet family, whose state dicts have the layout of the authors' ImageNet code
(smp_imagenet/models/SMPConv.py). reference_smp.py has the other networks.
"""
from typing import Any, Dict

import torch
import torch.nn.functional as F

CONFIGS: Dict[str, Dict[str, Any]] = {
    'smpconv_tiny': dict(
        depths=(2, 2, 8, 2), dims=(96, 192, 384, 768), kernels=(31, 29, 27, 13), divisor=4, ratio=4),
    'smpconv_base': dict(
        depths=(2, 2, 20, 2), dims=(128, 256, 512, 1024), kernels=(31, 29, 27, 13), divisor=4, ratio=4),
    'smpconv_mobile31': dict(
        depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), kernels=(31, 29, 27, 13), divisor=8, ratio=2),
    'smpconv_mobile51': dict(
        depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), kernels=(51, 49, 47, 13), divisor=8, ratio=2),
}


def kernel_loop(coords, radius, weight, size, average=False):
    """Equation by equation, one kernel entry at a time: coords (G, P, D), radius (G, P), weight (G, C, P)."""
    def position(index, count):
        return 0.0 if count == 1 else -1.0 + 2.0 * index / (count - 1)

    rows = range(size[0]) if len(size) == 2 else [None]
    entries = []
    for i in rows:
        for j in range(size[-1]):
            distance = (position(j, size[-1]) - coords[:, :, 0]).abs()  # the first coordinate points right
            if i is not None:
                distance = distance + (-position(i, size[0]) - coords[:, :, 1]).abs()  # the second points up
            term = (1 - distance / radius).clamp(min=0)  # (G, P)
            value = (weight * term.unsqueeze(1)).sum(-1)  # (G, C)
            if average:
                value = value / ((term != 0).sum(-1, keepdim=True, dtype=term.dtype) + 1e-6)
            entries.append(value)
    return torch.stack(entries, -1).reshape(*weight.shape[:2], *size)


def conv_loop(x, weight, bias=None, stride=1, padding=0):
    """Depthwise convolution by its definition: x (B, C, H, W), weight (C, 1, K, L), equal padding on all sides."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    k, l = weight.shape[2:]
    height, width = (x.shape[2] - k) // stride + 1, (x.shape[3] - l) // stride + 1
    out = torch.stack([torch.stack([
        (x[:, :, i * stride:i * stride + k, j * stride:j * stride + l] * weight[:, 0]).sum((2, 3))
        for j in range(width)], -1) for i in range(height)], -2)
    return out if bias is None else out + bias[:, None, None]


class RandomWeights:
    """Fills a state dict with random weights of float64 that are rounded to `dtype`."""

    def __init__(self, seed, dtype):
        self.sd = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, key, *shape, std):
        self.sd[key] = (torch.randn(shape, generator=self.generator, dtype=torch.float64) * std).to(self.dtype)

    def norm(self, key, channels):
        """A BatchNorm with non-trivial statistics."""
        self.sd[f'{key}.weight'] = (torch.rand(channels, generator=self.generator) + 0.5).to(self.dtype)
        self.normal(f'{key}.bias', channels, std=0.2)
        self.normal(f'{key}.running_mean', channels, std=0.2)
        self.sd[f'{key}.running_var'] = (torch.rand(channels, generator=self.generator) + 0.5).to(self.dtype)
        self.sd[f'{key}.num_batches_tracked'] = torch.tensor(7)


def authors_state_dict(name, seed=0, num_classes=1000, dtype=torch.float32):
    """Random weights with non-trivial BatchNorm statistics in the authors' layout."""
    config = CONFIGS[name]
    draw = RandomWeights(seed, dtype)
    sd = draw.sd

    def conv_bn(key, out_chs, in_chs, k):
        draw.normal(f'{key}.conv.weight', out_chs, in_chs, k, k, std=0.5 / (in_chs * k * k) ** 0.5)
        draw.norm(f'{key}.bn', out_chs)

    dims = config['dims']
    conv_bn('stem.0', dims[0], 3, 3)
    conv_bn('stem.1', dims[0], 1, 3)
    conv_bn('stem.2', dims[0], dims[0], 1)
    conv_bn('stem.3', dims[0], 1, 3)
    for s, (depth, dim, k) in enumerate(zip(config['depths'], dims, config['kernels'])):
        for j in range(depth):
            block = f'stages.{s}.blocks.{2 * j}'
            draw.norm(f'{block}.prelkb_bn', dim)
            conv_bn(f'{block}.pw1', dim, dim, 1)
            conv_bn(f'{block}.pw2', dim, dim, 1)
            points = k * k // config['divisor']
            smp = f'{block}.large_kernel.smp'
            draw.normal(f'{smp}.conv.weight_coord', 1, points, 2, std=0.3)
            sd[f'{smp}.conv.weight_coord'].clamp_(-1, 1)
            sd[f'{smp}.conv.radius'] = ((torch.rand(1, points, 1, 1, generator=draw.generator) + 0.5) * 4 / k).to(dtype)
            draw.normal(f'{smp}.conv.weights', 1, dim, points, std=0.02)
            sd[f'{smp}.conv.kernel_coord'] = torch.zeros(1, 2, k, k, dtype=dtype)  # a buffer the oracle does not read
            draw.norm(f'{smp}.bn', dim)
            conv_bn(f'{block}.large_kernel.small_conv', dim, 1, 5)
            block = f'stages.{s}.blocks.{2 * j + 1}'
            hidden = dim * config['ratio']
            draw.norm(f'{block}.preffn_bn', dim)
            conv_bn(f'{block}.pw1', hidden, dim, 1)
            conv_bn(f'{block}.pw2', dim, hidden, 1)
        if s < 3:
            conv_bn(f'transitions.{s}.0', dims[s + 1], dim, 1)
            conv_bn(f'transitions.{s}.1', dims[s + 1], 1, 3)
    draw.norm('norm', dims[-1])
    draw.normal('head.weight', num_classes, dims[-1], std=0.02)
    draw.normal('head.bias', num_classes, std=0.02)
    return sd


def logits(sd, name, x):
    """The authors' network in evaluation mode, from image (B, 3, H, W) to logits."""
    config = CONFIGS[name]

    def bn(x, key):
        scale = sd[f'{key}.weight'] / (sd[f'{key}.running_var'] + 1e-5).sqrt()
        return x * scale[:, None, None] + (sd[f'{key}.bias'] - sd[f'{key}.running_mean'] * scale)[:, None, None]

    def conv_bn(x, key, stride=1):
        weight = sd[f'{key}.conv.weight']
        groups = x.shape[1] // weight.shape[1]
        return bn(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups), f'{key}.bn')

    def large_kernel(x, key, k):
        smp = f'{key}.smp.conv'
        kernel = kernel_loop(sd[f'{smp}.weight_coord'], sd[f'{smp}.radius'].flatten(1), sd[f'{smp}.weights'], (k, k))
        y = F.conv2d(x, kernel[0].unsqueeze(1), None, 1, k // 2, groups=x.shape[1])
        return bn(y, f'{key}.smp.bn') + conv_bn(x, f'{key}.small_conv')

    for i, stride in enumerate((2, 1, 1, 2)):
        x = conv_bn(x, f'stem.{i}', stride).relu()
    for s, (depth, k) in enumerate(zip(config['depths'], config['kernels'])):
        for j in range(depth):
            block = f'stages.{s}.blocks.{2 * j}'
            y = conv_bn(bn(x, f'{block}.prelkb_bn'), f'{block}.pw1').relu()
            x = x + conv_bn(large_kernel(y, f'{block}.large_kernel', k).relu(), f'{block}.pw2')
            block = f'stages.{s}.blocks.{2 * j + 1}'
            y = conv_bn(bn(x, f'{block}.preffn_bn'), f'{block}.pw1')
            y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))
            x = x + conv_bn(y, f'{block}.pw2')
        if s < 3:
            x = conv_bn(conv_bn(x, f'transitions.{s}.0').relu(), f'transitions.{s}.1', stride=2).relu()
    return bn(x, 'norm').mean((2, 3)) @ sd['head.weight'].T + sd['head.bias']


def in_authors_layout(sd):
    """A state dict of this package under the authors' keys, for `logits`; one in their layout comes back as it is."""
    out = {}
    for key, value in sd.items():
        if key.startswith('head.'):
            key = key.removeprefix('head.') if key.startswith('head.norm.') else key.replace('.fc', '')
        elif key.startswith('stages.') and '.downsample.' in key:
            _, stage, _, rest = key.split('.', 3)
            key = f'transitions.{int(stage) - 1}.{rest}'
        elif key.startswith('stages.') and '.norm.' in key:
            smp = int(key.split('.')[3]) % 2 == 0
            key = key.replace('.norm.', '.prelkb_bn.' if smp else '.preffn_bn.')
        for ours, theirs in (
                ('.dwconv.large.conv.kernel.coords', '.large_kernel.smp.conv.weight_coord'),
                ('.dwconv.large.conv.kernel.radius', '.large_kernel.smp.conv.radius'),
                ('.dwconv.large.conv.kernel.weight', '.large_kernel.smp.conv.weights'),
                ('.dwconv.large.bn.', '.large_kernel.smp.bn.'),
                ('.dwconv.small.', '.large_kernel.small_conv.')):
            key = key.replace(ours, theirs)
        out[key] = value
    return out
