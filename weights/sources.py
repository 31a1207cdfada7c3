"""sources.yaml: reading it, and recording what became known without losing its comments; and the files of a folder."""
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Dict

import yaml

FILES = ('README.md', 'config.json', 'model.safetensors')  # of a folder that convert.py writes and publish.py uploads
SOURCES = Path(__file__).parent / 'sources.yaml'


def load_sources(path: Path = SOURCES) -> Dict[str, Dict[str, Any]]:
    """model.tag → its entry."""
    return yaml.safe_load(path.read_text())


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def record(path: Path, name: str, values: Dict[str, str]) -> None:
    """Write values into an entry: all of them or none.

    Raises:
        KeyError: There is no such entry or key.
    """
    lines = path.read_text().splitlines(keepends=True)
    at = {}  # key of the entry → its line
    inside = False
    for i, line in enumerate(lines):
        if line.strip() and not line.startswith(' '):
            inside = line.startswith(f'{name}:')
        elif inside and (match := re.match(r'  (\w+):', line)):
            at[match[1]] = i
    for key, value in values.items():
        lines[at[key]] = f'  {key}: {value}\n'
    part = path.with_suffix(f'.{os.getpid()}.part')
    part.write_text(''.join(lines))
    part.replace(path)
