"""The README's Python blocks, run in order in one process, and the figures of its table."""
import re
from pathlib import Path

import convert
import publish
import timm
import torch
import torch._inductor.config
from conftest import MODELS, difference
from huggingface_hub import HfApi, constants
from reference import authors_state_dict
from test_weights import unpublished

from timm_smpconv import pretrained

README = (Path(__file__).parent.parent / 'README.md').read_text()


def command(script):
    """The arguments that the README gives a script."""
    (line,) = re.findall(rf'^python {script} (.*)$', README, re.MULTILINE)
    return line.split()


def test_python_blocks_run(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    torch.save({'state_dict_ema': authors_state_dict('smpconv_tiny')}, 'SMPConv_T.pth')
    monkeypatch.setattr(pretrained, 'BUILT_IN', dict.fromkeys(pretrained.BUILT_IN))  # whatever was published
    unpublished(tmp_path / 'sources.yaml')
    assert convert.main([*command('weights/convert.py'), '--sources', 'sources.yaml']) == 0
    HfApi(endpoint=server.url, token='hf_writer').create_repo('timm-smpconv/smpconv_tiny.in1k')
    HfApi(endpoint=server.url, token='hf_writer').upload_folder(
        repo_id='timm-smpconv/smpconv_tiny.in1k', folder_path='smpconv_tiny.in1k')
    assert publish.main(command('weights/publish.py') + ['--dry-run']) == 0
    names, engines = {}, 0
    with torch._inductor.config.patch(freezing=False):  # puts back what the README sets
        for block in re.findall(r'```python\n(.*?)```', README, re.DOTALL):
            exec(compile(block, 'README.md', 'exec'), names)
            if 'logits' in names:  # eager, prepacked, compiled, OpenVINO, ONNX Runtime
                with torch.no_grad():
                    assert difference(names.pop('logits'), names['merged'](names['image'])) < 1e-4
                engines += 1
    assert engines == 5
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(names['again'].eval()(image), names['merged'](image), atol=1e-5)
    for name in ('pretrained', 'theirs'):
        for key, value in names['converted'].state_dict().items():
            assert torch.equal(names[name].state_dict()[key], value), (name, key)
    assert (tmp_path / 'smpconv_tiny.onnx').exists()


def test_table_names_every_model_and_its_parameters():
    rows = dict(re.findall(r'\| `(smpconv_\w+)` \| [\d.]+ \| ([\d,]+) \|', README))
    assert rows.keys() == set(MODELS)
    for name, parameters in rows.items():
        model = timm.create_model(name, device='meta')
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(',', ''))
