"""Converts a checkpoint to a repository of the Hugging Face Hub.

    python weights/convert.py SMPConv_T.pth --model smpconv_tiny --out smpconv_tiny.in1k

Takes checkpoints of the authors, of timm's train.py and of `timm-smpconv sequence`. The folder holds model.safetensors,
config.json, the model card README.md, and modeling_smpconv.py, by which transformers loads the model. It is written
only if every key was used, and if the model read back from it gives the logits that the checkpoint gives in the plain
networks of authors_networks/.
"""
import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import save_for_hf
from timm.utils import reparameterize_model

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package of this checkout
from authors_networks import imagenet, smp
from card import model_card

from timm_smpconv._errors import DataError
from timm_smpconv._files import written_beside
from timm_smpconv.models.from_checkpoint import arguments_of, network_of
from timm_smpconv.models.smp_tcn import SMPTCN
from timm_smpconv.tools.cli import status_of
from timm_smpconv.weights.checkpoint import is_authors_layout, read_checkpoint, select_weights
from timm_smpconv.weights.hub import file_sha256, load_sources

TOLERANCE = 1e-4  # of the logits, relative to the largest one
SETTINGS = ('input_size', 'interpolation', 'crop_pct', 'mean', 'std')
REMOTE_CODE = Path(__file__).parent / 'modeling_smpconv.py'
FILES = ('README.md', 'config.json', 'model.safetensors', REMOTE_CODE.name)
AUTO_MAP = {  # class of transformers → the one to use instead
    'AutoModel': f'{REMOTE_CODE.stem}.TimmWrapperModel',
    'AutoModelForImageClassification': f'{REMOTE_CODE.stem}.TimmWrapperForImageClassification',
}
Model = Any  # an nn.Module with what timm adds to it: num_classes, in_chans, pretrained_cfg


class Converted(NamedTuple):
    """A folder that was written.

    Attributes:
        folder: Where.
        difference: Of its logits from those of the checkpoint in the authors' network, relative to the largest.
        sha256: Of its model.safetensors.
    """
    folder: Path
    difference: float
    sha256: str


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='.pth, .pt, .pth.tar or .safetensors')
    parser.add_argument('--model', required=True, choices=timm.list_models('smpconv*'))
    parser.add_argument(
        '--tag', help='what it was trained on; a tag of sources.yaml or your own (that of the published weights)')
    parser.add_argument('--weights', choices=['ema', 'model'], help='which to take if the checkpoint has both (ema)')
    parser.add_argument('--merged', action='store_true', help='write the merged model to OUT-merged as well')
    parser.add_argument('--out', required=True, type=Path, help='the folder to write')
    args = parser.parse_args(argv)
    return status_of('convert', partial(run, args))


def run(args: argparse.Namespace) -> None:
    for written in convert(args.checkpoint, args.model, args.out, args.tag, args.weights, args.merged):
        print(
            f'{written.folder}: logits differ by {written.difference:.1e} relative, model.safetensors has sha256 '
            f'{written.sha256}')


