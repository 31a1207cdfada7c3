"""A checkpoint of the authors, or of timm's train.py, turned into a verified folder as the Hugging Face Hub has it:

    python weights/convert.py SMPConv_T.pth --model smpconv_tiny --out smpconv_tiny.in1k

The folder holds model.safetensors, config.json and the model card README.md. It appears when every key was used, and
what was read back from it gives the logits of the checkpoint in the plain network of tests/reference.py; else nothing
is left.
"""
import argparse
import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.utils import reparameterize_model

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]  # a script of the checkout: its package, and the oracle of its tests
import reference
from card import model_card
from sources import FILES, SOURCES, file_sha256, load_sources

from timm_smpconv.checkpoint import (
    CheckpointError,
    checkpoint_filter_fn,
    read_checkpoint,
    select_weights,
)

TOLERANCE = 1e-4  # of the logits, relative to the largest
SETTINGS = ('input_size', 'interpolation', 'crop_pct', 'mean', 'std')
SIZES = ((224, 224), (160, 256))


class ConversionError(Exception):
    """The checkpoint, an argument or the result is not what it has to be."""


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='.pth, .pt, .pth.tar or .safetensors')
    parser.add_argument('--model', required=True, choices=timm.list_models('smpconv*'))
    parser.add_argument(
        '--tag', default='in1k', help='what it was trained on; of sources.yaml, or your own (%(default)s)')
    parser.add_argument('--weights', choices=['ema', 'model'], help='of a checkpoint that holds both; ema if not said')
    parser.add_argument('--merged', action='store_true', help='write the merged model, too, into OUT-merged')
    parser.add_argument('--out', required=True, type=Path, help='the folder to write')
    parser.add_argument('--sources', type=Path, default=SOURCES, help='what is known of weights (%(default)s)')
    args = parser.parse_args(argv)
    try:
        convert(args.checkpoint, args.model, args.tag, args.weights, args.merged, args.out, args.sources)
    except (ConversionError, CheckpointError, OSError) as error:
        print(f'convert: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nconvert: interrupted, nothing was written', file=sys.stderr)
        return 130
    return 0


def convert(
        checkpoint: Path, name: str, tag: str, weights: Optional[str], merged: bool, out: Path, sources: Path) -> None:
    """See the top of this file; the arguments are those of the command line."""
    out = out.resolve()
    outs = [out, out.with_name(f'{out.name}-merged')] if merged else [out]
    for folder in outs:
        check_replaceable(folder, checkpoint)
    print(f'reading {checkpoint}', flush=True)
    content = read_checkpoint(str(checkpoint))
    source, kind = select_weights(content, weights)
    source = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in source.items()}
    authors = any('.large_kernel.' in key for key in source)
    sha256 = file_sha256(checkpoint)
    entry = load_sources(sources).get(f'{name}.{tag}')
    model = build(name, tag, source)
    if not authors and isinstance(content.get('args'), argparse.Namespace):  # as train.py evaluated it
        settings = resolve_data_config(vars(content['args']), model=model)
        settings['input_size'] = (model.in_chans, *settings['input_size'][1:])
        model.pretrained_cfg.update({key: settings[key] for key in SETTINGS})
    if entry:
        check_entry(entry, model, authors)
    else:  # whoever trained it says under which licence it is
        model.pretrained_cfg.update(license=None, origin_url=None)
    facts = {
        'published': is_published(entry, authors, kind, sha256),
        'origin': f'{kind} weights of a checkpoint in the layout of {"the authors" if authors else "timm-smpconv"}, '
                  f'sha256 {sha256}',
        'num_classes': model.num_classes,
        'input_size': model.pretrained_cfg['input_size'],
    }
    expected = [(x, oracle(source, name, x)) for x in images(model)]
    with made(out.parent), tempfile.TemporaryDirectory(prefix='.convert-', dir=out.parent) as staging:
        written, said = [], []
        for i, target in enumerate(outs):
            folder = Path(staging, str(i))
            if i:
                model = reparameterize_model(model)
            args = {'in_chans': model.in_chans, **({'inference_mode': True} if i else {})}
            save_for_hf(model, folder, safe_serialization=True, model_args=args)
            found = verify(folder, expected)
            parameters = sum(p.numel() for p in model.parameters())
            card = model_card(
                name, tag, entry, {**facts, 'merged': bool(i), 'parameters': parameters, 'difference': found})
            (folder / 'README.md').write_text(card)
            origin = {'sha256': sha256, 'weights': kind, 'file_sha256': file_sha256(folder / 'model.safetensors')}
            config = json.loads((folder / 'config.json').read_text())
            (folder / 'config.json').write_text(json.dumps({**config, 'origin': origin}, indent=2))
            written.append((folder, target))
            said.append(f'{target}: logits differ by {found:.1e} relative, model.safetensors has sha256 '
                        f'{origin["file_sha256"]}')
        replace(written)
    print('\n'.join(said), flush=True)


