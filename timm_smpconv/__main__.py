"""The command line: `timm-smpconv` or `python -m timm_smpconv`."""
import argparse
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, List, Optional

import timm
import torch

from . import __version__, backends, pretrained
from ._errors import DataError
from .build import build_network
from .checkpoint import CheckpointError
from .console import robust_output
from .files import check_no_folder, written_beside
from .receptive_field import find_images, own_size, read_images, receptive_field, share_table
from .recipe import recipe_names, recipe_path
from .scripts import find_script, run_script
from .weights import command as weights
from .weights.conversion import ConversionError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-smpconv', description='SMPConv models for timm.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', required=True)

    demo = commands.add_parser(
        'demo', help='train on real handwritten digits, merge, and show what changed')
    demo.add_argument(
        '--model', default='smpconv_mobile31', choices=timm.list_models('smpconv*'), help='default: %(default)s')
    demo.add_argument(
        '--epochs', type=_integer(1, 10_000), help='by default as many as take about three minutes on two cores')
    demo.add_argument('--seed', type=_integer(0, 2 ** 32 - 1), default=42, help='default: %(default)s')
    demo.add_argument(
        '--out', type=Path, default=Path('smpconv-demo'),
        help='folder for checkpoints and pictures, by default %(default)s')
    demo.set_defaults(run=_demo)

    recipe = commands.add_parser(
        'recipe', help="print the path of a recipe for timm's train.py -c or for sequence fit --config")
    recipe.add_argument('name', nargs='?', metavar='NAME', help='without it, the names of all recipes are listed')
    recipe.set_defaults(run=_recipe)

    run = commands.add_parser('run', help="run one of timm's scripts with these models and optimizers registered")
    run.add_argument(
        'script', metavar='SCRIPT',
        help='a path, or a name such as validate.py: taken from the folder TIMM_SCRIPTS if that is set, else from a '
        'checkout of timm or the cache, else downloaded')
    run.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='arguments of the script')
    run.set_defaults(run=_run)

    digits = commands.add_parser('digits', help='write real handwritten digits as folders of images')
    digits.add_argument('folder', type=Path, metavar='DIR', help='an empty folder or a new one')
    digits.set_defaults(run=_digits)

    of_weights = commands.add_parser(
        'weights', help="download the authors' weights, convert and verify them; pretrained=True then takes them")
    of_weights.add_argument('name', nargs='?', metavar='NAME', help='a model, such as smpconv_tiny')
    of_weights.add_argument(
        '--file', type=Path, help="the authors' file, if you downloaded it already, by a browser for example")
    of_weights.add_argument(
        '--list', action='store_true', help='list what exists, where, how large, and what is cached')
    of_weights.add_argument('--remove', action='store_true', help='delete the weights of NAME from the cache')
    of_weights.add_argument(
        '--cache-dir', type=Path, metavar='DIR',
        help="the cache, by default in Hugging Face's folder of assets (HF_ASSETS_CACHE); pass another one to "
        'create_model, too')
    of_weights.set_defaults(run=_weights)

    which = commands.add_parser(
        'backends', help='print by what this machine would compute the convolutions of a model, and why')
    which.add_argument(
        'models', nargs='*', metavar='MODEL', default=['smpconv_tiny', 'smpconv_mobile51'],
        help='default: smpconv_tiny smpconv_mobile51')
    which.add_argument('--measure', action='store_true', help='time the backends side by side')
    which.add_argument(
        '--batch', type=_integer(1, 4096), nargs='+', default=[1], metavar='N', help='sizes of the batch, default: 1')
    which.add_argument('--channels-last', action='store_true', help='the memory format, by default contiguous')
    which.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='default: %(default)s')
    which.add_argument('--device', choices=('cpu', 'cuda'), help='by default cuda where there is a GPU, else cpu')
    which.add_argument(
        '--image-size', type=_integer(1, 8192), metavar='N', help="height and width, by default the model's own")
    which.set_defaults(run=_backends)

    picture = commands.add_parser('picture', help='draw kernels with their points, or effective receptive fields')
    pictures = picture.add_subparsers(dest='picture', required=True)

    kernels = pictures.add_parser('kernels', help='draw kernels and, unless the network is merged, their points')
    kernels.add_argument('model', metavar='MODEL', help="one of this package's models")
    kernels.add_argument('--checkpoint', type=Path, metavar='FILE', help='its weights, by default the initial ones')
    kernels.add_argument(
        '--stage', type=_integer(0, 10_000), nargs='+', metavar='N',
        help='draw all kernels of these stages, counted from 0; by default the first one of each')
    kernels.add_argument(
        '--channels', type=_integer(0, 100_000), nargs='+', default=[0, 1], metavar='N',
        help='output channels, counted from 0, by default 0 1')
    kernels.set_defaults(run=_picture_kernels)

    field = pictures.add_parser(
        'receptive-field', help='draw the effective receptive fields of any models of timm, and print their sizes')
    field.add_argument('models', nargs='+', metavar='MODEL', help='names of models of timm')
    field.add_argument(
        '--checkpoint', type=Path, nargs='+', metavar='FILE',
        help='weights, one file for each MODEL in their order; by default the initial ones')
    field.add_argument(
        '--images', type=Path, required=True, metavar='DIR', help='a folder with images in it or below')
    field.add_argument(
        '--image-size', type=_integer(32, 8192), metavar='N',
        help="height and width to which images are brought, by default the largest of the models' own")
    field.add_argument(
        '--count', type=_integer(1, 10_000_000), metavar='N',
        help='take so many images, evenly spaced in the order of their names; by default all')
    field.set_defaults(run=_picture_receptive_field)
    for parser_, file in (kernels, 'kernels.png'), (field, 'receptive-field.png'):
        parser_.add_argument(
            '--out', type=_picture_file, default=Path(file), metavar='FILE',
            help='a file whose name ends in .png or .svg, by default %(default)s')
        parser_.add_argument(
            '--pretrained', action='store_true', help='without --checkpoint: the weights that timm downloads')

    sequence = commands.add_parser(
        'sequence', help='train, validate or test a sequence network with PyTorch Lightning', add_help=False,
        prefix_chars='\0')  # all arguments, options too, are Lightning's
    sequence.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS')
    sequence.set_defaults(run=_sequence)
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.removeprefix('-').isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f'must be an integer from {low} to {high}, got {text!r}')
        return int(text)

    return parse


