"""Private names of timm and huggingface_hub: without them the package still imports and works."""
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Refuses to our modules every private module and name of both libraries, as if the next release had moved them.
WITHOUT_PRIVATE_NAMES = '''
import builtins, logging, re
import huggingface_hub, timm.optim
logging.basicConfig(format='%(message)s')
original, refused = builtins.__import__, []

def without_private(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get('__name__', '')
    private = re.search(r'\\b_|\\bsha\\b', '.'.join([name, *(fromlist or ())]))
    if level == 0 and importer.startswith('timm_smpconv') and name.startswith(('timm.', 'huggingface_hub')) and private:
        refused.append(name)
        raise ImportError(f'no module named {name}')
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = without_private
import timm_smpconv, timm_smpconv.training.recipes.cifar10, torch
from timm_smpconv.__main__ import main
args = dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), kernel_sizes=(5, 5, 5, 5), num_classes=2)
model = timm.create_model('smpconv_tiny', **args)
features = model.forward_intermediates(torch.randn(2, 3, 32, 32), indices=[1, -1], intermediates_only=True)
print([tuple(f.shape) for f in features])
optimizer = timm_smpconv.SMPAdamW(model.parameters())
features[-1].sum().backward()
optimizer.step()
try:
    timm.optim.create_optimizer_v2(model, 'smpadamw')
except ValueError as error:
    print('timm says:', error)
print(sorted(set(refused)))
'''


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_private_names_are_imported_in_two_files():
    found = sorted(
        (path.name, name) for folder in ('timm_smpconv', 'weights') for path in (ROOT / folder).rglob('*.py')
        for name in imported_names(path) if re.match(r'timm\..*\b_|huggingface_hub\..*(\b_|\bsha\b)', name))
    assert found == [
        ('cifar10.py', 'timm.data.dataset_factory._TORCH_BASIC_DS'),
        ('optim.py', 'timm.optim._optim_factory.default_registry')]


def test_without_them_the_package_works_and_says_what_is_missing():
    result = subprocess.run([sys.executable, '-c', WITHOUT_PRIVATE_NAMES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shapes, timm_says, refused = result.stdout.splitlines()
    assert shapes == '[(2, 4, 4, 4), (2, 8, 1, 1)]'
    assert timm_says.startswith('timm says: ') and 'smpadamw' in timm_says
    assert refused == "['timm.data.dataset_factory', 'timm.optim._optim_factory']"
    assert 'timm has no dataset torch/cifar10_padded: its table of datasets was not found' in result.stderr
    for name, optimizer in (('smpadamw', 'SMPAdamW'), ('smpadam', 'SMPAdam')):
        assert f'timm has no optimizer named {name}: its registry was not found' in result.stderr
        assert f'Use the class {optimizer} instead' in result.stderr
