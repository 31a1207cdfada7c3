"""Converted weights in transformers, segmentation_models_pytorch and torchvision's detectors; the Trainer's optimizer.

Oracles: what timm's create_model makes of the same folder; the unmerged network for the merged one; plain AdamW with
rates and radii set by hand (test_distributed.py).
"""
import math

import convert
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import difference
from PIL import Image
from reference import authors_state_dict
from test_distributed import LR, Net, batch, check, expected_after
from timm.data import create_transform, resolve_model_data_config
from timm.utils import reparameterize_model
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from timm_smpconv import CheckpointError, SMPAdamW, SMPKernel
from timm_smpconv.optim import add_point_rules

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of `difference`, for whole networks in float32


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """What weights/convert.py makes of smpconv_mobile31 in the authors' layout: the folder, and that of merged ones."""
    path = tmp_path_factory.mktemp('tools')
    torch.save({'model': authors_state_dict('smpconv_mobile31', num_classes=10)}, path / 'digits.pth')
    assert convert.main([
        str(path / 'digits.pth'), '--model', 'smpconv_mobile31', '--tag', 'digits', '--out', str(path / 'digits'),
        '--merged']) == 0
    return {'unmerged': path / 'digits', 'merged': path / 'digits-merged'}


@pytest.fixture(scope='module')
def ours(folders):
    return timm.create_model(f'local-dir:{folders["unmerged"]}', pretrained=True).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96)


def maps_of(model, images):
    with torch.no_grad():
        return model.forward_intermediates(images, intermediates_only=True)


def check_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert difference(a, e) < TOLERANCE


def check_merged(encoder):
    """Points and norms are gone; the large kernels are those of convolutions."""
    assert not any(isinstance(module, (SMPKernel, nn.BatchNorm2d)) for module in encoder.modules())
    assert any(module.kernel_size == (31, 31) for module in encoder.modules() if isinstance(module, nn.Conv2d))


def update_all(network, encoder, loss):
    """One update, in which every parameter of the encoder moves."""
    optimizer = SMPAdamW(network.train(), lr=1e-3)
    before = {name: param.detach().clone() for name, param in encoder.named_parameters()}
    loss().backward()
    optimizer.step()
    assert not [name for name, param in encoder.named_parameters() if torch.equal(param, before[name])]


# transformers


@pytest.mark.parametrize('kind', ['unmerged', 'merged'])
def test_transformers_classify(kind, folders, ours, images):
    transformers = pytest.importorskip('transformers')
    folder = str(folders[kind])
    with torch.no_grad():
        expected = ours(images)
        classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert difference(classifier(images).logits, expected) < TOLERANCE
        trunk = transformers.AutoModel.from_pretrained(folder).eval()
        assert difference(trunk(images).last_hidden_state, ours.forward_features(images)) < TOLERANCE
        pooled = ours.forward_head(ours.forward_features(images), pre_logits=True)
        assert difference(trunk(images).pooler_output, pooled) < TOLERANCE

        image = Image.effect_noise((250, 240), 60).convert('RGB')
        transform = create_transform(**resolve_model_data_config(ours))
        scores = ours(transform(image)[None]).softmax(1)[0].tolist()
    pipeline = transformers.pipeline('image-classification', model=folder)
    found = {entry['label']: entry['score'] for entry in pipeline(image, top_k=10)}
    assert [found[f'LABEL_{label}'] for label in range(10)] == pytest.approx(scores, rel=1e-4)


def test_what_transformers_saves_timm_loads(folders, ours, images, tmp_path):
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForImageClassification.from_pretrained(
        str(folders['unmerged']), num_labels=4, ignore_mismatched_sizes=True).eval()
    model.save_pretrained(tmp_path / 'tuned')
    again = timm.create_model(f'local-dir:{tmp_path / "tuned"}', pretrained=True).eval()
    with torch.no_grad():
        expected = model(images).logits
        assert expected.shape == (2, 4)
        assert difference(again(images), expected) < TOLERANCE
        assert difference(reparameterize_model(again)(images), expected) < TOLERANCE
    check_close(maps_of(again, images), maps_of(ours, images))


