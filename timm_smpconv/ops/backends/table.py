"""The backends by name.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.
"""
from typing import Callable, Dict, NamedTuple, Optional

import torch

from . import fft, native, triton

__all__ = ['BACKENDS', 'Backend']


class Backend(NamedTuple):
    """One way to compute the convolution and its weight gradient, for tensors that are not empty.

    Attributes:
        conv: x (B, C, H, W), weight (C, 1, K, L) and bias (C,) or None → (B, C, H, W).
        corr: The gradient of the output and x, both (B, C, H, W), K and L → the gradient of the weight, (C, 1, K, L).
        unsupported: The reason why it cannot run for this x, None if it can.
        rounds_weight: Takes a float32 weight beside an x in half precision, as under autocast, and returns the weight's
            gradient in float32.
    """
    conv: Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor]], torch.Tensor]
    corr: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    unsupported: Callable[[torch.Tensor], Optional[str]]
    rounds_weight: bool = False


BACKENDS: Dict[str, Backend] = {
    'native': Backend(native.conv, native.corr, native.unsupported),
    'contiguous': Backend(native.contiguous_conv, native.contiguous_corr, native.unsupported),
    'channels_last': Backend(native.channels_last_conv, native.channels_last_corr, native.unsupported),
    'fft': Backend(fft.conv, fft.corr, fft.unsupported),
    'triton': Backend(triton.conv, triton.corr, triton.unsupported, rounds_weight=True),
}
