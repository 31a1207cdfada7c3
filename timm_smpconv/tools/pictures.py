"""Pictures of SMP kernels, of their points at rest and in motion, and of effective receptive fields.

Shapes: C channels, D dimensions of a kernel (1 or 2), K samples of an axis, P points, H and W height and width.
"""
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import matplotlib as mpl
import numpy as np
import torch
import torch.nn as nn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from ..layers.merged import MERGED_CONVS
from ..layers.smp_kernel import SMPKernel
from ..ops.render import render_kernel
from .receptive_field import smallest_square

__all__ = [
    'Picture', 'Points', 'draw_kernels', 'draw_motion', 'draw_receptive_fields', 'find_kernels', 'picture_of',
    'points_of', 'save_figure', 'save_motion']

SUFFIXES = ('.png', '.svg')
_MOST_PANELS = 200


class Points(NamedTuple):
    """The points of one channel of an SMP kernel."""
    coords: torch.Tensor  # (P, D)
    radius: torch.Tensor  # (P,)
    weight: torch.Tensor  # (P,)


class Picture(NamedTuple):
    """One channel of a kernel. Its points, if there are any, and their positions before, if they are known."""
    kernel: torch.Tensor  # (K,) or (K, K)
    points: Optional[Points] = None
    before: Optional[Points] = None


@torch.no_grad()
def points_of(kernel: SMPKernel, channel: int = 0) -> Points:
    """The points of an output channel as they are now.

    Args:
        kernel: If it has several groups, the weights are those of the first input channel.
        channel: From 0 on.

    Example:
        >>> points_of(SMPKernel(8, (31, 31), 240)).coords.shape
        torch.Size([240, 2])
    """
    group, channel = (channel, 0) if len(kernel.coords) > 1 else (0, channel)
    parts = (
        kernel.coords[group], kernel.radius[group].clamp(*kernel.radius_range), kernel.weight[group, channel])
    return Points(*(part.detach().to('cpu', torch.float32, copy=True) for part in parts))


def picture_of(kernel: SMPKernel, channel: int = 0, points: Optional[Points] = None) -> Picture:
    """An output channel as it is now, or rendered from other points.

    Args:
        kernel: See `points_of`.
        channel: See `points_of`.
        points: By default those of the channel.

    Example:
        >>> picture_of(SMPKernel(8, (31, 31), 240)).kernel.shape
        torch.Size([31, 31])
    """
    points = points or points_of(kernel, channel)
    coords, radius, weight = points
    rendered = render_kernel(coords[None], radius[None], weight[None, None], kernel.size, kernel.average)
    return Picture(kernel.scale * rendered[0, 0], points)


def find_kernels(
        model: nn.Module,
        stages: Optional[Sequence[int]] = None,
        channels: Sequence[int] = (0, 1),
) -> Dict[str, Picture]:
    """Name of a kernel and its channel → its picture.

    Args:
        model: A model with SMP kernels, or a merged network of this package, whose large kernels have no points.
        stages: Return all kernels of these stages. A stage is a number in the name of a module, such as `stages.2`,
            `blocks.2` or `layer2`; the stem counts as 0. By default, return the first kernel of every stage.
        channels: Output channels. If a kernel has several input channels, the first one is shown.

    Raises:
        ValueError: There is no such kernel or channel.

    Example:
        >>> import timm
        >>> list(find_kernels(timm.create_model('smpconv_mobile31'), stages=[0], channels=[5]))
        ['stages.0.blocks.0.dwconv, channel 5', 'stages.0.blocks.2.dwconv, channel 5']
    """
    kernels: Dict[str, Any] = {
        re.sub(r'\.?(large\.)?(conv\.)?kernel$', '', name): module
        for name, module in model.named_modules() if isinstance(module, SMPKernel)}
    if not kernels:  # of a merged network, whose other convolutions have kernels of 1 or 3
        kernels = {
            name: module.weight for name, module in model.named_modules()
            if isinstance(module, MERGED_CONVS) and min(module.kernel_size) > 3}
    if not kernels:
        raise ValueError(f'model must have SMP kernels, got {type(model).__name__} without')
    in_stages: Dict[int, List[str]] = {}
    for name in kernels:
        number = re.match(r'[a-z_]+\.?(\d+)', name) or re.search(r'\.(\d+)(?:\.|$)', name)
        in_stages.setdefault(int(number[1]) if number else 0, []).append(name)
    missing = [stage for stage in stages or () if stage not in in_stages]
    if missing:
        raise ValueError(f'stages must be among {", ".join(map(str, sorted(in_stages)))}, got {missing[0]}')
    if stages is None:
        names = [first for first, *_ in in_stages.values()]
    else:
        names = [name for stage in stages for name in in_stages[stage]]
    if len(names) * len(channels) > _MOST_PANELS:
        raise ValueError(
            f'kernels × channels must be at most {_MOST_PANELS} in one picture, got {len(names)} × {len(channels)}')
    return {
        f'{name}, channel {channel}' if name else f'channel {channel}': _channel(name, kernels[name], channel)
        for channel in channels for name in names}


