"""The command line: `timm-smpconv` or `python -m timm_smpconv`."""
import argparse
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Type

import timm
import torch
from tqdm import tqdm

from .. import __version__
from .._errors import DataError
from .._files import check_no_folder, written_beside
from ..models.from_checkpoint import build_network
from ..training.recipes import recipe_names, recipe_path
from ..weights import hub
from . import backend_report
from .deploy.engines import ENGINES, PRECISIONS
from .images import find_images, own_size, read_images
from .receptive_field import receptive_field, share_table
from .timm_scripts import find_script, run_script

# What a program ends with, by the kind of its error. Any other error is a defect and keeps its traceback.
STATUS: Dict[Type[Exception], int] = {DataError: 1, OSError: 1, ValueError: 2}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-smpconv', description='SMPConv models for timm.')
    parser.add_argument('--version', action='version', version=__version__)
    parser.set_defaults(extra=None)  # that the command needs
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
    demo.set_defaults(run=_demo, extra='demo')

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
    digits.set_defaults(run=_digits, extra='demo')

    weights = commands.add_parser(
        'weights', help='download the weights that pretrained=True takes, or show what is there')
    weights.add_argument(
        'name', nargs='?', metavar='NAME', help='a model, such as smpconv_tiny; without it, all weights are listed')
    weights.add_argument(
        '--file', type=Path, help="the authors' file, if you downloaded it already, by a browser for example")
    weights.add_argument('--remove', action='store_true', help="delete the authors' weights of NAME from the cache")
    weights.add_argument(
        '--cache-dir', type=Path, metavar='DIR', help='as that of create_model; by default in HF_HOME')
    weights.set_defaults(run=_weights)

    _add_deploy(commands)

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
    picture.set_defaults(extra='demo')
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
    sequence.set_defaults(run=_sequence, extra='sequences')
    return parser


def _add_deploy(commands: Any) -> None:
    deploy = commands.add_parser(
        'deploy', help='merge, export, quantise, compare and measure any model of timm in the engines for CPUs')
    deploy.add_argument(
        'model', nargs='?', metavar='MODEL', help='a model of timm, or module:function that returns a network')
    deploy.add_argument('--out', type=Path, metavar='DIR', help='the folder for the files')
    deploy.add_argument(
        '--check', type=Path, metavar='DIR',
        help='compare and measure the files of DIR again, on this machine, with --batch, --threads and --json')
    deploy.add_argument('--checkpoint', type=Path, metavar='FILE', help='its weights, by default the initial ones')
    deploy.add_argument(
        '--pretrained', action='store_true', help='without --checkpoint: the weights that timm downloads')
    deploy.add_argument(
        '--data', type=Path, metavar='FOLDER',
        help='images to calibrate and measure with: folders train and validation or one folder, of a folder for each '
        'class, or without labels')
    deploy.add_argument(
        '--engines', nargs='+', choices=('torch', *ENGINES), default=[*ENGINES], metavar='ENGINE',
        help=f'of {", ".join(ENGINES)}, by default all; torch means the five of PyTorch')
    deploy.add_argument(
        '--precisions', nargs='+', choices=PRECISIONS,
        help='by default float32 and bfloat16, and with --data int8')
    deploy.add_argument(
        '--batch', type=_integer(1, 1024), nargs='+', metavar='N', help='sizes of the batch, by default 1 16')
    deploy.add_argument(
        '--image-size', type=_integer(1, 8192), metavar='N', help="height and width, by default the model's own")
    deploy.add_argument('--threads', type=_integer(1, 1024), metavar='N', help='by default as many as PyTorch takes')
    deploy.add_argument(
        '--calibration', type=_integer(1, 1_000_000), default=300, metavar='N',
        help='images to calibrate int8 with, default: %(default)s')
    deploy.add_argument(
        '--limit', type=_integer(1, 1_000_000), metavar='N',
        help='images to measure on, by default at most 1,000, and 64 unless the task is classification')
    deploy.add_argument(
        '--max-drop', type=float, default=0.5, metavar='PERCENT',
        help='how much top-1, or without labels the share of the same classes, may drop; default: %(default)s')
    deploy.add_argument(
        '--tolerance', type=float, default=1e-4, metavar='X',
        help='how far outputs in float32 may be off, relative to the largest; default: %(default)s')
    deploy.add_argument(
        '--task', choices=('classification', 'segmentation'), default='classification',
        help='what the outputs are, for their comparison; default: %(default)s')
    deploy.add_argument('--features', action='store_true', help='deploy a backbone that returns all its maps')
    deploy.add_argument(
        '--preprocess', choices=('outside', 'in-graph'), default='outside',
        help='in-graph: files take pixels in uint8 and normalise them; default: %(default)s')
    for name in 'mean', 'std':
        deploy.add_argument(
            f'--{name}', type=float, nargs='+', metavar='X', help="of each channel, by default the model's own")
    deploy.add_argument(
        '--interpolation', choices=('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming'),
        help="of resizing, by default the model's own")
    deploy.add_argument('--crop-pct', type=float, metavar='X', help="as in timm's scripts, by default the model's own")
    deploy.add_argument('--json', type=Path, metavar='FILE', help='write the report there, too')
    deploy.set_defaults(run=lambda args: _deploy(args, deploy.parse_args([])), extra='deploy')


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


def _demo(args: argparse.Namespace) -> None:
    from .demo.demo import run
    run(args.model, args.epochs, args.seed, args.out)


def _recipe(args: argparse.Namespace) -> None:
    print('\n'.join(recipe_names()) if args.name is None else recipe_path(args.name))


