"""Render all SMP kernels of a model at other sizes."""
import math
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, TypeVar, Union

import torch.nn as nn

from ..layers.merged import MERGED_CONVS
from ..layers.rep_conv import RepConv
from ..layers.smp_conv import SMPConv1d, SMPConv2d

__all__ = ['resize_kernels']

_int_or_pair = Union[int, Tuple[int, int]]
_Convs = Dict[str, Union[SMPConv1d, SMPConv2d]]
_ModelT = TypeVar('_ModelT', bound=nn.Module)


def resize_kernels(
        model: _ModelT,
        scale: Optional[float] = None,
        kernel_sizes: Union[int, Mapping[int, _int_or_pair], Sequence[_int_or_pair], None] = None,
) -> _ModelT:
    """Render all SMP kernels of a model at other sizes, scaled so that they stay the same continuous convolutions.

    `SMPKernel.resize` says what stays the same. The parameters do not change, and neither do the keys and shapes of the
    state dict, so a checkpoint fits a model of any size and does not store the size. Resize a model after
    `create_model` and before merging or compiling it. Its other layers then get denser maps than in training: compute
    the BatchNorm statistics again, as docs/kernel-size.md shows, or continue the training.

    A sequence network takes sequences of as many times as many samples: 2 × 784 for a scale of 2. Its kernels then have
    2 × 783 + 1 samples.

    Args:
        model: Has `SMPConv2d` or `SMPConv1d` modules. It is changed in place.
        scale: For maps that are `scale` times as dense as in training, such as those of images of `scale` times the
            side. Each kernel spans as many times the steps for which it was built, to the nearest odd size: 61 instead
            of 31 for a scale of 2. The small kernels of `RepSMPConv2d` are interpolated linearly; dilated ones and
            those over all channels stay as they are. 1 brings back the kernels with which the model was built.
        kernel_sizes: Instead of `scale`, for larger or smaller kernels on the same maps: a size for all, a mapping from
            present to new sizes, such as `{31: 51, 29: 49}`, or a size for each stage of an `SMPConvNet`, as in
            `create_model`. Small kernels stay as they are.

    Returns:
        The model.

    Raises:
        ValueError: An argument breaks these rules, the model is merged or has no SMP kernels, or a size would be even,
            1, or smaller than a small kernel. The model is unchanged then.

    Example:
        >>> import timm, timm_smpconv
        >>> model = timm.create_model('smpconv_mobile31')
        >>> model = timm_smpconv.resize_kernels(model, scale=2)
        >>> [stage.blocks[0].dwconv.large.conv.kernel_size for stage in model.stages]
        [(61, 61), (57, 57), (53, 53), (25, 25)]
        >>> model = timm_smpconv.resize_kernels(model, kernel_sizes=(51, 49, 47, 13))
    """
    if (scale is None) == (kernel_sizes is None):
        raise ValueError(
            f'resize_kernels takes either scale or kernel_sizes, got scale={scale} and kernel_sizes={kernel_sizes}')
    modules = dict(model.named_modules())
    convs: _Convs = {name: module for name, module in modules.items() if isinstance(module, (SMPConv1d, SMPConv2d))}
    merged = any(isinstance(module, MERGED_CONVS) for module in modules.values())
    if merged or not convs:
        found = 'a merged model: resize before merging' if merged else f'{type(model).__name__} without one'
        raise ValueError(f'model must be unmerged and have an SMPConv2d or SMPConv1d, got {found}')
    if scale is not None:
        sizes = _scaled(convs, scale)
    elif isinstance(kernel_sizes, Mapping):
        sizes = _mapped(convs, kernel_sizes)
    elif isinstance(kernel_sizes, Sequence):
        sizes = _by_stage(convs, model, kernel_sizes)
    else:
        sizes = dict.fromkeys(convs, kernel_sizes)

    # Of sequence networks: they know the length of the kernels behind them.
    stems: Dict[str, Any] = {name: module for name, module in modules.items() if hasattr(module, 'kernel_length_now')}
    if any(stem.permutation is not None for stem in stems.values()):
        raise ValueError('model must not permute its samples, since a kernel means nothing between them')
    layers: Dict[str, Any] = {}
    options: Dict[str, Any] = {}
    for name, conv in convs.items():
        parent = modules.get(name.removesuffix('large.conv').removesuffix('.'))
        is_branch = isinstance(parent, RepConv)
        layers[name], options[name] = (parent, dict(small_scale=scale)) if is_branch else (conv, {})
        try:
            layers[name].check_resize(sizes[name], **options[name])
        except ValueError as error:
            raise ValueError(f'{name or type(conv).__name__}: {error}') from None
    for name, stem in stems.items():
        network = name.removesuffix('stem')
        of_network = next(c for c, m in convs.items() if c.startswith(network) and isinstance(m, SMPConv1d))
        stem.resize(convs[of_network].check_resize(sizes[of_network])[0][0])
    for name, layer in layers.items():
        layer.resize(sizes[name], **options[name])
    return model


def _scaled(convs: _Convs, scale: float) -> Dict[str, Any]:
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f'scale must be a positive and finite number, got {scale!r}')

    def scaled(k: int, step: int) -> int:
        return step * round(scale * (k - 1) / step) + 1

    return {
        name: tuple(scaled(k, 1 if getattr(conv, 'causal', False) else 2) for k in conv.trained_size)
        for name, conv in convs.items()}


def _mapped(convs: _Convs, sizes: Mapping[Any, Any]) -> Dict[str, Any]:
    """The new size of each; one that the mapping does not name stays."""
    new = {}
    for key, value in sizes.items():
        names = [name for name, conv in convs.items() if key == conv.kernel_size or {key} == set(conv.kernel_size)]
        if not names:
            present = sorted({conv.kernel_size for conv in convs.values()})
            raise ValueError(f'kernel_sizes must map sizes that the model has, {present}, got {key}')
        new.update(dict.fromkeys(names, value))
    return {name: new.get(name, conv.kernel_size) for name, conv in convs.items()}


def _by_stage(convs: _Convs, model: Any, sizes: Sequence[Any]) -> Dict[str, Any]:
    stages = getattr(model, 'stages', ())
    if len(stages) != len(sizes):
        raise ValueError(
            f'kernel_sizes must be a number, a mapping or, for a model with stages, as many sizes, got {sizes} for '
            f'{type(model).__name__} with {len(stages)} stages')
    of_stage = {module: size for stage, size in zip(stages, sizes) for module in stage.modules()}
    return {name: of_stage.get(conv, conv.kernel_size) for name, conv in convs.items()}
