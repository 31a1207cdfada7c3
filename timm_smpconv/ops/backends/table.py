"""The backends by name.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel.
"""
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch

from . import fft, native, triton

__all__ = ['BACKENDS', 'Backend']


class Backend(NamedTuple):
    """One way to compute the convolution and its two gradients, for tensors that are not empty.

    Attributes:
        conv: x (B, C, H, W), weight (C, 1, KH, KW) and bias (C,) or None → (B, C, H, W).
        input_gradient: The gradient of the output, x and weight → the gradient of x.
        weight_gradient: The gradient of the output and x, both (B, C, H, W), KH and KW → the gradient of the weight,
            (C, 1, KH, KW).
        unsupported: The reason why it cannot run for this x, None if it can.
        rounds_weight: Takes a float32 weight beside an x in half precision, as under autocast, and returns the weight's
            gradient in float32.
        gradients: Both gradients, from the gradient of the output, x and weight, where that saves something.
    """
    conv: Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor]], torch.Tensor]
    input_gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    weight_gradient: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    unsupported: Callable[[torch.Tensor], Optional[str]]
    rounds_weight: bool = False
    gradients: Optional[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tuple[torch.Tensor, torch.Tensor]]] = None

    def compute(self, what: str, args: Any) -> torch.Tensor:
        """One of the three: 'output', 'input gradient' or 'weight gradient'."""
        if what == 'output':
            return self.conv(*args)
        return self.input_gradient(*args) if what == 'input gradient' else self.weight_gradient(*args)


def _flipped(conv):
    """The input gradient as a convolution with the flipped kernel."""
    def input_gradient(grad, x, weight):
        return conv(grad, weight.flip(2, 3), None)
    return input_gradient


BACKENDS: Dict[str, Backend] = {
    'native': Backend(
        native.conv, native.input_gradient, native.weight_gradient, native.unsupported, gradients=native.gradients),
    'contiguous': Backend(
        native.contiguous_conv, _flipped(native.contiguous_conv), native.contiguous_weight_gradient,
        native.unsupported),
    'channels_last': Backend(
        native.channels_last_conv, _flipped(native.channels_last_conv), native.channels_last_weight_gradient,
        native.unsupported),
    'fft': Backend(fft.conv, _flipped(fft.conv), fft.weight_gradient, fft.unsupported, gradients=fft.gradients),
    'triton': Backend(
        triton.conv, _flipped(triton.conv), triton.weight_gradient, triton.unsupported, rounds_weight=True),
}
