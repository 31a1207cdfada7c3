"""Pretrained weights: those on the Hub once they are published, else the authors', downloaded and converted once.

`sources.yaml` lists both. Of the authors' a folder, the cache, keeps

- smpconv_tiny.in1k.safetensors: the weights in this package's names; EMA weights where there are any
- smpconv_tiny.in1k.pth, or smpconv_tiny.in1k.pth*.part while it arrives: the authors' file until it is converted
- smpconv_tiny.in1k.lock: held by the process that downloads, converts or removes
"""
import hashlib
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Generator, List, Optional, Tuple, Type, Union

import safetensors.torch
import timm
import yaml
from filelock import FileLock
from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from tqdm import tqdm

from .._errors import DataError, one_line
from .._files import written_beside
from .checkpoint import CheckpointError, checkpoint_filter_fn, count_classes, read_checkpoint, select_weights
from .drive import download, parts, timeout

__all__ = [
    'AUTHORS', 'SOURCES', 'cache_folder', 'cached_file', 'download_authors', 'fetch', 'fetch_authors', 'file_sha256',
    'load_sources', 'prepare_pretrained', 'remove']

_logger = logging.getLogger(__name__)

AUTHORS = 'https://github.com/sangnekim/SMPConv'  # the url of cfgs whose weights `sources.yaml` lists
FILE = 'model.safetensors'
SOURCES = Path(__file__).parent / 'sources.yaml'
_LOCATIONS = ('state_dict', 'file', 'hf_hub_id', 'url')  # in timm's order of preference
# The client's own errors, those of its HTTP library, which depends on its version, and those of hf_xet.
_CLIENT_ERRORS: Tuple[Type[Exception], ...] = (
    OSError, RuntimeError, EntryNotFoundError,
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))
_Folder = Union[str, Path, None]


def prepare_pretrained(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Find the weights of a model before timm builds it, so that an error says what is wrong with them.

    By default these are the weights in sources.yaml; see `fetch`. If `pretrained_cfg_overlay` names others, they
    replace those of the model's cfg, and their classifier is loaded if the number of classes matches; otherwise a
    warning is logged. A file is read here and handed over to timm. A file on the Hub is downloaded into the client's
    cache, where timm finds it.

    Args:
        variant: Name of the model.
        kwargs: Arguments of its entry point.

    Returns:
        The arguments to continue with.

    Raises:
        CheckpointError: No weights are known, or they cannot be read or downloaded.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    named = any(overlay.get(key) for key in _LOCATIONS)
    if named:
        overlay = {**dict.fromkeys(('source', *_LOCATIONS)), **overlay}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    cache_dir = kwargs.get('cache_dir')
    if cfg.source == 'local-dir':
        pass  # timm reads the folder
    elif cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file):
        content = cfg.state_dict or read_checkpoint(str(cfg.file))
        state_dict = overlay['state_dict'] = select_weights(content)[0]
        shapes = {key: getattr(value, 'shape', ()) for key, value in state_dict.items()}
        _declare_classes(overlay, kwargs, cfg, cfg.file or 'the state_dict', count_classes(shapes))
    elif cfg.hf_hub_id:
        path = _from_hub(cfg.hf_hub_id, cfg, cache_dir)
        if named and path:
            _declare_classes(overlay, kwargs, cfg, cfg.hf_hub_id, count_classes(_read_shapes(path)))
    elif cfg.url not in (None, AUTHORS):
        _declare_classes(overlay, kwargs, cfg, str(cfg.url))
    elif f'{variant}.{cfg.tag}' in load_sources():
        overlay.update(fetch(f'{variant}.{cfg.tag}', cache_dir), url=None)
    else:
        raise CheckpointError('pretrained_cfg must name weights by file, url or hf_hub_id, got none of them')
    return dict(kwargs, pretrained_cfg_overlay=overlay)