def check_replaceable(out: Path, checkpoint: Path) -> None:
    """Refuse to replace anything but what this script wrote, which its config.json tells."""
    rule = (
        '--out must not exist, be empty, or be a folder that this script wrote and that does not hold CHECKPOINT, '
        f'got {out}')
    if not out.exists():
        return
    if not out.is_dir() or checkpoint.resolve().parent == out:
        raise ConversionError(rule)
    names = {path.name for path in out.iterdir()}
    config = out / 'config.json'
    if names and not (names <= set(FILES) and config.is_file() and '"file_sha256"' in config.read_text()):
        raise ConversionError(rule)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder exists inside; where that fails, those that were made for it go again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            path.rmdir()
        raise


def build(name: str, tag: str, source: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The model with these weights, in evaluation mode; its classes and channels are those of the checkpoint."""
    classifier = source.get('head.weight', source.get('head.fc.weight'))
    stem = source.get('stem.0.conv.weight')
    if not all(isinstance(t, torch.Tensor) and t.ndim >= 2 for t in (classifier, stem)):
        raise ConversionError(
            f'CHECKPOINT must hold an SMPConv model with its classifier, got {len(source)} other tensors')
    model = timm.create_model(name, num_classes=len(classifier), in_chans=stem.shape[1])
    model.load_state_dict(checkpoint_filter_fn(source, model))
    model.pretrained_cfg.update(tag=tag, input_size=(model.in_chans, *model.pretrained_cfg['input_size'][1:]))
    return model.eval()


def check_entry(entry: Dict[str, Any], model: torch.nn.Module, authors: bool) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != entry['parameters']:
        raise ConversionError(
            f'CHECKPOINT must have the {entry["parameters"]} parameters that are listed for this model and tag, got '
            f'{parameters}: give weights for other classes another --tag')
    if entry['origin'] and not authors:
        raise ConversionError(
            f'CHECKPOINT must be in the authors\' layout, as listed for {entry["model"]}.{entry["tag"]}: give weights '
            'of your own another --tag')


def is_published(entry: Optional[Dict[str, Any]], authors: bool, kind: str, sha256: str) -> Optional[bool]:
    """Whether these are the weights whose accuracy the entry gives; None where the hash to tell by is not known."""
    if not entry or not entry['origin'] or not authors or kind != 'ema':
        return False
    known = entry['origin']['sha256']
    return None if known is None else known == sha256


def images(model: torch.nn.Module) -> List[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, model.in_chans, *size, generator=generator) for size in SIZES]


def oracle(source: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    print(f'evaluating it at {x.shape[2]}×{x.shape[3]} in the plain network of tests/reference.py', flush=True)
    with torch.inference_mode():
        return reference.logits(reference.in_authors_layout(source), name, x)


def verify(folder: Path, expected) -> float:
    """The largest relative difference of the logits of a folder, read back from disk, from those expected."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.inference_mode():
        differences = [(model(x) - logits).abs().max() / logits.abs().max() for x, logits in expected]
    found = torch.stack(differences).max().item()  # NaN if one is
    if not found <= TOLERANCE:
        raise ConversionError(
            f'the logits must differ by at most {TOLERANCE} relative, got {found}: nothing was written')
    return found


def replace(pairs: List[Tuple[Path, Path]]) -> None:
    """Put complete folders in the places of others or of nothing: all of them or none."""
    done: List[Tuple[Path, Path]] = []
    try:
        for folder, target in pairs:
            for path, mode in ((folder, 0o755), *((path, 0o644) for path in folder.iterdir())):
                path.chmod(mode)
            before = folder.with_name(f'{folder.name}-before')
            if target.exists():
                Path(target).replace(before)
            done.append((target, before))
            Path(folder).replace(target)
    except BaseException:
        for target, before in done:
            if target.exists():
                shutil.rmtree(target)
            if before.exists():
                Path(before).replace(target)
        raise


if __name__ == '__main__':
    sys.exit(main())
