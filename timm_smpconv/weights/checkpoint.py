"""Checkpoints: read a file, translate the authors' layout into ours, and refuse what does not fit a model."""
import argparse
import re
from pathlib import Path
from typing import Any, Collection, Container, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import adapt_input_conv

from .._errors import DataError

__all__ = [
    'CheckpointError', 'checkpoint_filter_fn', 'count_classes', 'count_inputs', 'is_authors_layout', 'read_checkpoint',
    'select_weights']

# Where training scripts, timm's among them, keep the two kinds of weights.
_WRAPPERS = {'ema': ('state_dict_ema', 'model_ema', 'ema'), 'model': ('state_dict', 'model')}

# Keys of the authors' code, applied in order; `None` drops the entry. First for ImageNet
# (smp_imagenet/models/SMPConv.py), then for CIFAR-10 and sequences (smp/models/).
_RENAMES = (
    (r'\.large_kernel\.smp\.conv\.kernel_coord$', None),
    (r'\.large_kernel\.smp\.conv\.weight_coord$', '.dwconv.large.conv.kernel.coords'),
    (r'\.large_kernel\.smp\.conv\.radius$', '.dwconv.large.conv.kernel.radius'),
    (r'\.large_kernel\.smp\.conv\.weights$', '.dwconv.large.conv.kernel.weight'),
    (r'\.large_kernel\.smp\.bn\.', '.dwconv.large.bn.'),
    (r'\.large_kernel\.small_conv\.', '.dwconv.small.'),
    (r'\.(prelkb|preffn)_bn\.', '.norm.'),
    (r'^transitions\.(\d+)\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
    (r'^norm\.', 'head.norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'(^|\.)cconv\d\.train_length$', None),
    (r'^backbone\.', 'blocks.'),
    (r'^(?=(cconv1|norm1)s?\.)', 'stem.'),
    (r'\.cconv(\d)\.Kernel\.weight_coord$', r'.conv\1.large.conv.kernel.coords'),
    (r'\.cconv(\d)\.Kernel\.radius$', r'.conv\1.large.conv.kernel.radius'),
    (r'\.cconv(\d)\.Kernel\.weights$', r'.conv\1.large.conv.kernel.weight'),
    (r'\.cconv(\d)\.bias$', r'.conv\1.large.conv.bias'),
    (r'\.cconv(\d)s\.', r'.conv\1.small.conv.'),
    (r'\.norm(\d)\.', r'.conv\1.large.bn.'),
    (r'\.norm(\d)s\.', r'.conv\1.small.bn.'),
    (r'\.shortcut\.0\.', '.shortcut.'),
    (r'^(finallyr|out_layer)\.', 'head.fc.'),
)
_CLASSIFIER = ('head.fc.weight', 'head.fc.bias')
_PREFIXES = re.compile(r'^(module\.|_orig_mod\.)+')  # of DistributedDataParallel and torch.compile


class CheckpointError(DataError):
    """A checkpoint cannot be read, or does not fit the model."""


def read_checkpoint(path: Union[str, Path]) -> Mapping[str, Any]:
    """Read a .pth, .pt, .pth.tar or .safetensors file without running code from it.

    Returns:
        The content of the file: a state dict, or a dict that a training script wrapped around one (see
        `select_weights`).

    Raises:
        CheckpointError: The file does not exist, is damaged, is not a checkpoint, or is a pickle that holds code.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix='.pth') as file:
        ...     torch.save({'state_dict': {'weight': torch.ones(2)}}, file.name)
        ...     read_checkpoint(file.name)
        {'state_dict': {'weight': tensor([1., 1.])}}
    """
    if not Path(path).exists():
        raise CheckpointError(f'file must exist, got {str(path)!r}')
    try:
        if str(path).endswith('.safetensors'):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data that training scripts save
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(checkpoint, Mapping):
            raise TypeError(f'a {type(checkpoint).__name__} instead of a dict')
        return checkpoint
    except Exception as error:  # readers raise many types for a damaged file: struct.error, IndexError, KeyError, …
        raise _unreadable(path, error) from error


def select_weights(checkpoint: Mapping[str, Any], weights: Optional[str] = None) -> Tuple[Mapping[str, Any], str]:
    """Find the state dict in what a training script saved.

    Args:
        checkpoint: The result of `read_checkpoint`; a bare state dict counts as 'model'.
        weights: 'ema' or 'model'; by default EMA weights if there are any.

    Returns:
        The state dict, without the prefixes `module.` and `_orig_mod.`, and which weights it has: 'ema' or 'model'.

    Raises:
        CheckpointError: EMA weights were asked for and there are none, or it is ambiguous which weights are meant.

    Example:
        >>> select_weights({'model': {'module.bias': torch.zeros(1)}, 'ema': {'bias': torch.ones(1)}})
        ({'bias': tensor([1.])}, 'ema')
    """
    for kind in [weights] if weights else _WRAPPERS:
        found = [wrapper for wrapper in _WRAPPERS[kind] if _holds_tensors(checkpoint.get(wrapper))]
        if len(found) > 1:
            raise CheckpointError(f'checkpoint must hold {kind} weights once, got {" and ".join(found)}')
        if found:
            return _clean(checkpoint[found[0]]), kind
    if weights == 'ema':
        raise CheckpointError(
            f"weights must be 'model' for a checkpoint without {' or '.join(_WRAPPERS['ema'])}, got 'ema'")
    return _clean(checkpoint), 'model'


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Turn a checkpoint of the authors or of this package into a state dict for `model`.

    Takes a state dict, or the dict that a training script wraps around it (EMA weights are preferred), with or without
    a leading `module.`. The classifier may be missing, superfluous or of another size: timm adapts it.

    Raises:
        CheckpointError: Keys are missing, superfluous or ambiguous; a shape, a dtype or a layout is wrong; positions or
            radii are not finite; or only one of checkpoint and model is merged.

    Example:
        >>> from timm import create_model
        >>> model = create_model('smpconv_mobile31', device='meta')
        >>> checkpoint = {'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}}
        >>> checkpoint_filter_fn(checkpoint, model).keys() == model.state_dict().keys()
        True
    """
    source = select_weights(state_dict)[0]
    out: Dict[str, Any] = {}
    authors = False
    for key, value in source.items():
        name = _rename(key)
        authors |= name != key
        if name is None:
            continue
        if name in out:
            raise CheckpointError(f'state_dict must hold every weight once, got {name} under two names')
        if name != key and isinstance(value, torch.Tensor) and value.ndim > 2 and (
                name.endswith('.kernel.radius') or name == 'head.fc.weight'):
            value = value.flatten(1)  # (G, P, 1[, 1]) → (G, P); a 1×1 convolution (O, I, 1, 1) → (O, I)
        out[name] = value
    if authors:
        out = {**getattr(model, 'authors_buffers', dict)(), **out}
    expected = model.state_dict()
    inputs = getattr(model, 'input_weights', ())
    _check_keys(out, expected)
    _check_values(out, expected, any_shape=(*inputs, *_CLASSIFIER))
    for key, value in source.items():
        _check_length(key, value, model)
    first_conv = (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv') or ()
    adapted_by_timm = [f'{name}.weight' for name in ([first_conv] if isinstance(first_conv, str) else first_conv)]
    for key in inputs:
        if key in out and key in expected and key not in adapted_by_timm:
            out[key] = _adapt_input(key, out[key], expected[key].shape)
    return out


def _check_keys(keys: Collection[str], expected: Collection[str]) -> None:
    merged, model_merged = _is_merged(keys), _is_merged(expected)
    if merged and model_merged is False:
        raise CheckpointError(
            'state_dict is merged but the model is not: create the model with inference_mode=True, since '
            'timm.utils.reparameterize_model cannot be undone')
    if merged is False and model_merged:
        raise CheckpointError(
            'state_dict is not merged but the model is: load it into a model created without inference_mode, then '
            'merge that with timm.utils.reparameterize_model(model)')
    missing = [key for key in expected if key not in keys and key not in _CLASSIFIER]
    extra = [key for key in keys if key not in expected and key not in _CLASSIFIER]
    found = [f'{len(ks)} {word} ({_some(ks)})' for word, ks in (('missing', missing), ('extra', extra)) if ks]
    if found:
        raise CheckpointError(f'state_dict must have exactly the keys of the model, got {" and ".join(found)}')


def _is_merged(keys: Iterable[str]) -> Optional[bool]:
    """Whether the keys are those of a merged model; None if there is no large kernel among them."""
    if any(re.search(r'(^|\.)(dwconv|conv[12])\.weight$', key) for key in keys):
        return True
    return False if any(re.search(r'(^|\.)(dwconv|conv[12])\.large\.', key) for key in keys) else None


def _check_values(
        state_dict: Mapping[str, Any],
        expected: Mapping[str, torch.Tensor],
        any_shape: Container[str],
) -> None:
    """Refuse what PyTorch would cast or cannot copy, weights of other shapes, and points that are not finite."""
    wrong = []
    for key, like in expected.items():
        value = state_dict.get(key, like)
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f'{key} must be a tensor, got {type(value).__name__}')
        if value.layout != torch.strided:
            raise CheckpointError(f'{key} must be a dense tensor, got {value.layout}')
        if like.is_floating_point() and not value.is_floating_point():
            raise CheckpointError(f'{key} must have a floating point dtype, got {value.dtype}')
        if value.shape != like.shape and key not in any_shape:
            wrong.append(f'{key} {tuple(value.shape)} instead of {tuple(like.shape)}')
        elif key.endswith(('.kernel.coords', '.kernel.radius')) and not value.is_meta:
            value = value.to(like.dtype)
            if not value.isfinite().all():
                raise CheckpointError(f'{key} must be finite everywhere, got {value[~value.isfinite()][0].item()}')
    if wrong:
        raise CheckpointError(f'state_dict must have the shapes of the model, got {_some(wrong)}')


def _check_length(key: str, value: Any, model: nn.Module) -> None:
    """Compare the length of the kernels that a checkpoint has (the authors' has 0 before it is known) with the model's.

    The shapes of points do not tell the length.
    """
    expected = getattr(model, 'kernel_length', None)
    tells = key.endswith('.train_length') or key == 'stem.kernel_length'
    if expected and tells and isinstance(value, torch.Tensor) and not value.is_meta:
        found = value.flatten().tolist()
        if found not in ([0], [expected]):
            raise CheckpointError(f'{key} must be {expected}, the length of the kernels of the model, got {found}')


def _adapt_input(key: str, weight: torch.Tensor, like: Sequence[int]) -> torch.Tensor:
    """A weight for images of three channels, (O, 3, *), for other channels by timm's rule, which takes (O, 3, K, K)."""
    if len(weight.shape) == len(like) and weight.shape[0] == like[0] and weight.shape[1] == 3 != like[1]:
        flat = weight.reshape(*weight.shape[:2], -1, 1)
        weight = adapt_input_conv(like[1], flat).reshape(len(weight), like[1], *weight.shape[2:])
    if weight.shape != torch.Size(like):
        raise CheckpointError(
            f'state_dict must have the shapes of the model, got {key} {tuple(weight.shape)} instead of {tuple(like)}')
    return weight


def is_authors_layout(keys: Iterable[str]) -> bool:
    """Whether names of weights are those of the authors' code.

    Example:
        >>> is_authors_layout(['head.weight']), is_authors_layout(['head.fc.weight'])
        (True, False)
    """
    return any(_rename(key) != key for key in keys)


def count_classes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Classes of a checkpoint in either layout, from the shapes of its weights; 0 without a classifier.

    Example:
        >>> count_classes({'head.weight': (10, 768), 'head.bias': (10,)})
        10
    """
    return next((shape[0] for key, shape in shapes.items() if _rename(key) == 'head.fc.weight' and shape), 0)


def count_inputs(shapes: Mapping[str, Sequence[int]], names: Container[str]) -> int:
    """Input channels of a checkpoint in either layout, from the shapes of its weights; 0 if none of `names` is there.

    Args:
        shapes: Names of weights → their shapes.
        names: The model's `input_weights`.

    Example:
        >>> count_inputs({'backbone.0.cconv1s.weight': (30, 3, 5)}, ['blocks.0.conv1.small.conv.weight'])
        3
    """
    return next((shape[1] for key, shape in shapes.items() if _rename(key) in names and len(shape) > 1), 0)


def _unreadable(path: Union[str, Path], error: Exception) -> CheckpointError:
    # torch.load puts its reason among advice of many lines, to run the code in the file for one.
    reason = ' '.join(str(error).split())
    reason = reason.partition('WeightsUnpickler error: ')[2].partition(' Check the documentation')[0] or reason
    return CheckpointError(
        f'file must be an undamaged weights-only checkpoint (.pth, .pt, .pth.tar or .safetensors), got {str(path)!r}, '
        f'which could not be read as one; no code in it was run. {type(error).__name__}: {reason}')


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a dict with tensors in it, at any depth."""
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) or _holds_tensors(v) for v in value.values())


def _clean(state_dict: Mapping[Any, Any]) -> Dict[str, Any]:
    """The state dict without `_PREFIXES`."""
    cleaned: Dict[str, Any] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f'state_dict must have names as keys, got {key!r}')
        name = _PREFIXES.sub('', key)
        if name in cleaned:
            raise CheckpointError(f'state_dict must hold every weight once, got {name} with and without a prefix')
        cleaned[name] = value
    return cleaned


def _rename(key: str) -> Optional[str]:
    for pattern, replacement in _RENAMES:
        if replacement is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, replacement, key)
    return key


def _some(items: List[str], limit: int = 3) -> str:
    return ', '.join(items[:limit]) + (', …' if len(items) > limit else '')