def _run(args: argparse.Namespace) -> int:
    script = find_script(args.script)
    try:
        run_script(script, args.args)
    except Exception:  # the script's own: shown as Python shows it
        traceback.print_exc()
        return 1
    return 0


def _digits(args: argparse.Namespace) -> None:
    from .demo.digits import write_digits
    images = write_digits(args.folder)
    print(f'{len(images)} images in {args.folder}')


def _weights(args: argparse.Namespace) -> None:
    if (args.file or args.remove) and (args.name is None or (args.file and args.remove)):
        raise ValueError('arguments must be NAME, NAME --file FILE, NAME --remove or none')
    sources = hub.load_sources()
    names = [name for name in sources if args.name in (None, name, name.partition('.')[0])]
    if not names:
        raise ValueError(f'NAME must be one of {", ".join(timm.list_models("smpconv*"))}, got {args.name!r}')
    if args.name is None:
        print(f'cache: {hub.cache_folder(args.cache_dir)}')
        for name in names:
            cached, origin = hub.cached_file(name, args.cache_dir), sources[name]['origin']
            state = f'{cached.stat().st_size / 1e6:.1f} MB' if cached.is_file() else 'not there'
            source = sources[name]['hub_id'] or (origin and origin['file']) or 'none published'
            print(f'{name:40}{state:12}{source}')
    elif args.remove:
        for path in hub.remove(names[0], args.cache_dir):
            print(f'removed {path}')
    elif args.file:
        print(hub.fetch_authors(names[0], args.file, args.cache_dir))
    else:
        print(*hub.fetch(names[0], args.cache_dir).values())


_OF_CHECK = ('check', 'batch', 'threads', 'json', 'command', 'run', 'extra')


def _deploy(args: argparse.Namespace, defaults: argparse.Namespace) -> int:
    if (args.model is None) != (args.out is None) or (args.model is None) == (args.check is None):
        raise ValueError('arguments must be MODEL --out DIR or --check DIR')
    given = [key for key, value in vars(args).items() if key not in _OF_CHECK and value != getattr(defaults, key)]
    if args.check and given:
        raise ValueError(f'--check must go with --batch, --threads and --json alone, got {", ".join(given)}')
    if 'int8' in (args.precisions or ()) and args.data is None:
        raise ValueError('--precisions int8 must go with --data, images to calibrate with')
    if args.json:
        check_no_folder(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    from .deploy import command
    from .deploy.network import read_network
    if args.check:
        text, report = command.check(args.check, args.batch)
    else:
        network = read_network(
            args.model, args.checkpoint, args.pretrained, 'features' if args.features else args.task, args.image_size,
            args.preprocess, {key: getattr(args, key) for key in ('mean', 'std', 'interpolation', 'crop_pct')})
        precisions = args.precisions or [name for name in PRECISIONS if name != 'int8' or args.data]
        text, report = command.deploy(
            *network, args.out, command.Options(args.batch or [1, 16], args.tolerance, args.max_drop), args.engines,
            precisions, args.data, args.calibration, args.limit)
    print(text)
    if args.json:
        with written_beside(args.json.parent) as folder:
            (folder / args.json.name).write_text(json.dumps(report, indent=1))
    return int(any(row['failed'] for row in report['rows']))


def _backends(args: argparse.Namespace) -> None:
    try:
        for line in backend_report.page(
                args.models, args.image_size, args.batch, args.channels_last, getattr(torch, args.dtype), args.device,
                args.measure):
            print(line)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)):  # on the CPU
            raise
        raise ValueError('--batch and --image-size must fit into the memory, they do not') from error


def _picture_kernels(args: argparse.Namespace) -> None:
    def draw(pictures: Any) -> Any:
        model = build_network(args.model, args.checkpoint, args.pretrained)
        return pictures.draw_kernels(pictures.find_kernels(model, args.stage, args.channels))

    _write_picture(args.out, draw)


def _picture_receptive_field(args: argparse.Namespace) -> None:
    if args.checkpoint and len(args.checkpoint) != len(args.models):
        raise ValueError(
            f'--checkpoint must name one file for each MODEL, got {len(args.checkpoint)} for {len(args.models)}')

    def draw(pictures: Any) -> Any:
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

    _write_picture(args.out, draw)


def _write_picture(out: Path, draw: Callable[[Any], Any]) -> None:
    """Write what `draw` returns for the module `pictures`. A file that cannot be written is found before it draws."""
    from . import pictures
    check_no_folder(out)
    with written_beside(out.parent) as folder:
        pictures.save_figure(draw(pictures), folder / out.name)
    print(f'wrote {out}')


def _sequence(args: argparse.Namespace) -> None:
    from ..training.sequences.cli import run
    run(args.args)


def main(argv: Optional[List[str]] = None) -> int:
    args = _parser().parse_args(argv)
    names = ['timm-smpconv', args.command, getattr(args, 'picture', '')]
    return status_of(' '.join(filter(None, names)), lambda: args.run(args), args.extra)


def status_of(program: str, run: Callable[[], Optional[int]], extra: Optional[str] = None) -> int:
    """Run a program and return its exit status. Errors that users meet are told in one line.

    Args:
        program: Its name, for that line.
        run: What it does; may return a status.
        extra: The extra of this package that it needs.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)  # for limited encodings; for pipes
    try:
        status = run() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f'\n{program}: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone: keep Python's flush at exit from failing, as its documentation does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        print(f'{program}: {error.name} is missing; it comes with the extra "{extra}"', file=sys.stderr)
        return 1
    except tuple(STATUS) as error:
        print(f'{program}: {" ".join(str(error).split())}', file=sys.stderr)
        return next(status for kind, status in STATUS.items() if isinstance(error, kind))
