"""The table of weights, sources.yaml, against the models and what the registry of timm has of them."""
import re

import pytest
import timm
from conftest import MODELS
from test_models import macs

from timm_smpconv.training.recipes import recipe_names
from timm_smpconv.weights.hub import load_sources

DRIVE = r'https://drive\.google\.com/file/d/[\w-]{33}'


@pytest.mark.parametrize('name', MODELS)
def test_an_entry(name):
    cfg = timm.get_pretrained_cfg(name)
    entry = load_sources()[f'{name}.{cfg.tag}']
    keys = [key for key in entry if key != 'input']  # which some have, for the card
    assert keys == ['top1', 'gmacs', 'dataset', 'origin', 'hub_id', 'commit', 'sha256']
    assert [*entry['dataset']] == ['name', 'id', 'pipeline']
    assert entry['gmacs'] == round(macs(timm.create_model(name, device='meta').eval(), cfg.input_size) / 1e9, 3)
    assert cfg.has_weights if entry['origin'] or entry['sha256'] else name in recipe_names()
    if entry['origin']:
        assert [*entry['origin']] == ['file', 'bytes', 'sha256'] and re.fullmatch(DRIVE, entry['origin']['file'])
    assert len({entry[key] is None for key in ('hub_id', 'commit', 'sha256')}) == 1  # published or not
    for key, length in (('commit', 40), ('sha256', 64)):
        assert entry[key] is None or re.fullmatch(f'[0-9a-f]{{{length}}}', entry[key])


def test_every_model_has_an_entry():
    assert sorted(load_sources()) == sorted(f'{name}.{timm.get_pretrained_cfg(name).tag}' for name in MODELS)