def convert(
        checkpoint: Path,
        name: str,
        out: Path,
        tag: Optional[str] = None,
        weights: Optional[str] = None,
        merged: bool = False,
        downloaded: bool = False,
) -> List[Converted]:
    """See the top of this file. Nothing is written if anything is wrong.

    Args:
        checkpoint: .pth, .pt, .pth.tar or .safetensors.
        name: The model.
        out: The folder to write. An earlier one that this function wrote is replaced.
        tag: What it was trained on; a tag of sources.yaml or your own. By default that of the published weights.
        weights: 'ema' or 'model': which to take if the checkpoint has both. By default 'ema'.
        merged: Write the merged model to the folder OUT-merged as well.
        downloaded: The checkpoint comes from the place that sources.yaml names, so that the accuracy there is its own.

    Raises:
        ValueError: `out` is a folder that must not be replaced.
        DataError: The checkpoint cannot be read, does not fit the model, or the result differs from it.
        OSError: The folder could not be written.
    """
    listed = load_sources()
    tag = tag or str(timm.models.get_pretrained_cfg_value(name, 'tag'))
    entry = listed.get(f'{name}.{tag}')
    datasets = {key.partition('.')[2]: other['dataset'] for key, other in listed.items()}
    dataset = next((dataset for known, dataset in datasets.items() if tag.startswith(known)), None)
    out = out.resolve()
    outs = [out, out.parent / f'{out.name}-merged'] if merged else [out]
    written = []
    for path in outs:
        check_replaceable(path, checkpoint)
    with written_beside(out.parent) as staging:
        print(f'reading {checkpoint}')
        content = read_checkpoint(str(checkpoint))
        source, kind = select_weights(content, weights)
        source = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in source.items()}
        authors = is_authors_layout(source)
        sha256 = file_sha256(checkpoint)
        model = build(name, tag, source)
        check_task(name, content)
        if not authors and isinstance(content.get('args'), argparse.Namespace):  # as train.py evaluated it
            settings = resolve_data_config(vars(content['args']), model=model)
            settings['input_size'] = (model.in_chans, *settings['input_size'][1:])
            model.pretrained_cfg.update({key: settings[key] for key in SETTINGS})
        if entry:
            check_entry(f'{name}.{tag}', entry, model, authors)
        else:  # the licence is up to whoever trained it
            model.pretrained_cfg.update(license=None, origin_url=None)
        labels = list(map(ImageNetInfo().index_to_description, range(1000))) if is_imagenet(dataset, model) else None
        facts = {
            'published': is_published(
                entry, authors and kind == select_weights(content)[1], None if downloaded else sha256),
            'origin': f'{"EMA" if kind == "ema" else "model"} weights from a checkpoint in '
                      f'the layout of {"the authors" if authors else "timm-smpconv"}, sha256 {sha256}',
            'license': model.pretrained_cfg['license'],
            'num_classes': model.num_classes,
            'num_features': model.head_hidden_size,
            'input_size': model.pretrained_cfg['input_size'],
            'labels': bool(labels),
            'dataset': dataset,
        }
        expected = [(x, oracle(source, name, x)) for x in inputs(model)]
        for target in outs:
            is_merged = target != out
            if is_merged:
                model = reparameterize_model(model)
            folder = staging / target.name
            origin = {'sha256': sha256, 'weights': kind}
            difference, file_hash = write(folder, model, expected, is_merged, labels, origin)
            parameters = sum(p.numel() for p in model.parameters())
            card = model_card(
                name, tag, entry, {**facts, 'merged': is_merged, 'parameters': parameters, 'difference': difference})
            (folder / 'README.md').write_text(card, encoding='utf-8')
            written.append(Converted(target, difference, file_hash))
    return written


def check_replaceable(out: Path, checkpoint: Path) -> None:
    """Refuse to replace anything but a folder that was converted, which its config.json tells."""
    rule = (
        'out must not exist, be empty, or be a folder that was converted and that does not hold the checkpoint, got '
        f'{out}')
    if not out.exists():
        return
    if out == Path.cwd() or out.is_mount():
        raise ValueError(
            'out must not be the working directory or a mount point, which cannot be replaced; name a folder in it, '
            f'got {out}')
    if not out.is_dir() or checkpoint.resolve().parent == out:
        raise ValueError(rule)
    names = {path.name for path in out.iterdir()}
    config = out / 'config.json'
    if names and not (names <= set(FILES) and config.is_file() and b'"file_sha256"' in config.read_bytes()):
        raise ValueError(rule)


def build(name: str, tag: str, source: Mapping[str, torch.Tensor]) -> Model:
    """The model with these weights, in evaluation mode. The checkpoint decides its classes and input channels."""
    like: Model = timm.create_model(name, device='meta')
    found = arguments_of(like, source)
    decided = {key: found.get(key) for key in ('num_classes', 'in_chans')}
    if not all(decided.values()):
        raise DataError(
            f'checkpoint must hold an SMPConv model with its classifier, got {len(source)} other tensors')
    model: Model = network_of(name, source, decided)
    model.pretrained_cfg.update(tag=tag, input_size=(model.in_chans, *model.pretrained_cfg['input_size'][1:]))
    return model.eval()


def check_task(name: str, content: Mapping[str, Any]) -> None:
    """Refuse what Lightning trained under another name, or with arguments of its own."""
    settings = content.get('hyper_parameters')  # what SequenceClassifier was built with
    if isinstance(settings, Mapping):
        free = ('num_classes', 'in_chans', 'drop_rate', 'input_drop_rate')
        changed = {key: value for key, value in (settings.get('model_args') or {}).items() if key not in free}
        if settings.get('name', name) != name or changed:
            raise DataError(
                f'checkpoint must hold {name} with its own arguments, got {settings.get("name")} with {changed}')


