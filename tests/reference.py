"""The oracle: the mathematics of SMPConv written plainly, with nothing of the package's layers and operators.

The plain networks themselves are in weights/authors_networks/imagenet.py, since conversions are
verified by them as well; here are a convolution by its definition, and random weights in the layout of the authors'
ImageNet code. reference_smp.py has the other networks.
"""
import torch
import torch.nn.functional as F
from authors_networks.imagenet import (
    CONFIGS as CONFIGS,
    in_authors_layout as in_authors_layout,
    kernel_loop as kernel_loop,
    logits as logits,
)


def conv_loop(x, weight, bias=None, stride=1, padding=0):
    """Depthwise convolution by its definition: x (B, C, H, W), weight (C, 1, K, L), equal padding on all sides."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kh, kw = weight.shape[2:]
    height, width = (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    out = torch.stack([torch.stack([
        (x[:, :, i * stride:i * stride + kh, j * stride:j * stride + kw] * weight[:, 0]).sum((2, 3))
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
