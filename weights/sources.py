"""sources.yaml: reading it, and recording what became known without losing its comments; and the files of a folder."""
import os
import re
from pathlib import Path
from typing import Any, Dict

import yaml
from huggingface_hub.utils.sha import sha_fileobj

FILES = ('README.md', 'config.json', 'model.safetensors')  # of a folder that convert.py writes and publish.py uploads
SOURCES = Path(__file__).parent / 'sources.yaml'


def load_sources(path: Path = SOURCES) -> Dict[str, Dict[str, Any]]:
    """model.tag → its entry."""
    return yaml.safe_load(path.read_text())


def file_sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex()


def record(path: Path, name: str, values: Dict[str, str]) -> None:
    """Write values into an entry, by keys such as 'sha256' and 'origin.sha256'; all of them or none.

    Raises:
        KeyError: There is no such entry or key.
    """
    lines = path.read_text().splitlines(keepends=True)
    for key, value in values.items():
        lines[_find(lines, name, *key.split('.'))] = f'{"  " * (1 + key.count("."))}{key.split(".")[-1]}: {value}\n'
    part = path.with_suffix(f'.{os.getpid()}.part')
    part.write_text(''.join(lines))
    part.replace(path)


def _find(lines, *keys):
    start = 0
    for depth, key in enumerate(keys):
        indent = '  ' * depth
        for i in range(start, len(lines)):
            if re.match(rf'{indent}{re.escape(key)}:', lines[i]):
                break
            if depth and not lines[i].startswith(indent):  # the entry has ended
                i = len(lines)
                break
        else:
            i = len(lines)
        if i == len(lines):
            raise KeyError('.'.join(keys))
        start = i + 1
    return start - 1
