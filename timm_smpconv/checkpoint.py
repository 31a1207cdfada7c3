"""Checkpoints: reading a file, the authors' layout turned into ours, and plain words when one does not fit a model."""
import pickle
import re
from typing import Any, Dict, Iterable, List, Mapping

import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import clean_state_dict, load_state_dict

__all__ = ['CheckpointError', 'check_fit', 'checkpoint_filter_fn', 'read_checkpoint']

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


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


def read_checkpoint(path: str) -> Dict[str, torch.Tensor]:
    """Read the weights of a .pth, .pt, .pth.tar or .safetensors file without running code from it; EMA weights first.

    Raises:
        CheckpointError: There is no such file, or it is damaged, no checkpoint, or a pickle that holds code.
    """
    try:
        return load_state_dict(path, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f'file must be an existing checkpoint, got {path!r}, where no file is') from error
    except (AttributeError, EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(
            f'file must hold weights alone (.pth, .pt, .pth.tar or .safetensors, whole, without pickled code), got '
            f'{path!r}, which cannot be read as such; nothing in it was run: {type(error).__name__}: {error}') from error


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Turn a checkpoint of the authors or of this package into a state dict for `model`.

    Takes the state dict itself or the dict that a training script wraps around it (EMA weights are preferred), with or
    without a leading `module.`. The classifier may be missing, extra or of another size: timm adapts it.

    Raises:
        CheckpointError: Keys are missing or too many, a radius is not positive, or one of checkpoint and model is merged.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
    out = {}
    for key, value in clean_state_dict(state_dict).items():
        key = _rename(key)
        if key is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f'state_dict must hold tensors alone, got {key!r}: {type(value).__name__}')
        if key.endswith('.kernel.radius'):
            value = value.flatten(1)  # (1, P, 1, 1) → (1, P)
            if value.device.type != 'meta' and not bool((value > 0).all()):
                raise CheckpointError(f'{key} must be positive everywhere, got a minimum of {value.min().item()}')
        out[key] = value
    _check_keys(out, model.state_dict(), ignore=_CLASSIFIER)
    return out


def check_fit(state_dict: Mapping[str, Any], expected: Mapping[str, torch.Tensor], strict: bool = True) -> None:
    """Raise `CheckpointError` if `state_dict` cannot be loaded over `expected`, before anything is loaded."""
    if strict:
        _check_keys(state_dict, expected)
    else:
        _check_merged(state_dict, expected)
    wrong = [
        f'{k} {tuple(v.shape)} instead of {tuple(expected[k].shape)}'
        for k, v in state_dict.items() if k in expected and v.shape != expected[k].shape]
    if wrong:
        raise CheckpointError(f'state_dict must have the shapes of the model, got {_some(wrong)}')


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMES:
        if replacement is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, replacement, key)
    return key


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
    merged, model_merged = _is_merged(keys), _is_merged(expected)
    if merged and model_merged is False:
        raise CheckpointError(
            'state_dict is of a merged model and this model is not merged: create the model with inference_mode=True')
    if merged is False and model_merged:
        raise CheckpointError(
            'state_dict is of an unmerged model and this model is merged: load it into a model created without '
            'inference_mode, then merge that with timm.utils.reparameterize_model(model.eval())')


def _is_merged(keys: Iterable[str]) -> bool:
    """Whether the keys are of a merged model; None if they tell neither."""
    if any(k.endswith('.dwconv.weight') for k in keys):
        return True
    return False if any('.dwconv.large.' in k for k in keys) else None


def _some(items: List[str], limit: int = 3) -> str:
    return ', '.join(items[:limit]) + (', …' if len(items) > limit else '')
