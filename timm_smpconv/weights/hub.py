"""Pretrained weights: where they are, and downloads and files that are verified before timm loads them.

`sources.yaml` lists them. While the Hub has none, converted weights are kept for `pretrained=True` in a folder CACHE:

- smpconv_tiny.in1k/: README.md, config.json and model.safetensors, put in place as a whole
- smpconv_tiny.in1k.download/: the authors' file, or what has arrived of it; deleted once it is converted
- smpconv_tiny.in1k.lock: held by the process that downloads, converts or removes
"""
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Type, Union

import yaml
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from .checkpoint import CheckpointError, count_classes, read_checkpoint, select_weights

__all__ = [
    'BUILT_IN', 'FILES', 'SOURCES', 'SourcesError', 'cache_folder', 'check_cached', 'file_sha256', 'find_cached',
    'hub_id', 'load_sources', 'origin_of', 'prepare_pretrained']

_logger = logging.getLogger(__name__)

NAMESPACE = 'timm-smpconv'  # of the built-in weights, as timm-smpconv/smpconv_tiny.in1k
FILE = 'model.safetensors'
# model.tag of the weights that have a source (sources.yaml) → sha256 of the file on the Hub, None before it is
# published. `pretrained=True` accepts no other file; before, it takes converted weights from the cache.
BUILT_IN: Dict[str, Optional[str]] = {
    'smpconv_tiny.in1k': None,
    'smpconv_base.in1k': None,
    'smpconv_resnet_cifar10.cifar10': None,
    'smpconv_tcn_smnist.mnist': None,
    'smpconv_tcn_pmnist.mnist': None,
    'smpconv_tcn_scifar10.cifar10': None,
    'smpconv_tcn_ct.character_trajectories': None,
    'smpconv_tcn_sc.speech_commands': None,
    'smpconv_tcn_scraw.speech_commands': None,
}
FILES = ('README.md', 'config.json', 'model.safetensors')  # of a folder that is converted and published
SOURCES = Path(__file__).parent / 'sources.yaml'
KEYS = (
    'model', 'tag', 'origin', 'license', 'parameters', 'gmacs', 'top1', 'top1_source', 'dataset', 'hub_id', 'sha256',
    'commit')
