"""Converts a checkpoint of the authors, or of timm's train.py, to a folder as the Hugging Face Hub has it.

    python weights/convert.py SMPConv_T.pth --model smpconv_tiny --out smpconv_tiny.in1k

The folder holds model.safetensors, config.json and the model card README.md. It is written only if every key was used
and the model read back from it gives the logits that the checkpoint gives in a plain network, as
timm_smpconv/tools/authors_weights/conversion.py does it.
"""
import argparse
import sys
from functools import partial
from pathlib import Path
from typing import List, Optional

import timm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package of this checkout
from timm_smpconv.tools.authors_weights.conversion import convert
from timm_smpconv.tools.cli import status_of
from timm_smpconv.weights.hub import SOURCES


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='.pth, .pt, .pth.tar or .safetensors')
    parser.add_argument('--model', required=True, choices=timm.list_models('smpconv*'))
    parser.add_argument(
        '--tag', help='what it was trained on; a tag of sources.yaml or your own (that of the published weights)')
    parser.add_argument('--weights', choices=['ema', 'model'], help='which to take if the checkpoint has both (ema)')
    parser.add_argument('--merged', action='store_true', help='write the merged model to OUT-merged as well')
    parser.add_argument('--out', required=True, type=Path, help='the folder to write')
    parser.add_argument('--sources', type=Path, default=SOURCES, help='the list of published weights (%(default)s)')
    args = parser.parse_args(argv)
    return status_of('convert', partial(run, args))


def run(args: argparse.Namespace) -> None:
    for written in convert(
            args.checkpoint, args.model, args.out, args.tag, args.weights, args.merged, args.sources, say=print):
        print(
            f'{written.folder}: logits differ by {written.difference:.1e} relative, model.safetensors has sha256 '
            f'{written.sha256}')


if __name__ == '__main__':
    sys.exit(main())