def test_backbone_of_transformers(folders, ours, images):
    transformers = pytest.importorskip('transformers')

    def backbone(kind):
        return transformers.TimmBackbone.from_pretrained(
            f'local-dir:{folders[kind]}', out_indices=(0, 1, 2, 3)).eval()

    expected = maps_of(ours, images)
    with torch.no_grad():
        check_close(backbone('merged')(images).feature_maps, expected)
        unmerged = backbone('unmerged')
        reset = unmerged(images).feature_maps
        # transformers 5.24 resets the statistics. Where it no longer does, docs/tools.md has to change.
        assert all(difference(a, e) > 0.1 for a, e in zip(reset, expected))
        features = timm.create_model(f'local-dir:{folders["unmerged"]}', pretrained=True, features_only=True)
        unmerged._backbone.load_state_dict(features.state_dict())
        check_close(unmerged(images).feature_maps, expected)


# Segmentation


DECODERS = {  # and the output stride for which they ask
    'Unet': 32, 'UnetPlusPlus': 32, 'FPN': 32, 'UPerNet': 32, 'Segformer': 32, 'Linknet': 32, 'MAnet': 32, 'PSPNet': 32,
    'DeepLabV3': 8, 'DeepLabV3Plus': 16, 'PAN': 16,
}


@pytest.mark.parametrize('decoder', DECODERS)
def test_segmentation(decoder, folders):
    smp = pytest.importorskip('segmentation_models_pytorch')
    size = (128, 128) if decoder == 'PAN' else (64, 96)  # PAN halves the last map three times
    images, labels = torch.randn(2, 3, *size), torch.randint(0, 3, (2, *size))
    stride = DECODERS[decoder]

    def build(kind):
        return getattr(smp, decoder)(f'tu-local-dir:{folders[kind]}', encoder_weights=True, classes=3).eval()

    like = timm.create_model(f'local-dir:{folders["unmerged"]}', pretrained=True, output_stride=stride).eval()
    expected = maps_of(like, images)
    if decoder == 'PSPNet':  # it takes strides 4 and 8
        expected = expected[:2]
    network = build('unmerged')
    with torch.no_grad():
        check_close(network.encoder(images)[2:], expected)  # after the images and a map of stride 2 that is empty
        if stride == 32:
            merged = build('merged')
            check_merged(merged.encoder)
            check_close(merged.encoder(images)[2:], expected)
        else:  # merged kernels are of the size of their grid
            with pytest.raises(CheckpointError, match='must have the shapes of the model'):
                build('merged')

    update_all(network, network.encoder, lambda: F.cross_entropy(network(images), labels))
    with torch.no_grad():
        merged = reparameterize_model(network.eval())
        check_merged(merged.encoder)
        assert difference(merged(images), network(images)) < TOLERANCE


# Detection


DETECTORS = {
    'RetinaNet': (detection.RetinaNet, (1, 2, 3), LastLevelP6P7),
    'FCOS': (detection.FCOS, (1, 2, 3), LastLevelP6P7),
    'FasterRCNN': (detection.FasterRCNN, (0, 1, 2, 3), None),
}


def detector(name, folder):
    torch.manual_seed(0)
    make, levels, extra = DETECTORS[name]
    features = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True, out_indices=levels)
    backbone = BackboneWithFPN(
        features, {f'stages_{level}': str(i) for i, level in enumerate(levels)}, features.feature_info.channels(),
        out_channels=64, extra_blocks=extra and extra(64, 64))
    return make(backbone, num_classes=3, min_size=64, max_size=96)


def raw_outputs(name, network, images):
    """What the heads give for each anchor, before boxes are selected."""
    maps = list(network.backbone(images).values())
    if name == 'FasterRCNN':
        return [tensor for level in network.rpn.head(maps) for tensor in level]
    return list(network.head(maps).values())


