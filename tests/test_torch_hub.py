"""torch.hub from a plain checkout, and the side effects of importing the package, each in a new process."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODELS

ROOT = Path(__file__).parent.parent


def python(code, cwd):
    """Run code in a process that does not find the package by itself."""
    return subprocess.run([sys.executable, '-I', '-c', code], cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.fixture
def checkout(tmp_path):
    repo = tmp_path / 'checkout'
    repo.mkdir()
    shutil.copy(ROOT / 'hubconf.py', repo)
    shutil.copytree(ROOT / 'timm_smpconv', repo / 'timm_smpconv', ignore=shutil.ignore_patterns('__pycache__'))
    return repo


def test_hub_loads_from_a_plain_checkout(checkout, tmp_path):
    code = f'''
import sys, torch
repo = {str(checkout)!r}
model = torch.hub.load(repo, "smpconv_mobile31", source="local", num_classes=5)
assert sys.modules["timm_smpconv"].__file__.startswith(repo), sys.modules["timm_smpconv"].__file__
assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
sys.path.insert(0, repo)
import hubconf  # torch.hub lists every callable of this module
assert sorted(n for n, f in vars(hubconf).items() if callable(f)) == {sorted(MODELS)!r}
'''
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_importing_is_silent_reads_no_file_and_needs_no_triton_nor_gpu():
    code = f'''
import sys
sys.modules['triton'] = None  # as if it were not installed
import timm
before = set(sys.modules)
sys.path.insert(0, {str(ROOT)!r})
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import timm_smpconv
assert timm.is_model("smpconv_tiny") and "smpconv_tiny.in1k" in timm.list_models(pretrained=True)
assert not [path for path in opened if not path.isdigit() and not path.endswith(".py") and "__pycache__" not in path]
new = set(sys.modules) - before - {{"torch.utils.flop_counter", "torch.utils.module_tracker"}}
packages = {{name.partition(".")[0] for name in new}}
assert packages <= {{"timm_smpconv", "timm"}}, new  # timm.optim is not imported by timm
'''
    result = python(code, '/')
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ''
