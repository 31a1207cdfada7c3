"""The README's Python blocks, run in order in one process, and the figures of its table."""
import re
from pathlib import Path

import timm
import torch
from conftest import MODELS, difference
from reference import authors_state_dict

README = (Path(__file__).parent.parent / 'README.md').read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict_ema': authors_state_dict('smpconv_tiny')}, 'SMPConv_T.pth')
    names, engines = {}, 0
    for block in re.findall(r'```python\n(.*?)```', README, re.S):
        exec(compile(block, 'README.md', 'exec'), names)
        if 'logits' in names:  # eager, compiled, OpenVINO, ONNX Runtime
            with torch.no_grad():
                assert difference(names.pop('logits'), names['merged'](names['image'])) < 1e-4
            engines += 1
    assert engines == 4
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(names['again'].eval()(image), names['merged'](image), atol=1e-5)
    assert names['theirs'].num_classes == 1000
    assert (tmp_path / 'smpconv_tiny.onnx').exists()


def test_table_names_every_model_and_its_parameters():
    rows = dict(re.findall(r'\| `(smpconv_\w+)` \| [\d.]+ \| ([\d,]+) \|', README))
    assert rows.keys() == set(MODELS)
    for name, parameters in rows.items():
        model = timm.create_model(name, device='meta')
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(',', ''))
