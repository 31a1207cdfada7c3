"""The mathematics of SMPConv written plainly: the oracle of conversions and tests.

The kernel of all networks, and the ImageNet family, whose state dicts have the layout of the authors' ImageNet code
(smp_imagenet/models/SMPConv.py). smp.py has the other networks.

Independent of the rest of this package, and meant to stay so: it imports PyTorch only, and shares no code with the
layers and kernels that it verifies.
"""
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence

import torch
import torch.nn.functional as F

__all__ = ['CONFIGS', 'in_authors_layout', 'kernel_loop', 'logits']

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


def kernel_loop(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: Sequence[int],
        average: bool = False,
) -> torch.Tensor:
    """A kernel, equation by equation, one entry at a time.

    Args:
        coords: (G, P, D), in [-1, 1].
        radius: (G, P), in the same unit.
        weight: (G, C, P).
        size: One or two numbers of samples.
        average: Over the points in reach, as the networks of smp.py do.

    Returns:
        (G, C, *size).
    """
    def position(index: int, count: int) -> float:
        return 0.0 if count == 1 else -1.0 + 2.0 * index / (count - 1)

    rows: Iterable[Optional[int]] = range(size[0]) if len(size) == 2 else [None]
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


def logits(sd: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The authors' network in evaluation mode, from image (B, 3, H, W) to logits."""
    config = CONFIGS[name]

    def bn(x: torch.Tensor, key: str) -> torch.Tensor:
        scale = sd[f'{key}.weight'] / (sd[f'{key}.running_var'] + 1e-5).sqrt()
        return x * scale[:, None, None] + (sd[f'{key}.bias'] - sd[f'{key}.running_mean'] * scale)[:, None, None]

    def conv_bn(x: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
        weight = sd[f'{key}.conv.weight']
        groups = x.shape[1] // weight.shape[1]
        return bn(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups), f'{key}.bn')

    def large_kernel(x: torch.Tensor, key: str, k: int) -> torch.Tensor:
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


def in_authors_layout(sd: Mapping[str, Any]) -> Dict[str, Any]:
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
