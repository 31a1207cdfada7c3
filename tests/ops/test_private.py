"""The operators without each of PyTorch's _private names that they use, against PyTorch's standard convolution."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, difference
from torch.autograd import forward_ad

from timm_smpconv.ops import Kept, _private, depthwise_conv2d, fused, fused_conv2d
from timm_smpconv.ops.dispatch import cpu


class Without:
    """A module or namespace that lacks one name, at any depth."""

    def __init__(self, owner, name):
        self._owner, self._name = owner, name

    def __getattr__(self, attribute):
        if attribute == self._name:
            raise AttributeError(attribute)
        value = getattr(self._owner, attribute)
        return Without(value, self._name) if attribute in ('_C', '_functorch', '_nn', 'ops', 'mkldnn') else value


def plain(x, weight):
    return F.conv2d(x, weight, padding=6, groups=4)


def prepacked(x, weight):
    return fused_conv2d(x, weight, padding=(6, 6), groups=4, kept=Kept())


@pytest.mark.parametrize('name', [
    '_are_functorch_transforms_active', 'is_legacy_batchedtensor', '_len_torch_dispatch_stack', '_current_level',
    '_convolution_pointwise', 'mkldnn_reorder_conv2d_weight', '_is_mkldnn_bf16_supported', '_is_mkldnn_fp16_supported',
    '_C'])
@pytest.mark.parametrize('convolve', [depthwise_conv2d, prepacked])
def test_the_operators_work_without(name, convolve, monkeypatch):
    monkeypatch.setattr(_private, 'torch', Without(torch, name))
    monkeypatch.setattr(_private, 'forward_ad', Without(forward_ad, name))
    monkeypatch.setattr(fused, '_convolve', _private.pointwise_convolution())
    monkeypatch.setattr(cpu, 'HERE', cpu.CPU('AVX512', _private.onednn_dtypes()))
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 1, 13, 13) / 13

    def grad(f):
        return torch.func.grad(lambda w: f(x, w).square().sum())(weight)

    leaf = weight.clone().requires_grad_()
    convolve(x, leaf).square().sum().backward()
    with torch.no_grad():
        pairs = [(convolve(x, weight), plain(x, weight)), (grad(convolve), grad(plain)), (leaf.grad, grad(plain))]
        pairs.append([torch.vmap(lambda x, f=f: f(x[None], weight))(x) for f in (convolve, plain)])
        half = x.bfloat16()
        pairs.append((convolve(half, weight.bfloat16()).float(), plain(half.float(), weight.bfloat16().float())))
    for i, (actual, expected) in enumerate(pairs):
        assert difference(actual, expected) < TOLERANCE[torch.bfloat16 if i == 4 else torch.float32]
