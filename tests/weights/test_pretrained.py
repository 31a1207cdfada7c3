"""`pretrained=True` and what an overlay, a folder or a repository names: weights, classifier and channels."""
import hashlib
import logging

import pytest
import torch
from conftest import SMALL, difference, small_model
from hub_server import Repository
from test_checkpoint import load, load_small, same, save_as_the_authors_do
from timm.models import load_checkpoint
from timm.utils import reparameterize_model

from timm_smpconv.weights.hub import file_sha256


def test_a_features_only_model_says_what_loads(file, model, caplog):
    """`create_model(…, checkpoint_path=FILE)` loads into timm's wrapper, whose names are others."""
    features = small_model(features_only=True, shake=False)
    with pytest.raises(RuntimeError, match='Missing key'):
        load_checkpoint(features, file)
    assert 'pretrained=True, pretrained_cfg_overlay=dict(file=FILE)' in caplog.text
    caplog.clear()
    features.load_state_dict(small_model(features_only=True).state_dict())
    for kind in ('getter', 'fx'):
        small_model(features_only=True, feature_cls=kind).load_state_dict(
            small_model(features_only=True, feature_cls=kind).state_dict())
    assert 'pretrained_cfg_overlay' not in caplog.text
    works = load_small(dict(file=file), features_only=True)
    assert torch.equal(works.stages_0.blocks[0].norm.weight, model.stages[0].blocks[0].norm.weight)


@pytest.fixture
def said(caplog):
    """The warnings about classifiers that were logged so far."""
    caplog.set_level(logging.WARNING, 'timm_smpconv')
    return lambda: [r.getMessage() for r in caplog.records if 'keeps its initial weights' in r.getMessage()]


def test_the_classifier_of_a_file_is_loaded_if_the_model_has_as_many_classes(tmp_path, file, model, authors, said):
    theirs = save_as_the_authors_do(tmp_path / 'theirs.pth', authors)
    for overlay in dict(file=file), dict(file=theirs), dict(state_dict=model.state_dict()):
        for classes in 10, None:
            assert same(load_small(overlay, num_classes=classes).state_dict(), model.state_dict())
    merged = reparameterize_model(model)
    torch.save(merged.state_dict(), tmp_path / 'merged.pth')
    assert same(
        load_small(dict(file=str(tmp_path / 'merged.pth')), inference_mode=True).state_dict(), merged.state_dict())
    assert not said()


def test_other_channels(file, model, said):
    gray = load_small(dict(file=file), in_chans=1)  # timm sums the first convolution over its input channels
    x = torch.ones(1, 3, 32, 32)
    assert difference(gray(x[:, :1]), model(x)) < 1e-5 and not said()


@pytest.mark.parametrize('kwargs,overlay,message', [
    (
        dict(num_classes=5), {},
        '(num_classes=5) is not loaded and keeps its initial weights: FILE has 10 classes, and pretrained_cfg has '
        'num_classes=10'),
    (dict(num_classes=10), dict(num_classes=-1), 'FILE has 10 classes, and pretrained_cfg has num_classes=-1'),
    (dict(num_classes=None), dict(num_classes=-1), '(num_classes=default) is not loaded'),  # what train.py passes
    (dict(num_classes=0), {}, None),
    (dict(features_only=True), {}, None),
])
def test_a_classifier_that_is_not_loaded_is_logged(kwargs, overlay, message, file, model, images, said):
    twin = load_small(dict(file=file, **overlay), **kwargs)
    features = twin(images)[-1] if 'features_only' in kwargs else twin.forward_features(images)
    assert torch.equal(features, model.forward_features(images))
    if message:
        (warning,) = said()
        assert message.replace('FILE', file) in warning
    else:
        assert not said()


def test_a_file_without_classifier(file, model, said):
    torch.save({k: v for k, v in model.state_dict().items() if 'head.fc' not in k}, file)
    assert load_small(dict(file=file)).num_classes == 10
    assert f'{file} has 0 classes, and pretrained_cfg has num_classes=1000' in said()[0]
    with pytest.raises(RuntimeError, match=r'Missing key.*"head\.fc\.weight", "head\.fc\.bias"'):
        load_small(dict(file=file), num_classes=1000)


REPO = 'alice/small'


@pytest.fixture
def hub(server, folder):
    """That folder on a Hub."""
    server.repositories[REPO] = repository = Repository(private=False)
    repository.commit('main', 'small', {
        path.name: repository.store(path.read_bytes(), large=path.suffix != '.json') for path in folder.iterdir()})


@pytest.mark.parametrize('source,overlay', [
    ('smpconv_tiny', 'file'), ('smpconv_tiny', 'url'), ('hub', 'file'), ('hub', 'url'), ('hub', 'state_dict'),
    ('folder', 'file'), ('folder', 'url'),
])
def test_what_an_overlay_names_is_loaded(source, overlay, file, folder, hub, tmp_path, model, images):
    name = {'hub': f'hf-hub:{REPO}', 'folder': f'local-dir:{folder}'}.get(source, source)
    value = {'file': file, 'url': f'file://{file}', 'state_dict': model.state_dict()}[overlay]
    twin = load(name, overlay={overlay: value, 'num_classes': 10}, cache_dir=tmp_path / 'cache', **SMALL)
    assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize('source', ['hub', 'folder', 'overlay'])
def test_what_a_folder_or_a_repository_holds_is_loaded(source, folder, hub, tmp_path, images, said):
    name = {'hub': f'hf-hub:{REPO}', 'folder': f'local-dir:{folder}', 'overlay': 'smpconv_tiny'}[source]
    overlay = dict(hf_hub_id=REPO) if source == 'overlay' else None
    expected = small_model(shake=False)
    expected.load_state_dict(torch.load(folder / 'pytorch_model.bin'))
    for classes in 10, None:
        twin = load(name, overlay=overlay, num_classes=classes, cache_dir=tmp_path / 'cache', **SMALL)
        assert torch.equal(twin(images), expected(images)) and not said()
    load(name, overlay=overlay, num_classes=5, cache_dir=tmp_path / 'cache', **SMALL)
    assert len(said()) == (source == 'overlay')  # the other two are described by their own config.json


def test_a_url_whose_classes_are_unknown(file, tmp_path, said):
    load('smpconv_tiny', overlay=dict(url=f'file://{file}'), cache_dir=tmp_path / 'cache', num_classes=10, **SMALL)
    assert 'has unknown classes, and pretrained_cfg has num_classes=1000' in said()[0]


def test_timms_own_functions(file, model):
    assert same(small_model(checkpoint_path=file, shake=False).state_dict(), model.state_dict())
    twin = small_model(shake=False)
    load_checkpoint(twin, file)
    assert same(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize('size', [0, 1, 2 ** 20, 2 ** 20 + 1])
def test_sha256_of_a_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + b'x' * (size % 256)
    (tmp_path / 'file').write_bytes(content)
    assert file_sha256(tmp_path / 'file') == hashlib.sha256(content).hexdigest()
