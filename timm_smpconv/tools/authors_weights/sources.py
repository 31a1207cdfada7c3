"""Records in sources.yaml without losing its comments."""
import re
from pathlib import Path
from typing import Dict

from .._files import write_whole

__all__ = ['record']


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
