"""A checkpoint of the authors, or of timm's train.py, turned into a verified folder as the Hugging Face Hub has it:

    python weights/convert.py SMPConv_T.pth --model smpconv_tiny --out smpconv_tiny.in1k

The folder holds model.safetensors, config.json and the model card README.md. It appears when every key was used, and what
was read back from it gives the logits of the checkpoint in the plain network of tests/reference.py; else nothing is left.
"""
import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.utils import reparameterize_model

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]  # a script of the checkout: its package, and the oracle of its tests
import reference  # noqa: E402
from card import model_card  # noqa: E402
from sources import FILES, file_sha256, load_sources  # noqa: E402

from timm_smpconv.checkpoint import (  # noqa: E402
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
    parser.add_argument('--tag', default='in1k', help='what it was trained on; of sources.yaml, or your own (%(default)s)')
    parser.add_argument('--weights', choices=['ema', 'model'], help='of a checkpoint that holds both; ema if not said')
    parser.add_argument('--merged', action='store_true', help='write the merged model, too, into OUT-merged')
    parser.add_argument('--out', required=True, type=Path, help='the folder to write')
    args = parser.parse_args(argv)
    try:
        convert(args.checkpoint, args.model, args.tag, args.weights, args.merged, args.out)
    except (ConversionError, CheckpointError, OSError) as error:
        print(f'convert: {error}', file=sys.stderr)
        return 1
    return 0


def convert(checkpoint: Path, name: str, tag: str, weights: Optional[str], merged: bool, out: Path) -> None:
    """See the top of this file; the arguments are those of the command line."""
    outs = [out, out.with_name(f'{out.name}-merged')][:1 + merged]
    for folder in outs:
        check_replaceable(folder)
    say(f'reading {checkpoint}')
    content = read_checkpoint(checkpoint)
    source, kind = select_weights(content, weights)
    authors = any('.large_kernel.' in key for key in source)
    model = build(name, tag, source)
    if not authors and isinstance(content.get('args'), argparse.Namespace):  # as train.py evaluated it
        settings = resolve_data_config(vars(content['args']), model=model)
        model.pretrained_cfg.update({key: settings[key] for key in SETTINGS})
    sha256 = file_sha256(checkpoint)
    entry = load_sources().get(f'{name}.{tag}')
    if entry:
        check_entry(entry, model, authors, sha256)
    else:  # whoever trained it says under which licence it is
        model.pretrained_cfg.update(license=None, origin_url=None)
    expected = [(x, oracle(source, name, x)) for x in images(model)]
    layout = "the authors' code" if authors else 'timm-smpconv'
    facts = {
        'published': authors and entry is not None and entry['origin'] is not None,
        'origin': f'{kind} weights of a checkpoint in the layout of {layout}, sha256 {sha256}',
        'num_classes': model.num_classes,
        'input_size': model.pretrained_cfg['input_size'],
    }
    staging = Path(tempfile.mkdtemp(prefix='.convert-', dir=made(out.parent)))
    try:
        written = []
        for i, target in enumerate(outs):
            folder = staging / str(i)
            if i:
                model = reparameterize_model(model)
            parameters = sum(p.numel() for p in model.parameters())
            origin = {'weights': kind, 'sha256': sha256, 'authors': authors}
            save_for_hf(
                model, folder, model_config={'origin': origin}, safe_serialization=True,
                model_args={'inference_mode': True} if i else None)
            found = verify(folder, expected)
            text = model_card(name, tag, entry, {**facts, 'merged': bool(i), 'parameters': parameters, 'difference': found})
            (folder / 'README.md').write_text(text)
            written.append((folder, target, found))
        for folder, target, found in written:
            replace(folder, target)
            say(f'{target}: logits differ by {found:.1e} relative, model.safetensors has sha256 '
                f'{file_sha256(target / "model.safetensors")}')
    finally:
        shutil.rmtree(staging)


def check_replaceable(out: Path) -> None:
    if out.exists() and (not out.is_dir() or not {path.name for path in out.iterdir()} <= set(FILES)):
        raise ConversionError(f'--out must not exist, or be a folder with nothing but {", ".join(FILES)}, got {out}')


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(name: str, tag: str, source: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The model with these weights, in evaluation mode; its classes and channels are those of the checkpoint."""
    classifier = next((source[key] for key in ('head.weight', 'head.fc.weight') if key in source), None)
    stem = source.get('stem.0.conv.weight')
    if classifier is None or stem is None:
        raise ConversionError(f'CHECKPOINT must hold an SMPConv model with its classifier, got {len(source)} other tensors')
    model = timm.create_model(name, num_classes=len(classifier), in_chans=stem.shape[1])
    model.load_state_dict(checkpoint_filter_fn(source, model))
    model.pretrained_cfg['tag'] = tag
    return model.eval()


def check_entry(entry: Dict[str, Any], model: torch.nn.Module, authors: bool, sha256: str) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != entry['parameters']:
        raise ConversionError(
            f'CHECKPOINT must have the {entry["parameters"]} parameters that sources.yaml lists for this model and tag, got '
            f'{parameters}: give weights for other classes another --tag')
    known = entry['origin'] and entry['origin']['sha256']
    if authors and known and known != sha256:
        raise ConversionError(f'CHECKPOINT must have the sha256 that sources.yaml records, {known}, got {sha256}')


def images(model: torch.nn.Module) -> List[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, model.in_chans, *size, generator=generator) for size in SIZES]


def oracle(source: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    say(f'evaluating the checkpoint at {x.shape[2]}×{x.shape[3]} in the plain network of tests/reference.py')
    with torch.inference_mode():
        return reference.logits(reference.in_authors_layout(source), name, x)


def verify(folder: Path, expected) -> float:
    """The largest relative difference of the logits of a folder, read back from disk, from those expected."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.inference_mode():
        differences = [(model(x) - logits).abs().max() / logits.abs().max() for x, logits in expected]
    found = torch.stack(differences).max().item()  # NaN if one is
    if not found <= TOLERANCE:
        raise ConversionError(f'the logits must differ by at most {TOLERANCE} relative, got {found}: nothing was written')
    return found


def replace(folder: Path, target: Path) -> None:
    """Put a complete folder in the place of another or of nothing."""
    for path, mode in ((folder, 0o755), *((path, 0o644) for path in folder.iterdir())):
        path.chmod(mode)
    if target.exists():
        os.replace(target, folder.with_name(f'{folder.name}-before'))
    os.replace(folder, target)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == '__main__':
    sys.exit(main())
