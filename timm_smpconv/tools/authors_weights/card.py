"""The model card that goes to the Hub with a folder of weights."""
import re
from typing import Any, Dict, Optional

import yaml

PAPER = 'https://arxiv.org/abs/2304.02330'


def model_card(model: str, tag: str, entry: Optional[Dict[str, Any]], facts: Dict[str, Any]) -> str:
    """Markdown with the header that the Hub reads.

    Args:
        model: 'smpconv_tiny'.
        tag: 'in1k'.
        entry: These weights' entry in sources.yaml, if there is one.
        facts: What was converted: 'parameters', 'merged', 'origin' (a phrase), 'published' (whether these are the
            weights whose top-1 the entry gives; None if not known), 'num_classes', 'input_size', 'difference', and
            'dataset' (of these weights, as sources.yaml has it; None if it has none of this tag).
    """
    repo_id = entry['hub_id'] if entry and not facts['merged'] else f'ORG/{model}.{tag}'
    channels, height, width = facts['input_size']
    images = height > 1
    dataset = facts['dataset'] or {'id': None, 'pipeline': 'image-classification' if images else None}
    header: Dict[str, Any] = {
        'library_name': 'timm',
        'license': entry['license'] if entry else None,
        'pipeline_tag': dataset['pipeline'],
        'tags': [word for word in (dataset['pipeline'], 'timm', 'smpconv', 'large-kernel') if word],
        'datasets': [dataset['id']] if dataset['id'] else None,
        'metrics': ['accuracy'] if facts['dataset'] else None,
    }
    header = {key: value for key, value in header.items() if value}
    size = f'{height}×{width}' if images else f'{width} samples'
    rows = [
        ('parameters', f'{facts["parameters"]:,}'),
        ('classes', facts['num_classes']),
        ('evaluation image size', size) if images else ('input, channels × samples', f'{channels}×{width}'),
    ]
    if entry:
        if 'input' in entry:
            rows.append(('what the network reads', entry['input']))
        if not facts['merged']:
            rows.append((f'GMACs at {size}', entry['gmacs']))
        rows.append((f'{entry["dataset"]["name"]} top-1 (%)', _top1(entry, facts['published'])))
    rows += [
        ('origin', facts['origin']),
        ('largest difference from the origin\'s logits', f'{facts["difference"]:.0e}, relative to the largest logit'),
    ]
    table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
    body = f'''# {model}.{tag}{" (merged)" if facts["merged"] else ""}

An SMPConv classification model ([CVPR 2023]({PAPER})). Its large convolution kernels are interpolated from points whose
positions are learned.{_MERGED if facts["merged"] else ""}

| | |
|---|---|
{table}

## Use

The model is in the package `timm-smpconv`; import it first:

```python
{(_IMAGES if images else _SERIES).format(repo_id=repo_id, channels=channels, samples=width)}```
{"" if facts["merged"] else _MERGE}
## Citation

```bibtex
@inproceedings{{kim2023smpconv,
  title     = {{SMPConv: Self-moving Point Representations for Continuous Convolution}},
  author    = {{Kim, Sanghyeon and Park, Eunbyung}},
  booktitle = {{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year      = {{2023}}
}}
```
'''
    return f'---\n{yaml.safe_dump(header, sort_keys=False)}---\n{body}'


_IMAGES = '''import timm
import timm_smpconv  # registers the models

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
'''

_SERIES = '''import timm
import torch
import timm_smpconv  # registers the models

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
series = torch.randn(1, {channels}, {samples})  # in place of your data: (batch, channels, samples)
with torch.inference_mode():
    logits = model(series)
'''

_MERGED = '''
Each large kernel, the small one beside it and all BatchNorms are merged into plain convolutions: the same logits,
faster. This model is for inference only and cannot be trained further.'''

_MERGE = '''
For deployment, merge each large kernel with the small one beside it and all BatchNorms. The logits stay the same:

```python
merged = timm.utils.reparameterize_model(model)
```
'''


def _top1(entry: Dict[str, Any], published: Optional[bool]) -> str:
    if published:
        return f'{entry["top1"]} {entry["top1_source"]}; not re-measured'
    if published is None:
        return f'{entry["top1"]} {entry["top1_source"]}; not verified to be that checkpoint; accuracy not re-measured'
    return f'not measured for these weights; {entry["top1"]} {entry["top1_source"]}'


def with_address(card: str, repo_id: str) -> str:
    """The card with the repository's name in the line that loads the model."""
    return re.sub(r'"hf-hub:[^"]+"', f'"hf-hub:{repo_id}"', card)
