"""Checkpoints: reading a file, the authors' layout turned into ours, and plain words when one does not fit a model."""
import argparse
import re
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import clean_state_dict

__all__ = [
    'CheckpointError', 'check_fit', 'checkpoint_filter_fn', 'read_checkpoint', 'say_merge_mismatch', 'select_weights']

# Where training scripts keep the two kinds of weights, timm's among them.
_WRAPPERS = {'ema': ('state_dict_ema', 'model_ema'), 'model': ('state_dict', 'model')}

# Keys of the authors' ImageNet code (smp_imagenet/models/SMPConv.py), applied in order; `None` drops the entry.
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
)
_CLASSIFIER = ('head.fc.weight', 'head.fc.bias')
_ADAPTED = ('stem.0.conv.weight', *_CLASSIFIER)  # timm fits these to other in_chans and num_classes after the filter


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


def read_checkpoint(path: str) -> Mapping[str, Any]:
    """Read a .pth, .pt, .pth.tar or .safetensors file without running code from it.

    Returns:
        What is in it: a state dict, or what a training script wrapped around one (see `select_weights`).

    Raises:
        CheckpointError: There is no such file, or it is damaged, no checkpoint, or a pickle that holds code.
    """
    try:
        if str(path).endswith('.safetensors'):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data that training scripts save
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(checkpoint, Mapping):
            raise TypeError(f'not a dict but {type(checkpoint).__name__}')
        return checkpoint
    except FileNotFoundError as error:
        raise CheckpointError(f'file must be an existing checkpoint, got {str(path)!r}, where no file is') from error
    except Exception as error:  # a damaged file breaks the readers in many ways: struct.error, IndexError, KeyError, …
        raise CheckpointError(
            f'file must hold weights alone (.pth, .pt, .pth.tar or .safetensors, whole, without pickled code), got '
            f'{str(path)!r}, which cannot be read so; nothing in it was run: '
            f'{type(error).__name__}: {error}') from error


def select_weights(checkpoint: Mapping[str, Any], weights: Optional[str] = None) -> Tuple[Mapping[str, Any], str]:
    """The state dict that a training script saved, without leading `module.`, and whether it is its 'ema' or 'model'.

    Args:
        checkpoint: What `read_checkpoint` returns; a bare state dict counts as 'model'.
        weights: Which to take; EMA weights first if not said.

    Raises:
        CheckpointError: There are no EMA weights, which were asked for.
    """
    for kind in [weights] if weights else _WRAPPERS:
        for wrapper in _WRAPPERS[kind]:
            if isinstance(checkpoint.get(wrapper), Mapping) and checkpoint[wrapper]:
                return clean_state_dict(checkpoint[wrapper]), kind
    if weights == 'ema':
        raise CheckpointError(
            f"weights must be 'model' for a checkpoint without {' or '.join(_WRAPPERS['ema'])}, got 'ema'")
    return clean_state_dict(checkpoint), 'model'


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Turn a checkpoint of the authors or of this package into a state dict for `model`.

    Takes the state dict itself or the dict that a training script wraps around it (EMA weights are preferred), with or
    without a leading `module.`. The classifier may be missing, extra or of another size: timm adapts it.

    Raises:
        CheckpointError: Keys are missing or too many, a shape is wrong, a value is no tensor, a radius is not positive
            and finite, or only one of checkpoint and model is merged.
    """
    out = {}
    for key, value in select_weights(state_dict)[0].items():
        key = _rename(key)
        if key is None:
            continue
        if key.endswith('.kernel.radius') and isinstance(value, torch.Tensor) and value.ndim == 4:
            value = value.flatten(1)  # (1, P, 1, 1) → (1, P)
        if key in out:
            raise CheckpointError(f'state_dict must hold every weight once, got {key} under two names')
        out[key] = value
    expected = model.state_dict()
    _check_keys(out, expected, ignore=_CLASSIFIER)
    _check_values(out, {k: v for k, v in expected.items() if k not in _ADAPTED})
    return out


def check_fit(state_dict: Mapping[str, Any], expected: Mapping[str, torch.Tensor], strict: bool = True) -> None:
    """Raise `CheckpointError` if `state_dict` cannot be loaded over `expected`, before anything is loaded."""
    if strict:
        _check_keys(state_dict, expected)
    else:
        _check_merged(state_dict, expected)
    _check_values(state_dict, expected)


def say_merge_mismatch(block: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """A `load_state_dict` pre-hook of blocks that adds to the errors if only one of state dict and block is merged.

    It says so within features_only and larger models too, and with strict=False, where only shapes are compared.
    """
    merged = prefix + 'dwconv.weight' in state_dict
    if merged or prefix + 'dwconv.large.bn.weight' in state_dict:
        error_msgs = args[-1]
        sentence = _merge_mismatch(merged, hasattr(block.dwconv, 'weight'))
        if sentence and sentence not in error_msgs:
            error_msgs.append(sentence)


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMES:
        if replacement is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, replacement, key)
    return key


def _check_values(state_dict: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f'state_dict must hold tensors alone, got {key!r}: {type(value).__name__}')
        if key.endswith('.kernel.radius') and not value.is_meta:
            wrong = value[~((value > 0) & value.isfinite())]
            if len(wrong):
                raise CheckpointError(f'{key} must be positive and finite everywhere, got {wrong[0].item()}')
    wrong = [
        f'{k} {tuple(v.shape)} instead of {tuple(expected[k].shape)}'
        for k, v in state_dict.items() if k in expected and v.shape != expected[k].shape]
    if wrong:
        raise CheckpointError(f'state_dict must have the shapes of the model, got {_some(wrong)}')


def _check_keys(keys: Iterable[str], expected: Iterable[str], ignore: Iterable[str] = ()) -> None:
    _check_merged(keys, expected)
    missing = [k for k in expected if k not in keys and k not in ignore]
    extra = [k for k in keys if k not in expected and k not in ignore]
    if missing or extra:
        found = [f'{len(ks)} {word} ({_some(ks)})' for word, ks in (('missing', missing), ('extra', extra)) if ks]
        hint = ''
        if any('.large_kernel.' in k for k in extra):
            hint = '; this is the layout of the authors: load it through checkpoint_filter_fn'
        raise CheckpointError(f'state_dict must have exactly the keys of the model, got {" and ".join(found)}{hint}')


def _check_merged(keys: Iterable[str], expected: Iterable[str]) -> None:
    sentence = _merge_mismatch(_is_merged(keys), _is_merged(expected))
    if sentence:
        raise CheckpointError(sentence)


def _merge_mismatch(merged: Optional[bool], model_merged: Optional[bool]) -> Optional[str]:
    """What to do where one of checkpoint and model is merged and the other is not; None where that is not so."""
    if merged and model_merged is False:
        return 'state_dict is of a merged model and this model is not merged: create the model with inference_mode=True'
    if merged is False and model_merged:
        return (
            'state_dict is of an unmerged model and this model is merged: load it into a model created without '
            'inference_mode, then merge that with timm.utils.reparameterize_model(model.eval())')
    return None


def _is_merged(keys: Iterable[str]) -> Optional[bool]:
    """Whether the keys are of a merged model; None if they tell neither."""
    if any(k.endswith('.dwconv.weight') for k in keys):
        return True
    return False if any('.dwconv.large.' in k for k in keys) else None


def _some(items: List[str], limit: int = 3) -> str:
    return ', '.join(items[:limit]) + (', …' if len(items) > limit else '')
