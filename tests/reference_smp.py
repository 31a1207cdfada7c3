"""The oracle for the CIFAR-10 and the sequence networks, written plainly, with nothing of the package's layers.

The plain networks themselves are in weights/authors_networks/smp.py, since conversions are verified
by them, too; here are random weights in the layout of the authors' code (smp/models, smp/ckconv/nn), and how the
authors train.

B batch, I input channels, O output channels, P points, K kernel size (one or two numbers), N size of the input
"""
from typing import Any, Dict

import torch
import torch.nn.functional as F
from authors_networks.smp import (
    SIZES,
    convolve as convolve,
    in_authors_layout as in_authors_layout,
    logits as logits,
    permutation as permutation,
    positions,
    render as render,
)
from reference import RandomWeights

_SEQUENCE = dict(in_chans=1, num_classes=10, widths=(30,) * 6, points=30, small=5, bias=False, spread=0.2, gain=1)

# Radii at the start of a training; `spread` of the coordinates and `gain` of the weights are of random state dicts.
CONFIGS: Dict[str, Dict[str, Any]] = {
    name: dict(config, size=SIZES[name]) for name, config in {
        'smpconv_tcn_smnist': dict(_SEQUENCE, radius=0.002),
        'smpconv_tcn_pmnist': dict(_SEQUENCE, radius=0.002),
        'smpconv_tcn_scifar10': dict(_SEQUENCE, radius=0.002, in_chans=3, bias=True),
        'smpconv_tcn_ct': dict(_SEQUENCE, radius=0.012, in_chans=3, num_classes=20, bias=True),
        'smpconv_tcn_sc': dict(_SEQUENCE, radius=0.012, in_chans=20, bias=True),
        'smpconv_tcn_scraw': dict(_SEQUENCE, radius=0.0002),
        'smpconv_resnet_cifar10': dict(
            in_chans=3, num_classes=10, widths=(24, 24, 36, 36, 36, 48, 48), points=16, small=3, bias=False,
            spread=0.3, gain=0.3, radius=0.12),
    }.items()}


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