def fetch(name: str, cache_dir: _Folder = None) -> Dict[str, str]:
    """Put listed weights in place: download them if they are not there, and convert the authors'.

    Args:
        name: model.tag.
        cache_dir: In place of the client's cache of the Hub and of `cache_folder`.

    Returns:
        Where they are, for the pretrained cfg: 'hf_hub_id' if they are published, else 'file'.

    Raises:
        CheckpointError: There are none, or they cannot be downloaded, converted or written.
    """
    entry = load_sources()[name]
    if entry['sha256']:
        hub_id = f'{entry["hub_id"]}@{entry["commit"]}'
        try:
            _from_hub(hub_id, PretrainedCfg(), cache_dir)
            return {'hf_hub_id': hub_id}
        except CheckpointError as error:
            if not entry['origin']:
                raise
            _logger.warning("%s; taking the authors' file", error)
    return {'file': str(fetch_authors(name, cache_dir=cache_dir))}


def fetch_authors(name: str, file: Optional[Path] = None, cache_dir: _Folder = None) -> Path:
    """Path of the authors' weights in the cache, downloaded and converted if they are not there.

    Several processes may do this at once: one downloads, the others wait.

    Args:
        name: model.tag.
        file: The authors' file, if it was downloaded already. It stays where it is, and replaces what is in the cache.
        cache_dir: The cache.

    Raises:
        CheckpointError: There are none, or they cannot be downloaded, converted or written.
    """
    model = name.partition('.')[0]
    target = cached_file(name, cache_dir)
    if target.is_file() and not file:  # without the lock, which a cache that is only read does not allow
        return target
    if not load_sources()[name]['origin']:
        raise CheckpointError(
            f'the authors published no weights of {model}: train it by `timm-smpconv run train.py -c $(timm-smpconv '
            f'recipe {model})` and load the result with pretrained_cfg_overlay=dict(file="model_best.pth.tar"), or use '
            'pretrained=False')
    try:
        with _locked(target):
            if file:
                _convert(file, name, target)
            elif not target.is_file():  # another process may have made it
                downloaded = target.with_suffix('.pth')
                download_authors(name, downloaded)
                try:
                    _convert(downloaded, name, target)
                except CheckpointError as error:
                    downloaded.unlink()
                    raise CheckpointError(f'{error}; the downloaded file was deleted') from error
                downloaded.unlink()
    except OSError as error:
        raise CheckpointError(
            f'the weights of {model} could not be written to the cache {target.parent}, which HF_HOME and cache_dir '
            f'change: {error}') from error
    return target


def download_authors(name: str, path: Path) -> None:
    """Download the authors' file, or the rest of it, and say once what it is. Nothing happens if it is there.

    Raises:
        CheckpointError: It cannot be downloaded, or there is no room for it.
    """
    url, cfg = load_sources()[name]['origin']['file'], resolve_pretrained_cfg(name)
    licence = f'licence {str(cfg.license).upper()}, {cfg.origin_url}'
    bar: Optional[tqdm] = None

    def progress(done: int, total: Optional[int]) -> None:
        nonlocal bar
        if bar is None:
            free = shutil.disk_usage(path.parent).free
            if total and total - done > free:
                raise DataError(f'{path.parent} must have room for {total - done:,} more bytes, got {free:,} free ones')
            size = f'{total / 1e6:.1f} MB' if total else 'of unknown size'
            _logger.warning(  # not info, which nobody sees who has not set up logging
                "Downloading %s, the authors' weights (%s, %s), from %s", name, size, licence, url)
            bar = tqdm(total=total, initial=done, desc=name, unit='B', unit_scale=True)
        bar.update(done - bar.n)

    try:
        if constants.HF_HUB_OFFLINE and not path.exists():
            raise DataError(f'HF_HUB_OFFLINE forbids to download {url}')
        download(url, path, progress)
    except DataError as error:
        raise CheckpointError(
            f'the weights {name} are not in {path.parent}, and {error}; `timm-smpconv weights {name} --file FILE` '
            'takes the file from elsewhere') from error
    finally:
        if bar:
            bar.close()