PARTS = {'origin': ('page', 'file', 'weights', 'bytes', 'sha256'), 'dataset': ('name', 'id', 'pipeline')}
_LOCATIONS = ('state_dict', 'file', 'hf_hub_id', 'url')  # in timm's order of preference
# The client's own errors, those of its HTTP library, which depends on its version, and those of hf_xet.
_CLIENT_ERRORS: Tuple[Type[Exception], ...] = (
    OSError, RuntimeError, EntryNotFoundError,
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


class SourcesError(Exception):
    """`sources` is not such a file."""


def hub_id(name: str) -> Optional[str]:
    """Hub id of the weights model.tag if `pretrained=True` finds them now: published, or converted in the cache.

    timm lists a model as pretrained if its cfg has one.

    Example:
        >>> hub_id('smpconv_mobile31.in1k') is None  # the authors published none
        True
    """
    return _repository(name) if name in BUILT_IN and (BUILT_IN[name] or find_cached(name)) else None


def _repository(name: str) -> str:
    return f'{NAMESPACE}/{name}'


def prepare_pretrained(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Verify the weights of a model before timm builds it, so that an error says what is wrong with them.

    A file is read here and handed over to timm. A file of the Hub is downloaded into the client's cache, where timm
    finds it. Built-in weights that are not published yet are taken from the cache that `timm-smpconv weights` fills, if
    they are there. Weights that `pretrained_cfg_overlay` names replace those that the model's cfg names, wherever both
    are, and their classifier is loaded if the model has as many classes; otherwise a warning is logged.

    Args:
        variant: Name of the model.
        kwargs: Arguments of its entry point.

    Returns:
        The arguments to continue with.

    Raises:
        CheckpointError: No weights are known, they cannot be read or downloaded, or they are not the published ones.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    named = any(overlay.get(key) for key in _LOCATIONS)
    if named:
        overlay = {**dict.fromkeys(('source', *_LOCATIONS)), **overlay}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    name = f'{cfg.architecture}.{cfg.tag}'
    if not named and _is_built_in(name, cfg):
        converted = None if BUILT_IN[name] else find_cached(name, kwargs.get('cache_dir'))
        if converted:
            origin = load_sources()[name]['origin']
            check_cached(converted, origin and origin['sha256'])
            overlay['state_dict'] = read_checkpoint(converted / FILE)
            return dict(kwargs, pretrained_cfg_overlay=overlay)
        overlay['hf_hub_id'] = _repository(name)
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if cfg.source == 'local-dir':
        return dict(kwargs, pretrained_cfg_overlay=overlay)  # timm reads the folder
    if cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file):
        content = cfg.state_dict or read_checkpoint(str(cfg.file))
        state_dict = overlay['state_dict'] = select_weights(content)[0]
        shapes = {key: getattr(value, 'shape', ()) for key, value in state_dict.items()}
        _declare_classes(overlay, kwargs, cfg, cfg.file or 'the state_dict', count_classes(shapes))
    elif cfg.hf_hub_id:
        path = _fetch(variant, cfg.hf_hub_id, cfg, kwargs.get('cache_dir'))
        if named and path:
            _declare_classes(overlay, kwargs, cfg, cfg.hf_hub_id, count_classes(_read_shapes(path)))
    elif cfg.url:
        _declare_classes(overlay, kwargs, cfg, str(cfg.url))
    elif any(built_in.startswith(f'{variant}.') for built_in in BUILT_IN):
        raise CheckpointError('pretrained_cfg must name weights by file, url or hf_hub_id, got none of them')
    else:
        raise CheckpointError(
            f'there are no weights of {variant}: the authors published none. Train it with timm\'s train.py and the '
            f'recipe that `timm-smpconv recipe {variant}` names, and load the result with '
            'pretrained_cfg_overlay=dict(file="model_best.pth.tar"); or use pretrained=False')
    return dict(kwargs, pretrained_cfg_overlay=overlay)


def _is_built_in(name: str, cfg: PretrainedCfg) -> bool:
    """Whether a cfg means the built-in weights of that name, and not others that it gives a place of their own."""
    elsewhere = cfg.source in ('hf-hub', 'local-dir') or cfg.state_dict or cfg.file or cfg.url
    return name in BUILT_IN and not elsewhere and cfg.hf_hub_id in (None, _repository(name))


def _read_shapes(path: Path) -> Dict[str, Tuple[int, ...]]:
    with safe_open(path, framework='pt') as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _declare_classes(
        overlay: Dict[str, Any],
        kwargs: Dict[str, Any],
        cfg: PretrainedCfg,
        where: str,
        classes: Optional[int] = None,
) -> None:
    """Put the classes of a checkpoint into the overlay: timm loads a classifier only if cfg and model have as many."""
    if classes:
        overlay.setdefault('num_classes', classes)
    declared = overlay.get('num_classes', cfg.num_classes)
    asked = 0 if kwargs.get('features_only') else kwargs.get('num_classes', declared)
    if asked and (asked != declared or declared < 0):
        _logger.warning(
            "The model's classifier (num_classes=%s) is not loaded and keeps its initial weights: %s has %s classes, "
            'and pretrained_cfg has num_classes=%d',
            kwargs.get('num_classes', 'default'), where, 'unknown' if classes is None else classes, declared)


def _fetch(variant: str, hub_id: str, cfg: PretrainedCfg, cache_dir: Union[str, Path, None]) -> Optional[Path]:
    """Path of a verified file in the cache; None if a repository has its weights under another name."""
    repo, _, revision = hub_id.partition('@')
    named = cfg.hf_hub_filename or ''
    name = named if named.endswith('.safetensors') else FILE  # timm prefers it to the others
    try:
        path = Path(hf_hub_download(repo, name, revision=revision or None, cache_dir=cache_dir))
    except _CLIENT_ERRORS as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if absent and cfg.source == 'hf-hub':
            return None  # timm knows which other names to try
        raise CheckpointError(
            f'could not download the weights of {variant}: tried {name} of {hub_id} at {constants.ENDPOINT} and '
            f'in the cache {cache_dir or constants.HF_HUB_CACHE}{_way_round(variant, hub_id, cache_dir)}. The client '
            f'reported: {_first_line(error)}') from error
    _verify_download(path, cfg, revision)
    return path


def _way_round(variant: str, hub_id: str, cache_dir: Union[str, Path, None]) -> str:
    name = hub_id.partition('/')[2]
    if hub_id != _repository(name) or name not in BUILT_IN or BUILT_IN[name]:
        return ''
    option = f' --cache-dir {cache_dir}' if cache_dir else ''
    return (
        f', and converted ones in {cache_folder(cache_dir)}. They are not published yet: run `timm-smpconv weights '
        f'{variant}{option}`, which puts the authors\' there; or load a file of theirs with '
        f'timm.create_model("{variant}", pretrained=True, pretrained_cfg_overlay=dict(file="FILE.pth")), or a folder '
        'that weights/convert.py wrote with timm.create_model("local-dir:DIR", pretrained=True)')


def _verify_download(path: Path, cfg: PretrainedCfg, revision: str) -> None:
    """Compare the hash of a cached file with what was announced (the client compares sizes only); remove a bad file."""
    blob = path.resolve()
    announced = blob.name if len(blob.name) == 64 else None  # the name of a large file, where the cache has links
    found = file_sha256(blob)
    if announced and found != announced:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f'the file of {cfg.hf_hub_id} must have the announced sha256 {announced}, got {found}. It was removed from '
            'the cache: try again, and if the error persists report it to those who host the file')
    name = f'{cfg.architecture}.{cfg.tag}'
    recorded = BUILT_IN.get(name)
    ours = cfg.hf_hub_id == _repository(name) and cfg.source != 'hf-hub' and not revision
    if ours and recorded and found != recorded:
        raise CheckpointError(
            f'the file of {cfg.hf_hub_id} must have the sha256 {recorded} that this version of timm-smpconv knows, got '
            f'{found}: it was changed after the release. Update timm-smpconv, or name the weights yourself with '
            f'timm.create_model("hf-hub:{cfg.hf_hub_id}", pretrained=True)')


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def cache_folder(cache_dir: Union[str, Path, None] = None) -> Path:
    """The cache: `cache_dir`, or the place that huggingface_hub gives to libraries, `HF_ASSETS_CACHE` or in `HF_HOME`.

    Example:
        >>> cache_folder('weights').name, cache_folder().parts[-2:]
        ('weights', ('timm-smpconv', 'weights'))
    """
    return Path(cache_dir) if cache_dir else Path(constants.HF_ASSETS_CACHE, 'timm-smpconv', 'weights')


