"""timm's own scripts, which are not in its wheel, run with this package's models and optimizers registered."""
import ast
import os
import runpy
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set

import timm
import timm.utils.model
import torch
import yaml
from timm.utils import reparameterize_model

__all__ = ['ScriptError', 'find_script', 'run_script']

SOURCE = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'


class ScriptError(Exception):
    """A script that is not found, or arguments that cannot be right."""


def find_script(name: str, environ: Mapping[str, str] = os.environ, source: str = SOURCE) -> Path:
    """A script of timm by its path or bare name.

    Args:
        name: A path; or a name such as 'validate.py', looked for in the folder `$TIMM_SCRIPTS`, beside timm where timm
            is installed from a checkout, and in the user's cache, into which it is fetched from timm's repository at
            the installed version, whole or not at all.
        environ: Where TIMM_SCRIPTS and XDG_CACHE_HOME are looked up.
        source: Address of the repository's files: SOURCE/v1.0.31/validate.py.

    Raises:
        ScriptError: None of these ways leads to it.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).name != name:
        raise ScriptError(f'there is no script {name}')
    name = name if name.endswith('.py') else f'{name}.py'
    cache = Path(environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_smpconv' / f'timm-{timm.__version__}'
    folders = [Path(environ['TIMM_SCRIPTS'])] if environ.get('TIMM_SCRIPTS') else []
    checkout = Path(timm.__file__).parent.parent
    folders += [checkout] if (checkout / 'train.py').is_file() else []
    for folder in [*folders, cache]:
        if (folder / name).is_file():
            return folder / name
    url = f'{source}/v{timm.__version__}/{name}'
    try:
        _fetch(url, cache / name)
    except (OSError, HTTPException, SyntaxError, ValueError) as error:  # the last of null bytes
        raise ScriptError(
            f'{name} was not found. Give its path; or put the folder that holds it into TIMM_SCRIPTS; or install timm '
            f'from a checkout of its repository; or let it be fetched from {url}, which failed: {error}') from error
    return cache / name


def _fetch(url: str, path: Path) -> None:
    print(f'fetching {url}', file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as response:
        source = response.read()  # of one piece, so that a connection that ends early is an error
    if not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(ast.parse(source))):
        raise SyntaxError('not a script')  # but the page of a proxy
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f'.{os.getpid()}.part')
    try:
        part.write_bytes(source)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f'{len(source)} bytes in {path}', file=sys.stderr)


def run_script(path: Path, args: List[str]) -> None:
    """Run a script as `python PATH ARGS` would, with this package imported.

    Raises:
        ScriptError: The configuration or the folder of images among the arguments cannot be right.
    """
    check_arguments(path, args)
    before = sys.argv, sys.path[:], timm.utils.reparameterize_model
    sys.argv, sys.path[:] = [str(path), *args], [str(path.parent), *sys.path]
    timm.utils.reparameterize_model = timm.utils.model.reparameterize_model = _merge
    try:
        runpy.run_path(str(path), run_name='__main__')
    finally:
        sys.argv, sys.path[:], timm.utils.reparameterize_model = before
        timm.utils.model.reparameterize_model = before[2]


def _merge(model: torch.nn.Module, inplace: bool = False) -> torch.nn.Module:
    """What timm's scripts call for --reparam: before they call eval(), without which our modules refuse to merge."""
    return reparameterize_model(model.eval(), inplace=inplace)


def check_arguments(path: Path, args: List[str]) -> None:
    """Find what a script would notice late or never: unknown keys of a configuration, a folder that does not exist."""
    config = _value(args, '-c', '--config')
    settings: Dict[str, Any] = {}
    if config is not None:
        settings = read_recipe(Path(config), _options(path))
    folder = _value(args, '--data-dir') or settings.get('data_dir')
    named = _value(args, '--dataset') or settings.get('dataset') or ''
    if folder and not Path(folder).is_dir() and '/' not in named:
        raise ScriptError(f'--data-dir must be a folder that exists, got {folder}')


def read_recipe(path: Path, options: Set[str]) -> Dict[str, Any]:
    """The settings of a YAML file, all of which must be among a script's options."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScriptError(f'--config must be a YAML file that can be read, got {path}: {error}') from error
    if not isinstance(settings, dict):
        raise ScriptError(f'--config must be a YAML file of options and values, got {path}')
    unknown = sorted(str(key) for key in settings if key not in options)
    if options and unknown:
        raise ScriptError(f'--config must hold options of the script only, got {", ".join(unknown)} in {path}')
    return settings


def _value(args: List[str], *names: str) -> Optional[str]:
    for i, arg in enumerate(args):
        if arg in names and i + 1 < len(args):
            return args[i + 1]
        for name in names:
            if name.startswith('--') and arg.startswith(f'{name}='):
                return arg[len(name) + 1:]
    return None


def _options(path: Path) -> Set[str]:
    """The names under which a script keeps the arguments that it adds to its parsers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or getattr(node.func, 'attr', '') not in ('add_argument', 'add_bool_arg'):
            continue
        names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        dest = [k.value.value for k in node.keywords if k.arg == 'dest' and isinstance(k.value, ast.Constant)]
        long = [n for n in names if n.startswith('--')] or names
        if dest or long:
            found.add(dest[0] if dest else long[0].lstrip('-').replace('-', '_'))
    return found
