"""Pictures of kernels, points and effective receptive fields, and the commands that draw them."""
import weakref
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from conftest import SMALL, TOLERANCE, difference, shake_norms, small_model, wake_weights
from PIL import Image
from reference import kernel_loop
from safetensors.torch import save_file
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_smpconv import CheckpointError, SMPKernel
from timm_smpconv.__main__ import main
from timm_smpconv.models import from_checkpoint as build
from timm_smpconv.models.from_checkpoint import build_network
from timm_smpconv.tools import pictures
from timm_smpconv.tools.images import find_images, read_images
from timm_smpconv.tools.pictures import (
    Picture,
    draw_kernels,
    draw_motion,
    draw_receptive_fields,
    find_kernels,
    picture_of,
    save_figure,
    save_motion,
)
from timm_smpconv.tools.receptive_field import receptive_field, share_table, smallest_square


def conv(weight):
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding='same', bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


# Effective receptive fields


def test_field_of_one_convolution_is_its_kernel():
    """Summed over the input channels without signs, where the centre is: row 3 of 7, column 4 of 8."""
    weight = torch.randn(1, 3, 5, 3)
    images = [torch.randn(2, 3, 7, 8) * weight.sum() for _ in range(3)]
    layer = conv(weight)
    layer.bias = nn.Parameter(torch.tensor([1e4]))  # no ReLU in the way
    expected = torch.zeros(7, 8)
    expected[1:6, 3:6] = weight[0].abs().sum(0)
    assert difference(receptive_field(layer, images), expected) < TOLERANCE[torch.float32]


def test_field_of_two_convolutions_is_that_of_their_product():
    """The kernel of two convolutions in a row is one full convolution, computed here entry by entry."""
    first, second = torch.rand(1, 1, 3, 3), torch.rand(1, 1, 5, 5)
    product = torch.zeros(7, 7)
    for i in range(5):
        for j in range(5):
            product[i:i + 3, j:j + 3] += second[0, 0, i, j] * first[0, 0]
    field = receptive_field(nn.Sequential(conv(first), conv(second)), [torch.ones(1, 1, 9, 9)])
    assert difference(field[1:8, 1:8], product) < TOLERANCE[torch.float32]
    assert field.sum().item() == pytest.approx(product.sum().item(), rel=1e-5)


def test_field_is_a_mean_over_images_of_absolute_gradients():
    """F = x² has the gradient 2x: 2, and -6 of a negative one, whatever the batches."""
    square = type('Square', (nn.Module,), {'forward': lambda self, x: x * x})()
    images = torch.tensor([1., -3.]).reshape(2, 1, 1, 1).expand(2, 1, 3, 3)
    for batches in ([images], [images[:1], images[1:]]):
        assert receptive_field(square, batches)[1, 1] == 4


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_field_of_a_model_of_another_dtype(dtype):
    conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight = torch.nn.Parameter(torch.arange(1., 10.).view(1, 1, 3, 3))
    field = receptive_field(conv.to(dtype), [torch.ones(1, 1, 5, 5)])
    assert torch.equal(field[1:4, 1:4], torch.arange(1., 10.).view(3, 3).double())


def test_field_ignores_features_that_are_off():
    """As RepLKNet's figures do, by a ReLU: of the channels x and -x only one counts."""
    both = conv(torch.tensor([1., -3.]).reshape(2, 1, 1, 1))
    assert receptive_field(both, [torch.ones(1, 1, 3, 3)])[1, 1] == 1
    assert receptive_field(both, [-torch.ones(1, 1, 3, 3)])[1, 1] == 3


def test_field_of_a_merged_network_is_that_of_the_unmerged_one():
    model = small_model()
    images = [torch.randn(1, 3, 64, 96) for _ in range(2)]
    expected = receptive_field(model, images)
    merged = reparameterize_model(model)
    assert not any(isinstance(m, SMPKernel) for m in merged.modules())
    assert difference(receptive_field(merged, images), expected) < 1e-4


class Layout(nn.Module):
    """Gives the map of a convolution in another layout."""
    patch_embed = type('Patches', (), {'grid_size': (7, 8)})()
    num_prefix_tokens = 2

    def __init__(self, layout):
        super().__init__()
        self.conv = conv(torch.rand(4, 3, 5, 5))
        self.layout = layout
        self.output_fmt = layout

    def forward_features(self, x):
        y = self.conv(x)
        if self.layout == 'NHWC':
            return y.permute(0, 2, 3, 1)
        if self.layout == 'NLC':
            tokens = y.flatten(2).transpose(1, 2)
            return torch.cat([tokens.new_ones(len(tokens), 2, tokens.shape[2]), tokens], 1)
        return y