def remove(name: str, cache_dir: _Folder = None) -> List[Path]:
    """Delete the authors' weights from the cache, and what was downloaded of them; return what was deleted.

    Raises:
        OSError: Something could not be deleted.
    """
    target = cached_file(name, cache_dir)
    downloaded = target.with_suffix('.pth')
    if not target.parent.is_dir():
        return []
    with _locked(target):
        found = [path for path in (target, downloaded, *parts(downloaded)) if path.exists()]
        for path in found:
            path.unlink()
    return found


@contextmanager
def _locked(target: Path) -> Generator[None, None, None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix('.lock')):
        yield


def _convert(file: Path, name: str, target: Path) -> None:
    """Write the weights of a checkpoint in this package's names, if they are those of the whole model."""
    checkpoint = read_checkpoint(file)
    recorded = load_sources()[name]['origin']['sha256']
    if recorded and (found := file_sha256(file)) != recorded:
        raise CheckpointError(
            f"the authors' file must have the sha256 {recorded} that is recorded for it, got {found} of {file}: the "
            'download was damaged, or the authors replaced their file')
    model = timm.create_model(name, device='meta')
    weights = checkpoint_filter_fn(checkpoint, model)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f'{file} must hold the weights of {name}: {one_line(error)}') from error
    for key, value in weights.items():
        if not value.isfinite().all():
            raise CheckpointError(f'{key} must be finite everywhere, got others in {file}')
    with written_beside(target.parent) as folder:  # not save_file, which hides what is written from other users
        (folder / target.name).write_bytes(
            safetensors.torch.save({key: value.contiguous() for key, value in weights.items()}))


def _read_shapes(path: Path) -> Dict[str, Tuple[int, ...]]:
    try:
        with safe_open(path, framework='pt') as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f'{path} must be an undamaged .safetensors file: {one_line(error)}') from error


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


def _from_hub(hub_id: str, cfg: PretrainedCfg, cache_dir: _Folder) -> Optional[Path]:
    """Path of the file in the client's cache; None if a repository has its weights under another name."""
    repo, _, revision = hub_id.partition('@')
    named = cfg.hf_hub_filename or ''
    name = named if named.endswith('.safetensors') else FILE  # timm prefers it to the others
    try:
        if not try_to_load_from_cache(repo, name, cache_dir, revision or None):
            # Whatever it answers: without an answer hf_hub_download would try five times, half a minute in all.
            get_session().head(constants.ENDPOINT, timeout=timeout(10))  # type: ignore[arg-type]  # requests' and httpx's
        return Path(hf_hub_download(repo, name, revision=revision or None, cache_dir=cache_dir))
    except _CLIENT_ERRORS as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if absent and cfg.hf_hub_id:
            return None  # timm knows which other names to try
        raise CheckpointError(
            f'could not download the weights: tried {name} of {hub_id} at {constants.ENDPOINT} and in the cache '
            f'{cache_dir or constants.HF_HUB_CACHE}. The client reported: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def cache_folder(cache_dir: _Folder = None) -> Path:
    """The cache: `cache_dir`, or the place that huggingface_hub gives to libraries, `HF_ASSETS_CACHE` or in `HF_HOME`.

    Example:
        >>> cache_folder('weights').name, cache_folder().parts[-2:]
        ('weights', ('timm-smpconv', 'weights'))
    """
    return Path(cache_dir) if cache_dir else Path(constants.HF_ASSETS_CACHE, 'timm-smpconv', 'weights')


def cached_file(name: str, cache_dir: _Folder = None) -> Path:
    """Where the cache has, or would have, the authors' weights model.tag."""
    return cache_folder(cache_dir) / f'{name}.safetensors'


def load_sources(path: Optional[Path] = None) -> Dict[str, Dict[str, Any]]:
    """model.tag → its entry in sources.yaml, or in another file like it.

    Example:
        >>> load_sources()['smpconv_tiny.in1k']['top1']
        82.5
    """
    return yaml.safe_load((path or SOURCES).read_text(encoding='utf-8'))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
