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
            weights whose top-1 the entry gives; None if not known), 'num_classes', 'input_size', 'difference'.
    """
    repo_id = entry['hub_id'] if entry and not facts['merged'] else f'ORG/{model}.{tag}'
    on_imagenet = tag.startswith('in1k')
    header = {
        'library_name': 'timm',
        **({'license': entry['license']} if entry else {}),
        'pipeline_tag': 'image-classification',
        'tags': ['image-classification', 'timm', 'smpconv', 'large-kernel'],
    }
    if on_imagenet:
        header.update(datasets=['imagenet-1k'], metrics=['accuracy'])
    rows = [
        ('parameters', f'{facts["parameters"]:,}'),
        ('classes', facts['num_classes']),
        ('evaluation image size', '×'.join(str(n) for n in facts['input_size'][1:])),
    ]
    if entry:
        if not facts['merged']:
            rows.append(('GMACs at 224×224', entry['gmacs']))
        rows.append(('ImageNet-1k top-1 (%)', _top1(entry, facts['published'])))
    rows += [
        ('origin', facts['origin']),
        ('largest difference from the origin\'s logits', f'{facts["difference"]:.0e}, relative to the largest logit'),
    ]
    table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
    body = f'''# {model}.{tag}{" (merged)" if facts["merged"] else ""}

An SMPConv image classification model ([CVPR 2023]({PAPER})). Its large convolution
kernels are interpolated from points whose positions are learned.{_MERGED if facts["merged"] else ""}

| | |
|---|---|
{table}

## Use

The model is in the package `timm-smpconv`; import it first:

```python
import timm
import timm_smpconv  # registers the models

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
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


_MERGED = '''
Each large kernel, its parallel 5×5 branch and all BatchNorms are merged into plain convolutions: the same logits,
faster. This model is for inference only and cannot be trained further.'''

_MERGE = '''
For deployment, merge each large kernel with its parallel 5×5 branch and all BatchNorms. The logits stay the same:

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