def _picture_file(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in ('.png', '.svg'):  # '.png' alone is a name, not a suffix
        raise argparse.ArgumentTypeError(f'must be a file whose name ends in .png or .svg, got {text!r}')
    return path


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


@robust_output()
def _recipe(args: argparse.Namespace) -> int:
    if args.name is None:
        print('\n'.join(recipe_names()))
        return 0
    try:
        print(recipe_path(args.name))
    except ValueError as error:
        print(f'timm-smpconv recipe: {error}', file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> int:
    try:
        script = find_script(args.script)
    except (ValueError, DataError) as error:
        print(f'timm-smpconv run: {error}', file=sys.stderr)
        return 2
    try:
        run_script(script, args.args)
    except Exception:  # the script's own: shown as Python shows it
        traceback.print_exc()
        return 1
    return 0


@robust_output()
def _digits(args: argparse.Namespace) -> int:
    try:
        from .digits import write_digits  # needs the extra `demo`
    except ModuleNotFoundError as error:
        print(f'timm-smpconv digits: {error.name} is missing; it comes with the extra "demo"', file=sys.stderr)
        return 1
    try:
        images = write_digits(args.folder)
    except OSError as error:
        print(f'timm-smpconv digits: {error}', file=sys.stderr)
        return 1
    print(f'{len(images)} images in {args.folder}')
    return 0


@robust_output()
def _weights(args: argparse.Namespace) -> int:
    given = [option for option in ('file', 'list', 'remove') if getattr(args, option)]
    if len(given) > 1 or (args.name is None) != args.list:
        print(
            'timm-smpconv weights: arguments must be NAME, NAME --file FILE, NAME --remove or --list', file=sys.stderr)
        return 2
    try:
        if args.list:
            print('\n'.join(weights.listing(args.cache_dir)))
        elif args.remove:
            weights.remove(args.name, args.cache_dir, say=print)
        else:
            folder = weights.fetch(args.name, args.file, args.cache_dir, say=print)
            place = f', cache_dir="{args.cache_dir}"' if args.cache_dir else ''
            way = f'"local-dir:{folder}", pretrained=True' if pretrained.BUILT_IN[folder.name] else (
                f'"{args.name}", pretrained=True{place}')
            print(f'timm.create_model({way}) takes it from there')
    except (weights.WeightsError, ConversionError, CheckpointError, OSError) as error:
        print(f'timm-smpconv weights: {error}', file=sys.stderr)
        return 1
    return 0


@robust_output()
def _backends(args: argparse.Namespace) -> int:
    try:
        for line in backends.page(
                args.models, args.image_size, args.batch, args.channels_last, getattr(torch, args.dtype), args.device,
                args.measure):
            print(line)
    except ValueError as error:
        print(f'timm-smpconv backends: {error}', file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)):  # on the CPU
            raise
        print('timm-smpconv backends: --batch and --image-size must fit into the memory, they do not', file=sys.stderr)
        return 2
    return 0


@robust_output()
def _picture_kernels(args: argparse.Namespace) -> int:
    def draw(pictures: Any) -> Any:
        model = build_network(args.model, args.checkpoint, args.pretrained)
        return pictures.draw_kernels(pictures.find_kernels(model, args.stage, args.channels))

    return _write_picture(args, draw)


@robust_output()
def _picture_receptive_field(args: argparse.Namespace) -> int:
    if args.checkpoint and len(args.checkpoint) != len(args.models):
        print(
            f'timm-smpconv picture receptive-field: --checkpoint must name one file for each MODEL, got '
            f'{len(args.checkpoint)} for {len(args.models)}', file=sys.stderr)
        return 2

    def draw(pictures: Any) -> Any:
        from tqdm import tqdm  # of the extra `demo`
        files = find_images(args.images, args.count)
        checkpoints = args.checkpoint or [None] * len(args.models)
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        networks = {}
        for i, (name, checkpoint) in enumerate(zip(args.models, checkpoints)):
            label = name if args.models.count(name) == 1 else f'{name} ({i + 1})'
            networks[label] = build_network(name, checkpoint, args.pretrained)
        size = args.image_size or max(map(own_size, networks.values()))
        fields = {}
        for name, network in networks.items():
            progress = tqdm(read_images(files, network, size), desc=name, total=len(files), unit='image')
            try:
                fields[name] = receptive_field(network.to(device), progress)
            except (AssertionError, RuntimeError, ValueError) as error:  # how networks refuse a size; little memory
                raise ValueError(f'{name} with images of {size}x{size}: {error}') from error
        images = '1 image' if len(files) == 1 else f'{len(files)} images'
        print(f'{images} of {size}x{size}: the side of the smallest square that holds a share of the')
        print("effective receptive field, in percent of the image's side")
        print(share_table(fields))
        return pictures.draw_receptive_fields(fields)

    return _write_picture(args, draw)


def _write_picture(args: argparse.Namespace, draw: Callable[[Any], Any]) -> int:
    """Write what `draw` returns for the module `pictures`. A file that cannot be written is found before it draws."""
    command = f'timm-smpconv picture {args.picture}'
    try:
        from . import pictures  # needs the extra `demo`
    except ModuleNotFoundError as error:
        print(f'{command}: {error.name} is missing; it comes with the extra "demo"', file=sys.stderr)
        return 1

    try:
        check_no_folder(args.out)
        with written_beside(args.out.parent) as folder:
            try:
                figure = draw(pictures)
            except OSError as error:  # of what it reads
                raise ValueError(str(error)) from error
            pictures.save_figure(figure, folder / args.out.name)
    except OSError as error:
        print(f'{command}: --out must be a file that can be written: {error}', file=sys.stderr)
        return 1
    except (CheckpointError, ValueError) as error:
        print(f'{command}: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    print(f'wrote {args.out}')
    return 0


def _sequence(args: argparse.Namespace) -> int:
    try:
        from .sequences import DataError  # needs the extra `sequences`
        from .sequences.cli import OptionError, run
    except ModuleNotFoundError as error:
        print(f'timm-smpconv sequence: {error.name} is missing; it comes with the extra "sequences"', file=sys.stderr)
        return 1
    try:
        run(args.args)
    except (DataError, CheckpointError, OptionError) as error:
        print(f'timm-smpconv sequence: {" ".join(str(error).split())}', file=sys.stderr)
        return 1
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    command = ''
    try:
        with robust_output():
            args = _parser().parse_args(argv)
        command = f' {args.command}'
        return args.run(args)
    except KeyboardInterrupt as error:
        details = f', {error}' if str(error) else ''
        print(f'\ntimm-smpconv{command}: interrupted{details}', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
