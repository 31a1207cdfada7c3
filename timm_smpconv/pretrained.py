"""Published weights: where they are on the Hugging Face Hub, and downloading them checked."""
from pathlib import Path
from typing import Any, Dict, Optional, Union

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from .checkpoint import CheckpointError, read_checkpoint, select_weights
from .compat import file_sha256

__all__ = ['BUILT_IN', 'hub_id', 'prepare_pretrained']

NAMESPACE = 'timm-smpconv'  # of the built-in weights, as timm-smpconv/smpconv_tiny.in1k
FILE = 'model.safetensors'
# model.tag of the weights that have a source (weights/sources.yaml) → sha256 of the published file, None before it is:
# with `pretrained=True` no other file is taken.
BUILT_IN: Dict[str, Optional[str]] = {'smpconv_tiny.in1k': None, 'smpconv_base.in1k': None}
# The client's own, its HTTP library's, which depends on its version, and those of hf_xet.
_CLIENT_ERRORS = (OSError, RuntimeError, *HfHubHTTPError.__bases__)


def hub_id(name: str) -> Optional[str]:
    """Where the built-in weights model.tag are, or will be, if they have a source."""
    return f'{NAMESPACE}/{name}' if name in BUILT_IN else None


def prepare_pretrained(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """See to it that timm finds the weights of a model to be created, and that they are what was published.

    A file of the overlay is read here, for errors that say what is wrong with it. A file of the Hub is brought into the
    client's cache, from which timm reads it afterwards.

    Args:
        variant: The model's name.
        kwargs: Of its entry point.

    Returns:
        The kwargs to go on with.

    Raises:
        CheckpointError: No weights are known, they cannot be had, or they are not the published ones.
    """
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if cfg.source == 'local-dir' or cfg.state_dict:
        return kwargs
    if cfg.source != 'hf-hub' and cfg.file:
        state_dict, _ = select_weights(read_checkpoint(cfg.file))
        return dict(kwargs, pretrained_cfg_overlay=dict(overlay, state_dict=state_dict))
    if cfg.hf_hub_id:
        _fetch(variant, cfg, kwargs.get('cache_dir'))
    elif not cfg.url and f'{variant}.in1k' in BUILT_IN:
        raise CheckpointError('the pretrained_cfg must name weights by file, url or hf_hub_id, got none of them')
    elif not cfg.url:
        raise CheckpointError(
            f'there are no weights of {variant}: the authors published none. Train it with timm\'s train.py and the '
            f'recipe that `timm-smpconv recipe {variant}` names, and load what you get with '
            'pretrained_cfg_overlay=dict(file="model_best.pth.tar"); or use pretrained=False')
    return kwargs


def _fetch(variant: str, cfg: PretrainedCfg, cache_dir: Union[str, Path, None]) -> None:
    repo, _, revision = cfg.hf_hub_id.partition('@')
    named = cfg.hf_hub_filename or ''
    name = named if named.endswith('.safetensors') else FILE  # timm prefers it to the others
    try:
        path = Path(hf_hub_download(repo, name, revision=revision or None, cache_dir=cache_dir))
    except (*_CLIENT_ERRORS, EntryNotFoundError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if absent and cfg.source == 'hf-hub':
            return  # somebody's weights by another name: timm knows which to try
        raise CheckpointError(
            f'the weights of {variant} could not be had: tried {name} of {cfg.hf_hub_id} at {constants.ENDPOINT} and '
            f'in the cache {cache_dir or constants.HF_HUB_CACHE}. If they are not published yet: publish them '
            '(weights/publish.py); or load a folder that weights/convert.py wrote, by '
            'timm.create_model("local-dir:DIR", pretrained=True); or the authors\' file, by '
            f'timm.create_model("{variant}", pretrained=True, '
            f'pretrained_cfg_overlay=dict(file="FILE.pth")). The client said: {_first_line(error)}') from error
    _check(path, cfg, revision)


def _check(path: Path, cfg: PretrainedCfg, revision: str) -> None:
    """Compare a file of the cache with what was announced: the client compares sizes only."""
    blob = path.resolve()
    announced = blob.name if len(blob.name) == 64 else None  # known of large files, where the cache has links
    found = file_sha256(blob)
    if announced and found != announced:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f'the file of {cfg.hf_hub_id} has sha256 {found}, and {announced} was announced. It was removed from the '
            'cache: try again, and tell the people who host it if that does not help')
    name = f'{cfg.architecture}.{cfg.tag}'
    recorded = BUILT_IN.get(name)
    if recorded and found != recorded and cfg.hf_hub_id == hub_id(name) and cfg.source != 'hf-hub' and not revision:
        raise CheckpointError(
            f'{cfg.hf_hub_id} has a file of sha256 {found}, and this version of timm-smpconv knows {recorded}: it was '
            'changed after the release. Update timm-smpconv, or name the weights yourself: '
            f'timm.create_model("hf-hub:{cfg.hf_hub_id}", pretrained=True)')


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
