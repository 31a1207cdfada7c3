"""Runs timm's own scripts, which its wheel does not contain, with this package's models and optimizers registered."""
import os
import runpy
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import List, Mapping

import timm

from .._errors import DataError
from .._files import written_beside

__all__ = ['find_script', 'run_script']

SOURCE = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'


def find_script(name: str, environ: Mapping[str, str] = os.environ, source: str = SOURCE) -> Path:
    """Find one of timm's scripts by its path or name.

    A name such as 'validate.py' is looked up in the folder `$TIMM_SCRIPTS` and nowhere else if that is set. Otherwise
    it is looked up beside timm, where timm is installed from a checkout, then in the user's cache. A script that is in
    neither is downloaded into the cache from timm's repository at the installed version.

    Args:
        name: A path, or a name with or without '.py'.
        environ: Gives TIMM_SCRIPTS and XDG_CACHE_HOME.
        source: Address of the repository's files; SOURCE/v1.0.31/validate.py is one.

    Raises:
        ValueError: No script has such a name.
        DataError: The script was not found.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix('.py')
    if not stem.isidentifier():
        raise ValueError(f"SCRIPT must be a file or the name of one of timm's scripts, got {name!r}")
    name = f'{stem}.py'
    if environ.get('TIMM_SCRIPTS'):
        path = Path(environ['TIMM_SCRIPTS'], name)
        if not path.is_file():
            raise DataError(f'TIMM_SCRIPTS must name a folder that holds {name}, got {environ["TIMM_SCRIPTS"]}')
        return path
    checkout = Path(timm.__file__).parent.parent
    cache = Path(environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_smpconv' / f'timm-{timm.__version__}'
    for folder in ([checkout] if (checkout / 'train.py').is_file() else []) + [cache]:
        if (folder / name).is_file():
            return folder / name
    url = f'{source}/v{timm.__version__}/{name}'
    try:
        _download(url, cache / name)
    except (OSError, HTTPException, SyntaxError, ValueError) as error:  # ValueError: null bytes
        raise DataError(
            f'{name} was not found, and could not be downloaded from {url}: {error}. Give its path, set TIMM_SCRIPTS '
            'to the folder that holds it, or install timm from a checkout of its repository') from error
    return cache / name


def _download(url: str, path: Path) -> None:
    print(f'downloading {url}', file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as response:
        source = response.read()  # in one piece: torch.hub's download does not notice if the connection ends early
    compile(source, url, 'exec')  # raises for a proxy's page, say
    with written_beside(path.parent) as new:
        (new / path.name).write_bytes(source)
    print(f'{len(source)} bytes in {path}', file=sys.stderr)


def run_script(path: Path, args: List[str]) -> None:
    """Run a script as `python PATH ARGS` would, with this package imported. Sets `sys.argv` and `sys.path` for it."""
    sys.argv = [str(path), *args]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name='__main__')
