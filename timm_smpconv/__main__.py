"""The command line: `timm-smpconv` or `python -m timm_smpconv`."""
import argparse
import sys
from pathlib import Path
from typing import List, Optional

import timm

from . import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-smpconv', description='SMPConv models for timm.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', required=True)

    demo = commands.add_parser(
        'demo', help='train on real handwritten digits, merge, and show what changed',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo.add_argument('--model', default='smpconv_mobile31', choices=timm.list_models('smpconv*'))
    demo.add_argument('--epochs', type=_positive, default=12)
    demo.add_argument('--seed', type=int, default=42)
    demo.add_argument('--out', type=Path, default=Path('smpconv-demo'), help='folder for the checkpoints and the picture')
    demo.set_defaults(run=_demo)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def _demo(args: argparse.Namespace) -> int:
    try:
        from .demo import run  # needs the extra `demo`
    except ModuleNotFoundError as error:
        print(f'timm-smpconv demo: {error.name} is missing: pip install "timm-smpconv[demo]"', file=sys.stderr)
        return 1
    try:
        run(args.model, args.epochs, args.seed, args.out)
    except NotADirectoryError as error:
        print(f'timm-smpconv demo: {error}', file=sys.stderr)
        return 1
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f'\ntimm-smpconv {args.command}: interrupted, nothing was written', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