def _channel(name: str, kernel: Any, channel: int) -> Picture:
    groups, inputs = (len(kernel.coords), kernel.weight.shape[1]) if isinstance(kernel, SMPKernel) else (len(kernel), 1)
    outputs = groups if groups > 1 else inputs
    if not 0 <= channel < outputs:
        raise ValueError(f'channels must be from 0 to {outputs - 1} in {name or "the kernel"}, got {channel}')
    if isinstance(kernel, SMPKernel):
        return picture_of(kernel, channel)
    return Picture(kernel[channel, 0].detach().float().cpu())


def draw_kernels(pictures: Mapping[str, Picture], columns: int = 4) -> Figure:
    """Draw kernels side by side, with the points over each.

    Blue is negative, red is positive. The colour of a point is its weight relative to the largest weight of the kernel.
    Lines start at the positions of the points before, if these are known.

    Kernels of images are drawn as images, and the size of a point shows its radius. Kernels of sequences are drawn as
    curves. The height of a point is then its weight, and a bar of the length of its radius extends to either side.

    Args:
        pictures: Title → kernel, row by row.
        columns: The largest number of kernels in a row.

    Example:
        >>> kernels = {'image': SMPKernel(1, (9, 9), 5), 'sequence': SMPKernel(1, (64,), 5)}
        >>> len(draw_kernels({title: picture_of(kernel) for title, kernel in kernels.items()}).axes)
        2
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width = max(2.4 if picture.kernel.ndim == 2 else 3.6 for picture in pictures.values())
    figure, axes = _panels(rows, columns, width, 2.75)
    for axis, (title, picture) in zip(axes, pictures.items()):
        _draw(axis, picture)
        if picture.kernel.ndim == 2:
            axis.set(xticks=[], yticks=[])
        axis.set_title(f'{title}\nlargest |K| {picture.kernel.abs().max().item():.2g}', fontsize=9)
    return figure


def _panels(rows: int, columns: int, width: float, height: float) -> Tuple[Figure, List[Any]]:
    """A figure and its axes. It is white, because the text of a transparent figure is unreadable on a dark page."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)  # inches
    figure = Figure(figsize=(width * columns, height * rows), layout=layout, facecolor='white')
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_visible(False)
    return figure, axes


def _draw(axis: Any, picture: Picture, largest: Optional[Picture] = None) -> None:
    """Draw a kernel with colours and limits relative to its own largest values, or to those of another picture."""
    axis.set_visible(True)
    scale = largest or picture
    limit = scale.kernel.abs().max().item() or 1.
    draw = _draw_image if picture.kernel.ndim == 2 else _draw_curve
    points = scale.points or picture.points
    heaviest = (points.weight.abs().max().item() or 1.) if points else 1.
    draw(axis, picture, limit, dict(cmap='RdBu_r', vmin=-heaviest, vmax=heaviest, edgecolors='black'))


def _draw_image(axis: Any, picture: Picture, limit: float, colors: Dict[str, Any]) -> None:
    # Samples are at the centres of their pixels, the outermost ones on the border of [-1, 1].
    bottom, right = (1 + 1 / max(k - 1, 1) for k in picture.kernel.shape)
    axis.imshow(
        picture.kernel.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit, extent=(-right, right, -bottom, bottom))
    if picture.points is None:
        return
    x, y = picture.points.coords.T.numpy()
    size = 110 * picture.points.radius.numpy()
    axis.scatter(x, y, s=size, c=picture.points.weight.numpy(), linewidths=0.5, zorder=3, **colors)
    if picture.before is not None:
        x0, y0 = picture.before.coords.T.numpy()
        axis.plot([x0, x], [y0, y], color='black', linewidth=0.8, zorder=4)


def _draw_curve(axis: Any, picture: Picture, limit: float, colors: Dict[str, Any]) -> None:
    last = len(picture.kernel) - 1

    def sample(coords: torch.Tensor) -> Any:
        return ((coords[:, 0] - 1) * last / 2).numpy()

    axis.axhline(0, color='gray', linewidth=0.5)
    axis.plot(range(-last, 1), picture.kernel.numpy(), color='black', linewidth=1.2)
    axis.tick_params(labelsize=6)
    axis.set_xlabel('sample, 0 is the last of the kernel', fontsize=7)
    axis.set_xlim(-last * 1.03, last * 0.03)
    if picture.points is None:
        return
    x, y = sample(picture.points.coords), picture.points.weight.numpy()
    axis.errorbar(
        x, y, xerr=(picture.points.radius * last / 2).numpy(), fmt='none', ecolor='gray', elinewidth=0.8)
    if picture.before is not None:
        axis.plot(
            [sample(picture.before.coords), x], [picture.before.weight.numpy(), y], color='orange', linewidth=0.6)
    axis.scatter(x, y, s=10, c=y, linewidths=0.5, zorder=3, **colors)


