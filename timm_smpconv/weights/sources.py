"""sources.yaml: reads it, and records in it without losing its comments. Also the files of a folder of weights."""
import re
from pathlib import Path
from typing import Any, Dict

import yaml

from ..files import write_whole

FILES = ('README.md', 'config.json', 'model.safetensors')  # of a folder that is converted and published
SOURCES = Path(__file__).parent / 'sources.yaml'
KEYS = (
    'model', 'tag', 'origin', 'license', 'parameters', 'gmacs', 'top1', 'top1_source', 'dataset', 'hub_id', 'sha256',
    'commit')
PARTS = {'origin': ('page', 'file', 'weights', 'bytes', 'sha256'), 'dataset': ('name', 'id', 'pipeline')}


class SourcesError(Exception):
    """`sources` is not such a file."""


def load_sources(path: Path = SOURCES) -> Dict[str, Dict[str, Any]]:
    """model.tag → its entry.

    Raises:
        SourcesError: The file cannot be read, or an entry lacks one of KEYS or has a wrong one.
    """
    rule = f'sources must be a YAML file that gives {", ".join(KEYS)} for each MODEL.TAG, got {path}'
    try:
        entries = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SourcesError(f'{rule}, which could not be read: {" ".join(str(error).split())}') from error
    if not isinstance(entries, dict):
        raise SourcesError(f'{rule} with {"nothing" if entries is None else f"a {type(entries).__name__}"} in it')
    for name, entry in entries.items():
        missing = [key for key in KEYS if key not in entry] if isinstance(entry, dict) else KEYS
        if missing:
            raise SourcesError(f'{rule}, where {name} lacks {", ".join(missing)}')
        for part, keys in PARTS.items():
            given = entry[part]
            lacking = [key for key in keys if not (isinstance(given, dict) and key in given)]
            if lacking and (given or part == 'dataset'):
                raise SourcesError(f'{rule}, where the {part} of {name} lacks {", ".join(lacking)}')
        if not isinstance(entry['hub_id'], str):
            raise SourcesError(f'{rule}, where the hub_id of {name} is {entry["hub_id"]!r}')
    return entries


def record(path: Path, name: str, values: Dict[str, str]) -> None:
    """Write values into an entry: all of them or none.

    Raises:
        KeyError: There is no such entry or key.
    """
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    at = {}  # key of the entry → its line
    inside = False
    for i, line in enumerate(lines):
        if line.strip() and not line.startswith(' '):
            inside = line.startswith(f'{name}:')
        elif inside and (match := re.match(r'  (\w+):', line)):
            at[match[1]] = i
    for key, value in values.items():
        lines[at[key]] = f'  {key}: {value}\n'
    write_whole(path, ''.join(lines).encode())
