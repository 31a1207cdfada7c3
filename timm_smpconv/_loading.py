"""What a state dict must be to be loaded: checks that layers, networks and checkpoints share.

It stands below all rooms, and imports none.
"""
import re
from typing import Any, Callable, Container, Iterable, List, Mapping, Optional

import torch
import torch.nn as nn

from ._errors import DataError

__all__ = [
    'CheckedLoading', 'CheckpointError', 'check_before_loading', 'check_keys', 'check_merged', 'check_values', 'some']


class CheckpointError(DataError):
    """A checkpoint cannot be read, or does not fit the model."""


class CheckedLoading(nn.Module):
    """Base class of models and layers that `load_state_dict` leaves unchanged when it raises.

    Inside a larger module each is checked before any of its own weights are loaded; modules in front of it are
    loaded by then. PyTorch reports missing and unexpected keys only after it has loaded the others: they are found in
    time only if `load_state_dict` is called on the model itself.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(check_before_loading)

    def hint_at_layout(self, extra: List[str]) -> str:
        """What an error about superfluous keys adds."""
        return ''

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as `nn.Module.load_state_dict` does, but change nothing if `state_dict` does not fit.

        Raises:
            CheckpointError: Keys (if `strict`), shapes, dtypes or values do not fit this model.
        """
        if strict:
            check_keys(state_dict, self.state_dict(), hint=self.hint_at_layout)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def check_before_loading(
        module: nn.Module,
        state_dict: Mapping[str, Any],
        prefix: str,
        *args: Any,
) -> None:
    """Raise before any weight of a module is loaded if they do not fit: a `load_state_dict` pre-hook.

    Missing and unexpected keys pass, as the hook cannot tell whether loading is strict.

    Raises:
        CheckpointError: A shape, a dtype, a layout or a value does not fit, or only one of both is merged.
    """
    check_merged([key for key in state_dict if key.startswith(prefix)], module.state_dict())
    check_values(state_dict, module, prefix)


def check_values(
        state_dict: Mapping[str, Any],
        module: nn.Module,
        prefix: str = '',
        any_shape: Container[str] = (),
) -> None:
    """Check what `module` would load. Modules with a method `check_entry(name, key, value)` check their own entries."""
    wrong = []
    for key, like in module.state_dict(prefix=prefix).items():
        if key in state_dict:
            value = state_dict[key]
            _check_tensor(key, value, like)
            if value.shape != like.shape and key not in any_shape:
                wrong.append(f'{key} {tuple(value.shape)} instead of {tuple(like.shape)}')
    if wrong:
        raise CheckpointError(f'state_dict must have the shapes of the model, got {some(wrong)}')
    for path, part in module.named_modules():
        for name, like in {**part._parameters, **part._buffers}.items() if hasattr(part, 'check_entry') else ():
            key = f'{prefix}{path}.{name}' if path else f'{prefix}{name}'
            if key in state_dict and like is not None:
                try:
                    part.check_entry(name, key, state_dict[key].to(like.dtype))
                except ValueError as error:
                    raise CheckpointError(str(error)) from error


def _check_tensor(key: str, value: Any, like: torch.Tensor) -> None:
    """Refuse what PyTorch cannot copy over `like`, or would only cast to it."""
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f'{key} must be a tensor, got {type(value).__name__}')
    if value.layout != torch.strided or value.is_nested:
        raise CheckpointError(f'{key} must be a dense tensor, got {"nested" if value.is_nested else value.layout}')
    if value.is_meta and not like.is_meta:
        raise CheckpointError(f'{key} must hold values, got a tensor on the meta device')
    if like.is_floating_point() and not value.is_floating_point():
        raise CheckpointError(f'{key} must have a floating point dtype, got {value.dtype}')
    # A counter of batches may be a float: timm's avg_checkpoints.py averages it with the weights.
    if value.is_complex() or value.is_quantized or value.dtype == torch.bool:
        raise CheckpointError(f'{key} must have an integer or floating point dtype, got {value.dtype}')


def check_keys(
        keys: Iterable[str],
        expected: Iterable[str],
        ignore: Container[str] = (),
        hint: Callable[[List[str]], str] = lambda extra: '',
) -> None:
    check_merged(keys, expected)
    missing = [k for k in expected if k not in keys and k not in ignore]
    extra = [k for k in keys if k not in expected and k not in ignore]
    if missing or extra:
        found = [f'{len(ks)} {word} ({some(ks)})' for word, ks in (('missing', missing), ('extra', extra)) if ks]
        raise CheckpointError(
            f'state_dict must have exactly the keys of the model, got {" and ".join(found)}{hint(extra)}')


def check_merged(keys: Iterable[str], expected: Iterable[str]) -> None:
    merged, model_merged = _is_merged(keys), _is_merged(expected)
    if merged and model_merged is False:
        raise CheckpointError('state_dict is merged but the model is not: create the model with inference_mode=True')
    if merged is False and model_merged:
        raise CheckpointError(
            'state_dict is not merged but the model is: load it into a model created without inference_mode, then '
            'merge that with timm.utils.reparameterize_model(model.eval())')


def _is_merged(keys: Iterable[str]) -> Optional[bool]:
    """Whether the keys are those of a merged model; None if there is no large kernel among them."""
    if any(re.search(r'(^|\.)(dwconv|conv[12])\.weight$', k) for k in keys):
        return True
    return False if any(re.search(r'(^|\.)(dwconv|conv[12])\.large\.', k) for k in keys) else None


def some(items: List[str], limit: int = 3) -> str:
    return ', '.join(items[:limit]) + (', …' if len(items) > limit else '')