def draw_motion(frames: Sequence[Tuple[str, Picture]]) -> Iterator[Image.Image]:
    """Draw a kernel again and again, with lines from where its points were in the first frame.

    Colours and limits are the same in all frames. A kernel of images is cropped to the middle part that holds nine
    tenths of the points, because points move by fractions of a sample.

    Args:
        frames: (title, kernel with points) at each moment.

    Example:
        >>> kernel = SMPKernel(1, (9, 9), 5)
        >>> [image.size for image in draw_motion([('before', picture_of(kernel)), ('after', picture_of(kernel))])]
        [(360, 396), (360, 396)]
    """
    first = frames[0][1].points
    largest = Picture(
        torch.stack([picture.kernel for _, picture in frames]).abs().amax(0),
        Points(*(torch.stack(parts).abs().amax(0) for parts in zip(*(picture.points or () for _, picture in frames)))))
    values = [value for _, p in frames for value in (p.kernel, *(p.points[2:] if p.points else ()))]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    figure = Figure(figsize=(4, 4.4), dpi=90, facecolor='white')
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0.1, 0.06, 0.88, 0.82) if largest.kernel.ndim == 2 else (0.12, 0.1, 0.85, 0.78))
    reach = max(largest.points[0].amax(1).quantile(0.9).item(), 0.1) if largest.points else 1.  # of the maximum norm
    for title, picture in frames:
        axis.clear()
        _draw(axis, picture._replace(before=first), largest)
        axis.set_title(title, fontsize=9)
        if picture.kernel.ndim == 1:
            margin = 0.05 * (high - low)
            axis.set_ylim(low - margin, high + margin)
        else:
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach))
            axis.locator_params(nbins=5)
            axis.tick_params(labelsize=7)
        canvas.draw()
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')


def save_motion(images: Iterator[Image.Image], file: Path, milliseconds: int = 80) -> None:
    """Write images as an animated GIF, which pauses for two seconds at the last image and repeats.

    All frames share one palette, so that each frame stores only what changed.

    Example:
        >>> kernel = SMPKernel(1, (9, 9), 5)
        >>> save_motion(draw_motion([('before', picture_of(kernel)), ('after', picture_of(kernel))]), Path('a.gif'))
        >>> with Image.open('a.gif') as image:
        ...     image.n_frames
        2
    """
    frames = list(images)
    palette = Image.new('P', (1, 1))
    colors = [*mpl.colormaps['RdBu_r'](np.linspace(0, 1, 49))[:, :3], *np.linspace(0, 1, 15)[:, None].repeat(3, 1)]
    palette.putpalette((np.array(colors) * 255).round().astype('uint8').tobytes())
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    reduced[0].save(
        file, format='GIF', save_all=True, append_images=reduced[1:], loop=0, optimize=False,
        duration=[*[milliseconds] * (len(reduced) - 1), 2000])


def draw_receptive_fields(fields: Mapping[str, torch.Tensor], shares: Sequence[float] = (0.5, 0.99)) -> Figure:
    """Draw effective receptive fields side by side on one logarithmic scale of colours.

    The colour of a pixel is its share of the field's sum; the scale spans four decades below the largest of all.
    Each square is the smallest one that holds a share.

    Args:
        fields: Name of a model → its field, (H, W).
        shares: Each in (0, 1].

    Example:
        >>> len(draw_receptive_fields({'a_model': torch.eye(10)}).axes)  # with the colour bar
        2
    """
    columns = min(len(fields), 4)
    figure, axes = _panels(-(-len(fields) // columns), columns, 2.5, 3.)
    parts = {name: (field / field.sum()).numpy() for name, field in fields.items()}
    largest = max(part.max() for part in parts.values())
    norm = LogNorm(largest / 1e4, largest, clip=True)
    for axis, (name, part) in zip(axes, parts.items()):
        axis.set_visible(True)
        image = axis.imshow(part.clip(largest / 1e4), cmap='magma', norm=norm, interpolation='nearest')
        axis.set(xticks=[], yticks=[])
        lines = []
        for share, style in zip(shares, ('-', '--', ':', '-.')):
            top, left, side = smallest_square(fields[name], share)
            axis.add_patch(Rectangle(
                (left - 0.5, top - 0.5), side, side, fill=False, edgecolor='white', linewidth=1.2, linestyle=style))
            lines.append(f'{100 * share:g} % within {100 * side / max(part.shape):.0f} % of the side')
        axis.set_title('\n'.join([name, *lines]), fontsize=9)
    bar = figure.colorbar(image, ax=[axis for axis in axes if axis.get_visible()], shrink=0.6, pad=0.02)
    bar.set_label('share of a pixel', fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of the file. The same figure gives the same bytes.

    Raises:
        ValueError: The suffix is another.

    Example:
        >>> save_figure(draw_receptive_fields({'a_model': torch.eye(10)}), Path('field.jpg'))
        Traceback (most recent call last):
        ValueError: file must end in .png or .svg, got field.jpg
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f'file must end in {" or ".join(SUFFIXES)}, got {file}')
    metadata = {'Date': None} if suffix == '.svg' else None
    with mpl.rc_context({'svg.hashsalt': 'timm-smpconv'}):
        figure.savefig(file, format=suffix[1:], dpi=130, metadata=metadata)