def check_entry(name: str, entry: Mapping[str, Any], model: Model, authors: bool) -> None:
    """Refuse weights that are not those listed under this model.tag."""
    cfg: Any = timm.get_pretrained_cfg(name)
    listed = {'num_classes': cfg.num_classes, 'in_chans': cfg.input_size[0]}
    found = {key: getattr(model, key) for key in listed}
    if found != listed:
        raise DataError(f'checkpoint must have {listed}, as {name} has, got {found}: give other weights another tag')
    if entry['origin'] and not authors:
        raise DataError(
            f'checkpoint must be in the authors\' layout, as listed for {name}: give weights of your own another tag')


def is_imagenet(dataset: Optional[Mapping[str, Any]], model: Model) -> bool:
    return dataset is not None and dataset['id'] == 'imagenet-1k' and model.num_classes == 1000


def is_published(entry: Optional[Mapping[str, Any]], authors: bool, sha256: Optional[str]) -> Optional[bool]:
    """Whether these are the weights whose accuracy the entry gives; None if nothing tells.

    Args:
        entry: Of these weights in sources.yaml.
        authors: Whether they are in the authors' layout, and those that are preferred of their file.
        sha256: Of that file; None if it comes from the place that the entry names.
    """
    if not entry or not entry['origin'] or not authors:
        return False
    if sha256 is None:
        return True
    known = entry['origin']['sha256']
    return None if known is None else known == sha256


def inputs(model: Model) -> List[torch.Tensor]:
    """Random inputs of the evaluation's size and, for networks that take any, of a size with other proportions."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, model.in_chans, *size, generator=generator) for size in sizes(model)]


def sizes(model: Model) -> List[Tuple[int, int]]:
    height, width = model.pretrained_cfg['input_size'][1:]
    return [(height, width), *([] if isinstance(model, SMPTCN) else [(max(32, height * 5 // 7), width * 8 // 7)])]


def oracle(source: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The logits in the authors' network, in float64."""
    family = imagenet if name in imagenet.CONFIGS else smp
    print(f"evaluating it at {x.shape[2]}×{x.shape[3]} by the authors' network of {family.__name__}")
    exact = {k: v.double() for k, v in family.in_authors_layout(source).items() if isinstance(v, torch.Tensor)}
    with torch.inference_mode():
        return family.logits(exact, name, x.double())


def write(
        folder: Path,
        model: Model,
        expected: List[Tuple[torch.Tensor, torch.Tensor]],
        merged: bool,
        labels: Optional[List[str]],
        origin: Mapping[str, str],
) -> Tuple[float, str]:
    """Write all but the card, and read the model back.

    Returns:
        How far its logits are from those expected, relative to the largest, and the sha256 of model.safetensors.
    """
    args = {'in_chans': model.in_chans, **({'inference_mode': True} if merged else {})}
    path = folder / 'config.json'
    weights = folder / 'model.safetensors'
    try:
        save_for_hf(model, str(folder), safe_serialization=True, model_args=args)
    except SafetensorError as error:  # the disk is full, for one
        raise OSError(f'could not write model.safetensors: {error}; nothing was written') from error
    shutil.copymode(path, weights)  # which only its owner could read
    shutil.copy(REMOTE_CODE, folder)
    sha256 = file_sha256(weights)
    config = json.loads(path.read_text(encoding='utf-8'))
    # timm 1.0.31 writes it here, too; transformers passes it and `model_args`, and Python refuses it twice.
    config['model_args'].pop('num_classes', None)
    config.update(auto_map=AUTO_MAP, origin={**origin, 'file_sha256': sha256})
    if labels:
        config['label_names'] = labels
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    # Not by 'local-dir:', which reads .safetensors since timm 1.0.26 only.
    read = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args']).eval()
    read.load_state_dict(load_file(weights))
    with torch.inference_mode():
        differences = [(read(x) - logits).abs().max() / logits.abs().max() for x, logits in expected]
    found = torch.stack(differences).max().item()  # NaN if one is
    if not found <= TOLERANCE:
        raise DataError(
            f'the logits must differ by at most {TOLERANCE} relative, got {found}: nothing was written')
    return found, sha256


if __name__ == '__main__':
    sys.exit(main())
