"""The CIFAR-10 and sequence networks against the authors' way of computing them: `python -m benchmarks.cpu family`.

`authors` is the same network rebuilt plainly: kernels rendered through a (G, P, K) tensor, and dense convolutions as
their settings have them, by FFT with `einsum` over the spectra of padded inputs (sMNIST, pMNIST, sCIFAR10, SC raw) or
by `F.conv1d` and `F.conv2d` (CIFAR-10, CT, SC). Source: their smp/ckconv and smp/cfg.
"""
import pathlib
import subprocess
import sys
import time

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model

from benchmarks.timing import agree, paired
from timm_smpconv import SMPConv1d, SMPConv2d, prepack
from timm_smpconv.layers.merged import MergedConv1d, MergedLargeConv2d
from timm_smpconv.layers.small_conv import CausalConv1d
from timm_smpconv.ops.render import grid

NETWORKS = {  # batch, whether the authors' code takes the FFT
    'smpconv_resnet_cifar10': (64, False),
    'smpconv_tcn_smnist': (64, True),
    'smpconv_tcn_scifar10': (64, True),
    'smpconv_tcn_scraw': (4, True),
    'smpconv_tcn_ct': (64, False),
    'smpconv_tcn_sc': (64, False),
}


def render(kernel):
    """The kernel, (G, C, *K), through all points at all samples."""
    axes = [grid(k) for k in kernel.size]
    if len(axes) == 2:
        axes[0] = -axes[0]  # upwards
    positions = torch.stack(torch.meshgrid(*axes, indexing='ij')[::-1], -1).flatten(0, -2)  # (K, D)
    distance = (kernel.coords.unsqueeze(2) - positions).abs().sum(-1)  # (G, P, K)
    basis = F.relu(1 - distance / kernel.radius.unsqueeze(-1))
    basis = basis * (1 / ((basis != 0).sum(1, keepdim=True) + 1e-6))
    return (kernel.weight @ basis).unflatten(-1, kernel.size)


class Plain(nn.Module):
    """A convolution as the authors' code computes it, (B, C, *L) → (B, O, *L)."""

    def __init__(self, conv, by_fft):
        super().__init__()
        self.conv = conv
        self.by_fft = by_fft

    def forward(self, x):
        conv = self.conv
        weight = render(conv.kernel) if hasattr(conv, 'kernel') else conv.weight
        if x.ndim == 4:
            return F.conv2d(x, weight, conv.bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
        length = x.shape[2]
        weight = F.pad(weight, (1 - weight.shape[2] % 2, 0))
        x = F.pad(x, (weight.shape[2] - 1, 0))
        if not self.by_fft:
            return F.conv1d(x, weight, conv.bias)
        spectra = torch.fft.rfft(x), torch.fft.rfft(F.pad(weight, (0, x.shape[2] - weight.shape[2]))).conj()
        y = torch.fft.irfft(torch.einsum('bi...,oi...->bo...', *spectra))[..., :length]
        return y if conv.bias is None else y + conv.bias[:, None]


def replace(model, classes, build):
    """Put `build(module)` in the place of every module of these classes."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, classes):
                setattr(module, name, build(child))
    return model


def network(name, variant):
    """A network with the same random weights in both variants, 'ours' and 'authors'."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    if variant == 'ours':
        return model
    replace(model, CausalConv1d, lambda conv: Plain(conv, by_fft=False))
    return replace(model, (SMPConv1d, SMPConv2d), lambda conv: Plain(conv, by_fft=NETWORKS[name][1]))


def inputs(name, batch):
    """Random images, or sequences (B, C, L)."""
    channels, height, width = timm.get_pretrained_cfg(name).input_size
    x = torch.randn(batch, channels, height, width)
    return x if name == 'smpconv_resnet_cifar10' else x.flatten(2)


def training_step(name, variant):
    """A function that runs forward, backward and an Adam update, and returns the loss."""
    model = network(name, variant)
    batch = NETWORKS[name][0]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)
    x, y = inputs(name, batch), torch.randint(0, 10, (batch,))

    def step():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def alone(name, variant, steps):
    """The last step's milliseconds, the first step's loss, and the MiB by which the steps raise a process's peak."""
    command = [sys.executable, '-m', 'benchmarks.family', name, variant, str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(figure) for figure in result.stdout.split()]


def print_alone(name, variant, steps):
    """Print what `alone` reads."""
    before = resident('VmRSS')
    step, losses = training_step(name, variant), []
    torch.manual_seed(1)
    for _ in range(int(steps)):
        start = time.perf_counter()
        losses.append(step())
        seconds = time.perf_counter() - start
    print(1e3 * seconds, losses[0].item(), (resident('VmHWM') - before) / 1024)


def resident(key):
    """KiB: VmRSS now, VmHWM at most since the process started (`ru_maxrss` starts with that of its parent)."""
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def train(name, rounds):
    """A line on the training step: times, peaks, and their ratios."""
    takes_minutes = name == 'smpconv_resnet_cifar10'  # the authors' step: once
    found = {v: alone(name, v, 1 if takes_minutes and v == 'authors' else 2) for v in ('authors', 'ours')}
    times = {variant: milliseconds for variant, (milliseconds, _, _) in found.items()}
    losses = {variant: torch.tensor(loss) for variant, (_, loss, _) in found.items()}
    peaks = {variant: peak for variant, (_, _, peak) in found.items()}
    agree(f'the loss of {name}', losses['ours'], losses['authors'], 1e-3)
    if not takes_minutes:
        times = paired({variant: training_step(name, variant) for variant in found}, rounds, warmup=1)
    print(f'  {name:24} batch {NETWORKS[name][0]:2}: ' + ' | '.join(
        f'{what} {by["authors"]:8.0f} {by["ours"]:7.0f}, authors / ours {by["authors"] / by["ours"]:5.1f}'
        for what, by in (('ms', times), ('peak MiB', peaks))), flush=True)


def small(conv):
    """The plain convolution of kernel 3 between the same channels."""
    if isinstance(conv, MergedLargeConv2d):
        return nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    return nn.Sequential(nn.ConstantPad1d((2, 0), 0.), nn.Conv1d(conv.in_channels, conv.out_channels, 3))


def infer(name, rounds):
    """A line on merged inference at batch 1."""
    model = network(name, 'ours').eval()
    merged = reparameterize_model(model)
    kernels = (MergedConv1d, MergedLargeConv2d)
    networks = {
        'merged': merged,
        'prepacked': prepack(reparameterize_model(model)),
        'nn.Conv of kernel 3': replace(reparameterize_model(model), kernels, small).eval(),
    }
    x = inputs(name, 1)
    with torch.inference_mode():
        for variant in ('merged', 'prepacked'):
            agree(f'{name}, {variant}', networks[variant](x), model(x), 1e-3)
        times = paired({variant: lambda m=m: m(x) for variant, m in networks.items()}, rounds)
    least = times['nn.Conv of kernel 3']
    print(f'  {name:24} ' + ' | '.join(f'{n} {t:8.2f} ({t / least:4.1f})' for n, t in times.items()), flush=True)


def family(args):
    """The CIFAR-10 and sequence networks against the authors' way of computing them."""
    print('\ntraining step: authors, ours')
    for name in NETWORKS:
        train(name, args.rounds)
    print('\nforward, batch 1, ms (times that of nn.Conv)')
    for name in NETWORKS:
        infer(name, args.rounds)


if __name__ == '__main__':
    print_alone(*sys.argv[1:])