@pytest.mark.parametrize('layout', ['NHWC', 'NLC'])
def test_field_in_other_layouts(layout):
    plain, other = Layout('NCHW'), Layout(layout)
    other.load_state_dict(plain.state_dict())
    images = [torch.rand(2, 3, 7, 8)]
    assert torch.equal(receptive_field(other, images), receptive_field(plain, images))


def test_field_leaves_the_model_as_it_was():
    """Modes of single modules, gradients, statistics, and what wants gradients."""
    model = small_model().train()
    model.stages[0].eval()
    model.head.fc.weight.requires_grad_(False)

    def state():
        return [m.training for m in model.modules()], [(p.requires_grad, p.grad) for p in model.parameters()]

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        receptive_field(model, [torch.randn(1, 3, 32, 32)])
    assert state() == before and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match='one size'):
        receptive_field(model, [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 64)])
    assert state() == before


def test_memory_does_not_grow_with_the_number_of_images():
    """Of all tensors that an operator made, as many are alive at each image."""
    made, alive = [], []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend([weakref.ref(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
            return out

    def images():
        for _ in range(8):
            alive.append(sum(ref() is not None for ref in made))
            yield torch.rand(1, 1, 9, 9)

    with Seen():
        receptive_field(conv(torch.rand(4, 1, 3, 3)), images())
    assert len(made) > 100 and len(set(alive[2:])) == 1, alive


class Infinite(nn.Module):
    def forward(self, x):
        return x * torch.inf


@pytest.mark.parametrize('model,images,message', [
    (nn.Identity(), [], 'images must hold at least one batch, got none'),
    (nn.Identity(), [torch.ones(3, 5, 5)], r'must be batches \(B, C, H, W\) of one size, got \(3, 5, 5\)'),
    (nn.Flatten(2), [torch.ones(1, 1, 5, 5)], r'model must have a last map.*got \[1, 1, 25\] from Flatten'),
    (nn.ReLU(), [-torch.ones(1, 1, 5, 5)], 'finite gradient .* not zero, got zero everywhere'),
    (Infinite(), [torch.ones(1, 1, 5, 5)], 'got infinity or NaN'),
])
def test_what_has_no_field_is_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(model, images)


@pytest.mark.parametrize('shape', [(9, 9), (7, 12), (1, 1)])
@pytest.mark.parametrize('share', [0.2, 0.5, 0.99, 1.])
def test_smallest_square_by_trying_all(shape, share):
    field = torch.rand(shape) ** 4

    def held(top, left, side):
        return field[top:top + side, left:left + side].double().sum() / field.double().sum()

    found = smallest_square(field, share)
    assert held(*found) >= share - 1e-6
    for top in range(shape[0]):
        for left in range(shape[1]):
            assert held(top, left, found.side - 1) < share


def test_squares_of_a_known_map():
    """A plateau of 10 × 10, beside the middle."""
    field = torch.zeros(40, 40)
    field[2:12, 25:35] = 1
    assert [smallest_square(field, share).side for share in (0.01, 0.2, 0.25, 0.81, 1)] == [1, 5, 5, 9, 10]
    assert smallest_square(field, 1) == (2, 25, 10)
    assert share_table({'known': field}, (0.25, 1)).splitlines()[-1] == '| known |  12.5 |  25.0 |'


@pytest.mark.parametrize('field,share,message', [
    (torch.zeros(3, 3), 0.5, 'field must be'), (torch.ones(3), 0.5, 'field must be'),
    (torch.ones(3, 3), 2, 'share must be'),
])
def test_squares_of_what_is_no_field(field, share, message):
    with pytest.raises(ValueError, match=message):
        smallest_square(field, share)


def test_picture_of_fields_carries_them_on_one_scale():
    narrow, wide = torch.zeros(20, 20), torch.ones(20, 20)
    narrow[9:11, 9:11] = 5
    figure = draw_receptive_fields({'narrow': narrow, 'wide': wide}, shares=(0.5,))
    first, second, _ = figure.axes
    images = [axis.images[0] for axis in (first, second)]
    assert images[0].get_array().max() == pytest.approx(1 / 4) and images[1].get_array().max() == pytest.approx(1 / 400)
    assert images[0].norm is images[1].norm and images[0].norm.vmax == pytest.approx(1 / 4)
    box = first.patches[0]  # half of 2 × 2 pixels: the square has 2 of them on a side
    assert (box.get_x(), box.get_y(), box.get_width()) == (8.5, 8.5, 2)
    assert first.get_title() == 'narrow\n50 % within 10 % of the side'
    assert figure.get_facecolor() == (1, 1, 1, 1)  # readable on a dark page


# Kernels


def one_point(coords, size, **kwargs):
    kernel = SMPKernel(1, size, 1, radius=0.3, **kwargs)
    with torch.no_grad():
        kernel.coords.copy_(torch.tensor(coords))
        kernel.weight.fill_(0.7)
    return picture_of(kernel)


def test_picture_shows_a_point_where_its_kernel_is():
    figure = draw_kernels({'one': one_point([0.5, 0.5], (9, 9))})
    axis = figure.axes[0]
    image, points = axis.images[0], axis.collections[0]
    row, column = divmod(int(image.get_array().argmax()), 9)
    left, right, bottom, top = image.get_extent()
    x = left + (column + 0.5) * (right - left) / 9
    y = top - (row + 0.5) * (top - bottom) / 9
    assert (x, y) == pytest.approx(tuple(points.get_offsets()[0]))


def test_picture_of_a_sequence_kernel_shows_a_point_where_its_curve_is():
    """On a sample, where the curve is as high as the point; the radius is 0.3 of half the axis, 4.8 samples."""
    before, after = one_point([0.75], (33,)), one_point([0.25], (33,))
    figure = draw_kernels({'before': before, 'after': after._replace(before=before.points)})
    for axis, sample in zip(figure.axes, (-4, -12)):
        curve = next(line for line in axis.lines if len(line.get_xdata()) == 33)
        highest = curve.get_ydata().argmax()
        assert curve.get_xdata()[highest] == sample and curve.get_ydata()[highest] == pytest.approx(0.7)
        points, bars = axis.collections[-1], axis.containers[0].lines[2][0]
        assert tuple(points.get_offsets()[0]) == pytest.approx((sample, 0.7))
        assert bars.get_segments()[0] == pytest.approx(torch.tensor([[sample - 4.8, 0.7], [sample + 4.8, 0.7]]).numpy())
    moves = [line for line in figure.axes[1].lines if line.get_color() == 'orange']
    assert [list(line.get_xdata()) for line in moves] == [[-4, -12]]


@pytest.mark.parametrize('channels,groups,channel,entry', [(2, 2, 1, (1, 0)), (3, 1, 2, (0, 2))])
def test_picture_shows_what_is_rendered(channels, groups, channel, entry):
    """A radius out of its range, the average over points, and another size, as the network computes with them.

    Of a kernel over channels an output and its first input; of a depthwise kernel a channel.
    """
    kernel = SMPKernel(channels, (17,), 3, groups=groups, average=True).resize((33,))
    with torch.no_grad():
        kernel.radius[-1, 0] = -1.
    picture = picture_of(kernel, channel)
    expected = kernel_loop(kernel.coords, kernel.radius.clamp(1e-3, 1), kernel.weight, (33,), average=True)[entry] / 2
    assert difference(picture.kernel, expected) < TOLERANCE[torch.float32] and picture.points.radius.min() > 0
    assert torch.equal(picture.points.weight, kernel.weight[entry].detach())


def test_kernels_of_a_network_and_of_the_merged_one():
    """Of the merged one they are the sum of both branches behind their norms: `fuse()` of each layer."""
    model = small_model()
    found = find_kernels(model, channels=[3])
    assert list(found) == [f'stages.{i}.blocks.0.dwconv, channel 3' for i in range(4)]
    expected = model.stages[2].blocks[2].dwconv.fuse().weight
    merged = find_kernels(reparameterize_model(model), stages=[2], channels=[0, 3])
    assert list(merged) == [f'stages.2.blocks.{i}.dwconv, channel {c}' for c in (0, 3) for i in (0, 2)]
    picture = merged['stages.2.blocks.2.dwconv, channel 3']
    assert torch.equal(picture.kernel, expected[3, 0]) and picture.points is None
    assert not draw_kernels({'merged': picture}).axes[0].collections
    backbone = reparameterize_model(small_model(features_only=True))
    assert len(find_kernels(backbone, stages=[1, 2], channels=[0])) == 3


@pytest.mark.parametrize('name,kwargs', [
    ('smpconv_tcn_ct', dict(depth=2, dim=4, points=5)), ('smpconv_resnet_cifar10', dict(dims=(4, 6), kernel_size=7)),
])
def test_kernels_of_other_families(name, kwargs):
    model = timm.create_model(name, **kwargs).eval()
    found = find_kernels(model, channels=[1, 3])
    first = next(iter(found.values()))
    kernel = next(m for m in model.modules() if isinstance(m, SMPKernel))
    assert difference(first.kernel, kernel()[1, 0]) < TOLERANCE[torch.float32]
    merged = find_kernels(reparameterize_model(model), channels=[1, 3])
    assert list(merged) == list(found)
    for kernels in found, merged:
        assert all(axis.has_data() for axis in draw_kernels(kernels).axes[:len(kernels)])


@pytest.mark.parametrize('kwargs,message', [
    (dict(stages=[1, 4]), 'stages must be among 0, 1, 2, 3, got 4'),
    (dict(channels=[8]), r'channels must be from 0 to 7 in stages\.0\.blocks\.0\.dwconv, got 8'),
    (dict(channels=[-1]), 'channels must be from 0 to 7 .*got -1'),
    (dict(channels=[0] * 51), r'kernels × channels must be at most 200 in one picture, got 4 × 51'),
])
def test_kernels_that_are_not_there(kwargs, message):
    with pytest.raises(ValueError, match=message):
        find_kernels(small_model(), **kwargs)


# Motion


@pytest.mark.parametrize('size', [(15, 15), (40,)])
def test_motion(size, tmp_path):
    """Frames differ where points move and are as many as given; colours keep their meaning between frames."""
    kernel = SMPKernel(1, size, 5, coords_std=0.2)
    frames = []
    for i in range(4):
        with torch.no_grad():
            kernel.coords.add_(0.1)
            kernel.weight.mul_(1.5)
        frames.append((f'update {i}', picture_of(kernel)))
    images = list(draw_motion(frames))
    assert len({image.tobytes() for image in images}) == 4
    save_motion(iter(images), tmp_path / 'points.gif')
    with Image.open(tmp_path / 'points.gif') as file:
        assert file.n_frames == 4 and file.info['loop'] == 0 and file.size == images[0].size
        for i, image in enumerate(images):
            file.seek(i)
            assert file.info['duration'] == (2000 if i == 3 else 80)
            off = (torch.tensor(list(file.convert('RGB').tobytes())) - torch.tensor(list(image.tobytes()))).abs()
            assert off.float().mean() < 6  # of 255: 64 colours


def test_colours_of_motion_are_relative_to_the_largest_of_all_frames():
    """Beside the point, which has the same weight in both frames."""
    large = one_point([0., 0.], (9, 9))
    small = Picture(large.kernel / 4, large.points)
    pale, strong = (image.getpixel((240, 207)) for image in draw_motion([('', small), ('', large)]))
    assert pale[0] > strong[0] > pale[2] - 150 and pale[2] > strong[2] + 50  # both red


# Files


def test_suffixes(tmp_path):
    for name in ('a.PNG', 'a.svg', 'b.svg'):
        save_figure(draw_receptive_fields({'a': torch.eye(9)}), tmp_path / name)
    with Image.open(tmp_path / 'a.PNG') as image:
        assert image.format == 'PNG' and image.convert('RGBA').getpixel((0, 0)) == (255,) * 4
    assert ET.parse(tmp_path / 'a.svg').getroot().tag.endswith('svg')
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
    with pytest.raises(ValueError, match=r'file must end in .png or .svg, got .*\.pdf'):
        save_figure(draw_receptive_fields({'a': torch.eye(9)}), tmp_path / 'a.pdf')


def test_images_are_found_and_read(tmp_path):
    """Of any size, colour and depth; every third of nine."""
    model = timm.create_model('smpconv_tiny', **SMALL, device='meta')
    gray = timm.create_model('smpconv_tiny', **SMALL, in_chans=1, device='meta')
    for i in range(9):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.new('RGB', (40 + i, 90 - i), (255, 0, 0)).save(tmp_path / str(i % 2) / f'{i}.png')
    (tmp_path / 'notes.txt').touch()
    (tmp_path / '.hidden.png').touch()
    (tmp_path / 'folder.png').mkdir()
    assert [p.name for p in find_images(tmp_path, 3)] == ['0.png', '6.png', '3.png']
    files = find_images(tmp_path)
    assert len(files) == 9 and len(find_images(tmp_path, 100)) == 9
    color = torch.cat(list(read_images(files, model, 48)))
    assert color.shape == (9, 3, 48, 48)
    expected = (torch.tensor([1., 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert difference(color.mean((0, 2, 3)), expected) < 1e-4
    one = torch.cat(list(read_images(files, gray, 48)))
    assert one.shape == (9, 1, 48, 48) and one.mean().item() == pytest.approx((76 / 255 - 0.449) / 0.226, abs=1e-3)


# Checkpoints


@pytest.mark.parametrize('name,kwargs', [
    ('smpconv_mobile31', dict(num_classes=0, in_chans=2)),
    ('smpconv_mobile31', dict(num_classes=7, inference_mode=True)),
    ('smpconv_tcn_pmnist', dict(num_classes=4, seq_len=50)),
    ('smpconv_tcn_ct', dict(in_chans=12, seq_len=29, inference_mode=True)),
    ('resnet10t', dict(num_classes=5, in_chans=1)),
    ('convnext_atto', dict(num_classes=5, in_chans=4)),
])
def test_arguments_are_read_from_the_checkpoint(name, kwargs, tmp_path):
    model = timm.create_model(name, **kwargs)
    save_file({f'module.{k}': v.contiguous() for k, v in model.state_dict().items()}, tmp_path / 'a.safetensors')
    built = build_network(name, tmp_path / 'a.safetensors')
    assert not built.training and built.num_classes == model.num_classes
    assert built.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, built.state_dict()[k]) for k, v in model.state_dict().items())


def test_ema_weights_of_a_training_script(tmp_path):
    model, other = (timm.create_model('resnet10t', num_classes=3) for _ in range(2))
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': other.state_dict()}, tmp_path / 'a.pth')
    assert torch.equal(build_network('resnet10t', tmp_path / 'a.pth').fc.weight, other.fc.weight)


def test_checkpoints_that_do_not_fit(tmp_path):
    for name in ('smpconv_mobile31', 'resnet10t'):
        save_file(timm.create_model(name).state_dict(), tmp_path / name)
    for name, file in (
            ('smpconv_mobile51', 'smpconv_mobile31'), ('resnet10t', 'smpconv_mobile31'),
            ('smpconv_mobile31', 'resnet10t')):
        (tmp_path / file).rename(tmp_path / f'{file}.safetensors')
        with pytest.raises(CheckpointError, match=f'must be a checkpoint of {name}, got: ') as raised:
            build_network(name, tmp_path / f'{file}.safetensors')
        assert len(str(raised.value)) < 600
        (tmp_path / f'{file}.safetensors').rename(tmp_path / file)
    with pytest.raises(ValueError, match=r"MODEL must be a name that .* lists, got 'resnet51'"):
        build_network('resnet51')


# Commands


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command line with a small network, whose checkpoint is in the current folder, beside two images."""
    create = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        if pretrained:
            raise CheckpointError('there are none')
        return create(name, pretrained, **{**(SMALL if name == 'smpconv_tiny' else {}), **kwargs})

    monkeypatch.setattr(build.timm, 'create_model', create_model)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = wake_weights(shake_norms(create_model('smpconv_tiny', num_classes=10, in_chans=1).eval()))
    save_file(model.state_dict(), 'model.safetensors')
    save_file(reparameterize_model(model).state_dict(), 'merged.safetensors')
    Path('images').mkdir()
    for i, size in enumerate([(40, 50), (64, 33)]):
        Image.effect_noise(size, 60).save(f'images/{i}.png')
    return model


def listed():
    return sorted(path.name for path in Path().iterdir() if path.name not in BEFORE)


BEFORE = ('images', 'merged.safetensors', 'model.safetensors')


def test_command_kernels(small, capsys):
    assert main(['picture', 'kernels', 'smpconv_tiny', '--checkpoint', 'model.safetensors', '--out', 'new/a.svg']) == 0
    assert main(['picture', 'kernels', 'smpconv_tiny', '--checkpoint', 'merged.safetensors', '--stage', '2']) == 0
    assert listed() == ['kernels.png', 'new'] and Path('new/a.svg').stat().st_size > 10_000
    assert capsys.readouterr().out == f'wrote {Path("new/a.svg")}\nwrote kernels.png\n'


def test_command_receptive_field(small, capsys, monkeypatch):
    """The table is that of the function; the same network twice, unmerged and merged."""
    drawn = {}
    draw = pictures.draw_receptive_fields
    monkeypatch.setattr(pictures, 'draw_receptive_fields', lambda fields: draw(drawn.update(fields) or fields))
    assert main([
        'picture', 'receptive-field', 'smpconv_tiny', 'smpconv_tiny', '--checkpoint', 'model.safetensors',
        'merged.safetensors', '--images', 'images', '--image-size', '64']) == 0
    captured = capsys.readouterr()
    expected = receptive_field(small, read_images(find_images(Path('images')), small, 64))
    assert list(drawn) == ['smpconv_tiny (1)', 'smpconv_tiny (2)']
    for field in drawn.values():
        assert difference(field, expected) < 1e-4
    assert share_table(drawn) in captured.out and captured.out.startswith('2 images of 64x64: ')
    assert 'smpconv_tiny (2): 100%' in captured.err and '2/2' in captured.err  # tqdm
    assert listed() == ['receptive-field.png']


FIELD = ['receptive-field', 'smpconv_tiny', '--images', 'images', '--image-size', '32']


@pytest.mark.parametrize('arguments,status,message', [
    (['kernels', 'smpconv_tinny'], 2, "MODEL must be a name that timm.list_models() lists, got 'smpconv_tinny'"),
    (['kernels', 'resnet10t'], 2, 'model must have SMP kernels, got ResNet without'),
    (['kernels', 'smpconv_tiny', '--checkpoint', 'none.pth'], 1, "file must exist, got 'none.pth'"),
    (['kernels', 'smpconv_tiny', '--pretrained'], 1, 'must have weights that can be loaded: there are none'),
    (['kernels', 'smpconv_tiny', '--out', 'folder.png'], 1, 'folder.png must be a file or not exist, got a folder'),
    ([*FIELD[:3], 'empty', '--image-size', '32'], 2, 'files *.png, *.jpg or *.jpeg in it or below, got empty'),
    ([*FIELD[:3], 'none', '--image-size', '32'], 2, 'images must be in a folder, got none'),
    ([*FIELD[:3], 'broken'], 2, f'images must be files that Pillow reads, got {Path("broken/a.png")}'),
    ([*FIELD[:3], 'large'], 2, f'images must be files that Pillow reads, got {Path("large/a.png")}: Image size (4000'),
    ([*FIELD, '--checkpoint', 'a', 'b'], 2, '--checkpoint must name one file for each MODEL, got 2 for 1'),
    (['receptive-field', 'smpconv_tcn_ct', *FIELD[2:]], 2, 'smpconv_tcn_ct with images of 32x32: x must have'),
    (['receptive-field', 'vit_tiny_patch16_224', *FIELD[2:]], 2, 'image_size must be 224 for VisionTr'),
])
def test_bad_input_is_one_sentence_and_writes_nothing(small, arguments, status, message, capsys, monkeypatch):
    Path('folder.png').mkdir()
    Path('empty').mkdir()
    Path('broken').mkdir()
    Path('broken/a.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    Path('large').mkdir()
    if 'large' in arguments:
        Image.new('1', (20_000, 20_000)).save('large/a.png')
    assert main(['picture', *arguments]) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.split('\n') if line and '\r' not in line]
    assert message in lines[-1] and lines[-1].startswith(f'timm-smpconv picture {arguments[0]}: ')
    assert 'Traceback' not in captured.err and captured.out == ''
    assert listed() == ['broken', 'empty', 'folder.png', 'large']


@pytest.mark.parametrize('arguments,message', [
    (['kernels', 'smpconv_tiny', '--out', 'a.gif'], "--out: must be a file whose name ends in .png or .svg, got 'a.g"),
    (['kernels', 'smpconv_tiny', '--channels', '-1'], '--channels: must be an integer from 0'),
    (['receptive-field', 'smpconv_tiny'], 'the following arguments are required: --images'),
    ([], 'the following arguments are required: picture'),
])
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['picture', *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
