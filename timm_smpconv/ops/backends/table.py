"""The backends by name.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.
"""
from typing import Callable, Dict, NamedTuple, Optional

import torch

from . import fft, native, subquadratic, triton

__all__ = ['BACKENDS', 'RACED', 'Backend']


class Backend(NamedTuple):
    """One way to compute the convolution and its two gradients, for tensors that are not empty.

    Attributes:
        conv: x (B, C, H, W), weight (C, 1, K, L) and bias (C,) or None → (B, C, H, W).
        input_gradient: The gradient of the output, x and weight → the gradient of x.
        corr: The gradient of the output and x, both (B, C, H, W), K and L → the gradient of the weight, (C, 1, K, L).
        unsupported: The reason why it cannot run for this x, None if it can.
        rounds_weight: Takes a float32 weight beside an x in half precision, as under autocast, and returns the weight's
            gradient in float32.
    """
    conv: Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor]], torch.Tensor]
    input_gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    corr: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    unsupported: Callable[[torch.Tensor], Optional[str]]
    rounds_weight: bool = False


def _flipped(conv):
    """The input gradient as a convolution with the flipped kernel."""
    return lambda grad, x, weight: conv(grad, weight.flip(2, 3), None)


BACKENDS: Dict[str, Backend] = {
    'native': Backend(native.conv, native.input_gradient, native.corr, native.unsupported),
    'contiguous': Backend(
        native.contiguous_conv, _flipped(native.contiguous_conv), native.contiguous_corr, native.unsupported),
    'channels_last': Backend(
        native.channels_last_conv, _flipped(native.channels_last_conv), native.channels_last_corr, native.unsupported),
    'fft': Backend(fft.conv, _flipped(fft.conv), fft.corr, fft.unsupported),
    'triton': Backend(triton.conv, _flipped(triton.conv), triton.corr, triton.unsupported, rounds_weight=True),
}

# Those that race on CUDA, the reference first. `fft` and `subquadratic` are as accurate as a plane's largest value lets
# them be.
RACED: Dict[str, Backend] = {
    **BACKENDS,
    **{name: Backend(variant.conv, _flipped(variant.conv), variant.corr, variant.unsupported)
       for name, variant in triton.VARIANTS.items()},
    'subquadratic': Backend(
        subquadratic.conv, _flipped(subquadratic.conv), subquadratic.corr, subquadratic.unsupported),
}
