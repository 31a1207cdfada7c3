"""The command line: `timm-smpconv` or `python -m timm_smpconv`."""
import argparse
import sys
from pathlib import Path
from typing import Callable, List, Optional

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
    demo.add_argument('--epochs', type=_integer(1, 10_000), default=9)
    demo.add_argument('--seed', type=_integer(0, 2 ** 32 - 1), default=42)
    demo.add_argument('--out', type=Path, default=Path('smpconv-demo'), help='folder for checkpoints and picture')
    demo.set_defaults(run=_demo)
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip('-').isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f'must be an integer from {low} to {high}, got {text!r}')
        return int(text)

    return parse


def _demo(args: argparse.Namespace) -> int:
    try:
        from .demo import run  # needs the extra `demo`
    except ModuleNotFoundError as error:
        print(f'timm-smpconv demo: {error.name} is missing; it comes with the extra "demo"', file=sys.stderr)
        return 1
    try:
        run(args.model, args.epochs, args.seed, args.out)
    except OSError as error:
        print(f'timm-smpconv demo: --out must be a folder that can be written: {error}', file=sys.stderr)
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