def find_cached(name: str, cache_dir: Union[str, Path, None] = None) -> Optional[Path]:
    """The folder of the weights model.tag in the cache, None if they are not there.

    Example:
        >>> find_cached('smpconv_tiny.in1k', 'an empty folder') is None
        True
    """
    folder = cache_folder(cache_dir) / name
    try:
        return folder if all((folder / file).is_file() for file in FILES) else None
    except PermissionError:  # the cache of another user; importing this package looks here
        return None


def origin_of(folder: Path) -> Dict[str, Any]:
    """What a converted folder says of itself: 'sha256' of the checkpoint, 'weights', 'file_sha256' of its own file.

    Raises:
        CheckpointError: It does not say it.
    """
    try:
        origin = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['origin']
        return {key: origin[key] for key in ('sha256', 'weights', 'file_sha256')}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'config.json must be that of converted weights, got another one in {folder} ({type(error).__name__} '
            f'{error}): run `timm-smpconv weights {folder.name} --remove`') from error


def check_cached(folder: Path, recorded: Optional[str]) -> None:
    """Refuse a folder whose file was damaged, or made of another checkpoint than the recorded one.

    Args:
        folder: As `find_cached` gives it.
        recorded: sha256 of the authors' file, None where nobody has recorded it.

    Raises:
        CheckpointError: It is refused.
    """
    origin = origin_of(folder)
    found = file_sha256(folder / 'model.safetensors')
    again = f'run `timm-smpconv weights {folder.name}` again'
    if found != origin['file_sha256']:
        raise CheckpointError(
            f'model.safetensors must have the sha256 {origin["file_sha256"]} with which it was written, got {found} in '
            f'{folder}: it was damaged; {again}')
    if recorded and origin['sha256'] != recorded:
        raise CheckpointError(
            f'the weights in {folder} must be made of the authors\' file of sha256 {recorded}, got one of '
            f'{origin["sha256"]}; {again}')


def load_sources(path: Path = SOURCES) -> Dict[str, Dict[str, Any]]:
    """model.tag → its entry.

    Raises:
        SourcesError: The file cannot be read, or an entry lacks one of KEYS or has a wrong one.
    """
    rule = f'sources must be a YAML file that gives {", ".join(KEYS)} for each MODEL.TAG, got {path}'
    try:
        entries = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SourcesError(f'{rule}, which could not be read: {" ".join(str(error).split())}') from error
    if not isinstance(entries, dict):
        raise SourcesError(f'{rule} with {"nothing" if entries is None else f"a {type(entries).__name__}"} in it')
    for name, entry in entries.items():
        missing = [key for key in KEYS if key not in entry] if isinstance(entry, dict) else KEYS
        if missing:
            raise SourcesError(f'{rule}, where {name} lacks {", ".join(missing)}')
        for part, keys in PARTS.items():
            given = entry[part]
            lacking = [key for key in keys if not (isinstance(given, dict) and key in given)]
            if lacking and (given or part == 'dataset'):
                raise SourcesError(f'{rule}, where the {part} of {name} lacks {", ".join(lacking)}')
        if not isinstance(entry['hub_id'], str):
            raise SourcesError(f'{rule}, where the hub_id of {name} is {entry["hub_id"]!r}')
    return entries


def file_sha256(path: Union[str, Path]) -> str:
    """The SHA-256 of a file in hexadecimal (`hashlib.file_digest` needs Python 3.11).

    Example:
        >>> import os
        >>> from timm_smpconv.weights.hub import file_sha256
        >>> file_sha256(os.devnull)[:16]
        'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()
