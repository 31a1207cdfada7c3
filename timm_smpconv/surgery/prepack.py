"""`prepack`: a merged model for inference alone, which keeps what its convolutions derive from their weights.

Shapes: B batch, C channels, H and W height and width.
"""
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn

from ..layers.merged import MERGED_CONVS
from ..ops import Kept

__all__ = ['prepack']


def prepack(model: nn.Module, images: Optional[torch.Tensor] = None) -> nn.Module:
    """Freeze a merged model and let it cache what its convolutions derive from their weights.

    Cached are the weights in oneDNN's format, on CPUs with AVX2 or AVX-512, and the transforms of large kernels that
    are convolved by FFT. Without prepacking, every forward pass computes them again. The first pass without gradients
    makes the copies, and they are made again when the input size or the weights change. PyTorch does not count some
    changes (in place through `.data` or NumPy, or by another process): call `prepack` again after those. The copies
    take as much memory as the weights, and those of transforms several times as much. Weights that require gradients
    again are not cached, nor are weights in oneDNN's format where `fused_conv2d` does not compute in one pass.

    With `images`, every convolution on a CPU times its alternatives for inputs such as theirs and uses the fastest from
    then on. That takes about 20 forward passes. Inputs of another size, dtype, memory format or number of threads are
    computed as without `images`. Call `prepack` again with other images to measure those as well.

    Args:
        model: Merged by `timm.utils.reparameterize_model`, or holding such models. It is changed in place.
        images: What the model is called with, (B, C, H, W) of its dtype and memory format.

    Returns:
        The model, its parameters without `requires_grad`.

    Raises:
        ValueError: The model contains no merged convolution, or is in training mode and has images to measure.

    Example:
        >>> import timm, timm_smpconv
        >>> model = timm.create_model('smpconv_mobile31', inference_mode=True).eval()
        >>> model = timm_smpconv.prepack(model, torch.randn(1, 3, 64, 64))
    """
    merged = [m for m in model.modules() if isinstance(m, MERGED_CONVS)]
    if not merged:
        raise ValueError(
            f'model must be merged (timm.utils.reparameterize_model), got {type(model).__name__} without a merged '
            'convolution')
    if images is not None and model.training:
        raise ValueError('model must be in evaluation mode to be measured with images: call eval() first')
    model.requires_grad_(False)
    for module in merged:
        if module.kept is None or images is None:
            module.kept = Kept()
    if images is not None:
        with torch.no_grad():
            hooks = [module.register_forward_pre_hook(_measure, with_kwargs=True) for module in merged]
            try:
                model(images)
            finally:
                for hook in hooks:
                    hook.remove()
    return model


def _measure(module: Any, args: Tuple[torch.Tensor, ...], kwargs: Dict[str, torch.Tensor]) -> None:
    """A forward pre-hook: time the alternatives of this convolution, and remember the fastest."""
    module.measure(*args, **kwargs)
