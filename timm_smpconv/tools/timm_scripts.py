"""Runs timm's own scripts, which its wheel does not contain, with this package's models and optimizers registered."""
import argparse
import os
import runpy
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, List, Mapping, Set
from unittest import mock

import timm
import yaml

from ._files import write_whole

__all__ = ['ScriptError', 'find_script', 'run_script']

SOURCE = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'


class ScriptError(Exception):
    """A script was not found or is not Python code, or its configuration is wrong."""


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
        ScriptError: The script was not found.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix('.py')
    if not stem.isidentifier():
        raise ScriptError(f"SCRIPT must be a file or the name of one of timm's scripts, got {name!r}")
    name = f'{stem}.py'
    if environ.get('TIMM_SCRIPTS'):
        path = Path(environ['TIMM_SCRIPTS'], name)
        if not path.is_file():
            raise ScriptError(f'TIMM_SCRIPTS must name a folder that holds {name}, got {environ["TIMM_SCRIPTS"]}')
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
        raise ScriptError(
            f'{name} was not found, and could not be downloaded from {url}: {error}. Give its path, set TIMM_SCRIPTS '
            'to the folder that holds it, or install timm from a checkout of its repository') from error
    return cache / name


def _download(url: str, path: Path) -> None:
    print(f'downloading {url}', file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as response:
        source = response.read()  # in one piece: raises if the connection ends early
    compile(source, url, 'exec')
    if b'import ' not in source:
        raise SyntaxError('not a script')  # but a page of a proxy, say
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, source)
    print(f'{len(source)} bytes in {path}', file=sys.stderr)


def run_script(path: Path, args: List[str]) -> None:
    """Run a script as `python PATH ARGS` would, with this package imported.

    There is one difference: unknown or duplicate keys in a YAML configuration, such as the one that timm's train.py
    reads for `-c FILE`, raise. The script alone would ignore a misspelled option and train without it.

    Raises:
        ScriptError: The script is not Python code, or its configuration is wrong.
    """
    try:
        compile(path.read_bytes(), path, 'exec')
    except (OSError, SyntaxError, ValueError) as error:
        raise ScriptError(f'SCRIPT must be a file of Python code, got {path}: {error}') from error
    with (
        mock.patch.object(sys, 'argv', [str(path), *args]),
        mock.patch.object(sys, 'path', [str(path.parent), *sys.path]),
        mock.patch.object(argparse.ArgumentParser, 'set_defaults', _set_known_defaults),
        mock.patch.object(yaml, 'SafeLoader', _UniqueKeyLoader),
        mock.patch.object(_UniqueKeyLoader, 'keys', set()),
    ):
        try:
            runpy.run_path(str(path), run_name='__main__')
        except yaml.YAMLError as error:
            raise ScriptError(f'a configuration must be a YAML file with unique keys, got: {error}') from error


_set_defaults = argparse.ArgumentParser.set_defaults


def _set_known_defaults(parser: argparse.ArgumentParser, /, **settings: Any) -> None:
    """`ArgumentParser.set_defaults`, to which timm's train.py passes its configuration.

    Refuses names that were read from a YAML file and are not options of the parser.
    """
    options = {action.dest for action in parser._actions}  # argparse has no public list of them
    unknown = sorted(name for name in settings if name not in options and name in _UniqueKeyLoader.keys)
    if unknown:
        raise ScriptError(f'a configuration must hold options of the script only, got {", ".join(unknown)}')
    _set_defaults(parser, **settings)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which `yaml.SafeLoader` accepts against the specification, and remembers all keys."""
    keys: ClassVar[Set[str]] = set()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f'duplicate key {key.value!r}', key.start_mark)
                seen.add((key.tag, key.value))
                self.keys.add(key.value)
        return node
