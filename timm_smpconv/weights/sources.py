"""sources.yaml, the list of weights. Also the files of a folder of weights."""
from pathlib import Path
from typing import Any, Dict

import yaml

FILES = ('README.md', 'config.json', 'model.safetensors')  # of a folder that is converted and published
SOURCES = Path(__file__).parent / 'sources.yaml'


def load_sources(path: Path = SOURCES) -> Dict[str, Dict[str, Any]]:
    """model.tag → its entry.

    Example:
        >>> load_sources()['smpconv_tiny.in1k']['license']
        'mit'
    """
    return yaml.safe_load(path.read_text(encoding='utf-8'))
