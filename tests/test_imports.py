"""Who may import whom: a room imports only the rooms named here, and hides no import of the package in a function."""
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'timm_smpconv'
ROOMS = {
    '_errors.py': set(), '_files.py': set(),  # below all
    'ops': set(),
    'layers': {'ops'},
    'weights': set(),
    'models': {'ops', 'layers', 'weights'},
    'surgery': {'ops', 'layers'},
    'training': {'ops', 'layers', 'weights', 'models', 'optim'},
    'optim.py': {'layers'},
    '__init__.py': {'ops', 'layers', 'models', 'surgery', 'optim', 'weights'},
}
LAZY = PACKAGE / 'ops' / 'backends' / 'triton' / 'backend.py'  # Triton need not be installed


def imports(path):
    """(what is imported of the package, whether at the top of the file); '' is the package itself."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = '.'.join([*here[:len(here) + 1 - node.level], *filter(None, [node.module])])
            for name in [module] if module else [alias.name for alias in node.names]:
                yield name.partition('.')[0], node in tree.body
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, 'module', None)] + [alias.name for alias in node.names]
            assert not any((name or '').partition('.')[0] == 'timm_smpconv' for name in names), path


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_imports_what_it_may(room):
    files = [PACKAGE / room] if room.endswith('.py') else list((PACKAGE / room).rglob('*.py'))
    assert files
    found = {(name, path) for path in files for name, _ in imports(path)}
    allowed = ROOMS[room] | {'_errors', '_files', room}
    assert {(name, path) for name, path in found if name not in allowed} == set()
    assert all(at_top for path in files if path != LAZY for _, at_top in imports(path))


def test_every_room_is_listed():
    rooms = {path.name for path in PACKAGE.iterdir() if path.suffix == '.py' or path.is_dir()} - {'__pycache__'}
    assert rooms - set(ROOMS) == {'__main__.py', 'tools'}
