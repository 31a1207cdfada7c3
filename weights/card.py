"""The model card: README.md of a repository of weights."""
import re
from typing import Any, Dict, Mapping, Optional

import yaml

PAPER = 'https://arxiv.org/abs/2304.02330'
# The image of timm's own cards.
IMAGE = '"huggingface/documentation-images", "beignets-task-guide.png", repo_type="dataset"'


def model_card(model: str, tag: str, entry: Optional[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Markdown with the header that the Hub reads. The repository is ORG/model.tag until `with_address` names it.

    Args:
        model: 'smpconv_tiny'.
        tag: 'in1k'.
        entry: These weights' entry in sources.yaml, if there is one.
        facts: What was converted: 'parameters', 'merged', 'origin' (a phrase), 'published' (whether these are the
            weights whose top-1 the entry gives; None if not known), 'license', 'num_classes', 'num_features',
            'labels' (whether config.json names the classes), 'input_size', 'difference', and 'dataset' (of these
            weights, as sources.yaml has it; None if it has none of this tag).
    """
    channels, height, width = facts['input_size']
    images = height > 1
    dataset = facts['dataset'] or {'id': None, 'pipeline': 'image-classification' if images else None}
    header: Dict[str, Any] = {
        'library_name': 'timm',
        'license': facts['license'],
        'pipeline_tag': dataset['pipeline'],
        'tags': [word for word in (dataset['pipeline'], 'timm', 'transformers', 'smpconv', 'large-kernel') if word],
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
    repo_id = f'ORG/{model}.{tag}{"-merged" if facts["merged"] else ""}'
    uses = [_USES, '' if facts['merged'] else _MERGE, _TRANSFORMERS if images and channels == 3 else '']
    names = 'model.pretrained_cfg["label_names"][label]' if facts['labels'] else 'int(label)'
    code = ''.join(uses).format(
        repo_id=repo_id, load=(_LOAD_IMAGE if images else _LOAD_SERIES).format(
            image=IMAGE, mode='RGB' if channels == 3 else 'L', channels=channels, samples=width),
        prepare=_PREPARE_IMAGE if images else '', image=IMAGE, top=min(5, facts['num_classes']), label=names,
        num_features=facts['num_features'], or_load=f', or load `{repo_id}-merged`' if entry else '')
    return f'''---
{yaml.safe_dump(header, sort_keys=False)}---
# {model}.{tag}{" (merged)" if facts["merged"] else ""}

An SMPConv classification model ([CVPR 2023]({PAPER})). Its large convolution kernels are interpolated from points whose
positions are learned.{_MERGED if facts["merged"] else ""}

| | |
|---|---|
{table}
{code}
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


_USES = '''
The model is in the package timm-smpconv:

```
pip install timm-smpconv
```

## Classify

```python
{load}
model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
{prepare}with torch.inference_mode():
    probabilities = model(x).softmax(1)[0]
for probability, label in zip(*probabilities.topk({top})):
    print(f"{{probability:.1%}}", {label})
```

## Feature maps

```python
{load}
model = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True).eval()
{prepare}with torch.inference_mode():
    for features in model(x):
        print(features.shape)
```

## Embeddings

```python
{load}
model = timm.create_model("hf-hub:{repo_id}", pretrained=True, num_classes=0).eval()
{prepare}with torch.inference_mode():
    embeddings = model(x)  # (1, {num_features})
```
'''

_LOAD_IMAGE = '''import timm
import timm_smpconv  # registers the models
import torch
from huggingface_hub import hf_hub_download
from PIL import Image

image = Image.open(hf_hub_download({image})).convert("{mode}")'''

_PREPARE_IMAGE = '''transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
x = transform(image).unsqueeze(0)
'''

_LOAD_SERIES = '''import timm
import timm_smpconv  # registers the models
import torch

x = torch.randn(1, {channels}, {samples})  # in place of your data: (batch, channels, samples)'''

_MERGED = '''
Each large kernel, the small one beside it and all BatchNorms are merged into plain convolutions: the same logits,
faster. This model is for inference only and cannot be trained further.'''

_MERGE = '''
## Deployment

Merge each large kernel with the small one beside it and all BatchNorms{or_load}. The logits stay the same:

```python
import timm
import timm_smpconv  # registers the models

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
merged = timm.utils.reparameterize_model(model)
```
'''

_TRANSFORMERS = '''
## transformers

`modeling_smpconv.py` in this repository imports the package and nothing else:

```python
from huggingface_hub import hf_hub_download
from transformers import AutoModelForImageClassification, pipeline

classify = pipeline("image-classification", model="{repo_id}", trust_remote_code=True)
print(classify(hf_hub_download({image})))
model = AutoModelForImageClassification.from_pretrained("{repo_id}", trust_remote_code=True)
```
'''


def _top1(entry: Mapping[str, Any], published: Optional[bool]) -> str:
    whose = "for the authors' checkpoint (arXiv 2304.02330)" if entry['origin'] else (
        '(arXiv 2304.02330) for weights that are not public')
    top1 = f'{entry["top1"]} as published {whose}'
    if published:
        return f'{top1}; not re-measured'
    if published is None:
        return f'{top1}; not verified to be that checkpoint; accuracy not re-measured'
    return f'not measured for these weights; {top1}'


def with_address(card: str, repo_id: str) -> str:
    """The card with the repository's name wherever it loads the model."""
    found = re.search(r'"hf-hub:([^"]+)"', card)
    return card.replace(found[1], repo_id) if found else card