@pytest.mark.parametrize('name', DETECTORS)
def test_detection(name, folders, images):
    network = detector(name, folders['unmerged'])
    target = {'boxes': torch.tensor([[5., 5., 60., 50.]]), 'labels': torch.tensor([1])}
    photos = list(images.sigmoid())
    update_all(network, network.backbone.body, lambda: sum(network(photos, [target, target]).values()))
    with torch.no_grad():
        merged = reparameterize_model(network.eval())
        check_merged(merged.backbone.body)
        check_close(raw_outputs(name, merged, images), raw_outputs(name, network, images))
        assert len(merged(photos)) == 2

        merged = detector(name, folders['merged']).eval()
        check_merged(merged.backbone.body)
        merged.backbone.fpn.load_state_dict(network.backbone.fpn.state_dict())
        unmerged = detector(name, folders['unmerged']).eval()
        unmerged.backbone.fpn.load_state_dict(network.backbone.fpn.state_dict())
        check_close(merged.backbone(images).values(), unmerged.backbone(images).values())


# Hugging Face's Trainer, with plain AdamW


class Wrapped(nn.Module):
    """A network as the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, pixel_values, labels):
        return {'loss': F.cross_entropy(self.net(pixel_values), labels)}


UPDATES, WARMUP = 5, 2
DECAY = {  # of the rate after the warmup, by the fraction of the updates that are left
    'linear': lambda left: left,
    'cosine': lambda left: 0.5 * (1 + math.cos(math.pi * (1 - left))),
}


def train_by_hugging_face(schedule, trainer_class, folder, optimizer=None):
    transformers = pytest.importorskip('transformers')
    x, y = batch(0)
    model = Wrapped()
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=UPDATES, per_device_train_batch_size=len(x), learning_rate=LR, weight_decay=0.01,
        lr_scheduler_type=schedule, warmup_steps=WARMUP, max_grad_norm=0., optim='adamw_torch', use_cpu=True,
        save_strategy='no', report_to='none', disable_tqdm=True, dataloader_pin_memory=False)
    trainer = trainer_class(
        model, arguments, train_dataset=[dict(pixel_values=x[i], labels=y[i]) for i in range(len(x))],
        optimizers=(optimizer and optimizer(model), None))
    trainer.train()
    assert len(trainer.lr_scheduler.base_lrs) == len(trainer.optimizer.param_groups)
    return model.net


def rate(schedule):
    def factor(update):
        return update / WARMUP if update < WARMUP else DECAY[schedule]((UPDATES - update) / (UPDATES - WARMUP))
    return factor


def trainer_with_rules():
    class SMPTrainer(pytest.importorskip('transformers').Trainer):
        def create_optimizer(self, *args):
            return add_point_rules(super().create_optimizer(*args), self.model)
    return SMPTrainer


@pytest.fixture
def same_batch(monkeypatch):
    """The Trainer shuffles, so that every update is that of one whole batch."""
    monkeypatch.setattr('test_distributed.batch', lambda update: batch(0))


@pytest.mark.parametrize('schedule', DECAY)
def test_trainer_whose_optimizer_gets_the_rules(schedule, same_batch, tmp_path):
    expected, clamped = expected_after(UPDATES, rate(schedule), exempt=('coords', 'bias'))  # its own rule for biases
    assert clamped
    check(dict(train_by_hugging_face(schedule, trainer_with_rules(), tmp_path).named_parameters()), expected)


@pytest.mark.parametrize('make', [
    lambda model: SMPAdamW(model, lr=LR),
    lambda model: add_point_rules(torch.optim.AdamW(model.parameters(), lr=LR), model),
], ids=['smpadamw', 'adamw with the rules'])
def test_trainer_that_is_given_an_optimizer(make, same_batch, tmp_path):
    trainer = pytest.importorskip('transformers').Trainer
    expected, clamped = expected_after(UPDATES, rate('cosine'))
    assert clamped
    check(dict(train_by_hugging_face('cosine', trainer, tmp_path, make).named_parameters()), expected)


def test_a_plain_trainer_breaks_the_rules(same_batch, tmp_path):
    """Why docs/tools.md says what to add."""
    trainer = pytest.importorskip('transformers').Trainer
    radius = train_by_hugging_face('linear', trainer, tmp_path).first.kernel.radius
    assert ((radius < 1e-3) | (radius > 1)).any()
