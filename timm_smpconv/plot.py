"""Pictures of SMP kernels and their points."""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .kernel import SMPKernel

__all__ = ['Picture', 'draw_kernels', 'picture_of']


class Picture(NamedTuple):
    """One channel of an SMP kernel, and its points."""
    kernel: torch.Tensor  # (K,) or (K, K)
    coords: torch.Tensor  # (P, D)
    radius: torch.Tensor  # (P,)
    weight: torch.Tensor  # (P,)


@torch.no_grad()
def picture_of(kernel: SMPKernel) -> Picture:
    """The first channel of the first group, as it is now.

    Example:
        >>> picture_of(SMPKernel(8, (31, 31), 240)).kernel.shape
        torch.Size([31, 31])
    """
    parts = kernel()[0, 0], kernel.coords[0], kernel.radius[0].clamp(*kernel.radius_range), kernel.weight[0, 0]
    return Picture(*(part.float().cpu().clone() for part in parts))


def draw_kernels(rows: Sequence[Tuple[str, List[Picture]]], titles: Sequence[str]) -> Figure:
    """Draw one row of kernels for each (label, kernels), with the points over each kernel.

    Blue is negative, red is positive. A point's colour is its weight, relative to the largest of its kernel. From the
    second row on, lines show how far points moved since the first.

    Kernels of images are drawn as images; the size of a point is its radius. Kernels of sequences are drawn as curves
    over the samples of a causal kernel, up to the current one, 0; the height of a point is its weight, and a bar of the
    length of its radius leads to either side.

    Example:
        >>> kernels = [picture_of(SMPKernel(1, size, 5)) for size in ((9, 9), (64,))]
        >>> len(draw_kernels([('before', kernels), ('after', kernels)], ['image', 'sequence']).axes)
        4
    """
    width = max(2.4 if picture.kernel.ndim == 2 else 3.6 for picture in rows[0][1])
    figure = Figure(figsize=(width * len(titles) + 0.4, 2.6 * len(rows)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, kernels) in zip(axes, rows):
        for axis, title, picture, first in zip(line, titles, kernels, rows[0][1]):
            draw = _draw_image if picture.kernel.ndim == 2 else _draw_curve
            draw(axis, picture, None if kernels is rows[0][1] else first)
            limit = picture.kernel.abs().max().item()
            axis.set_title(f'{title}\n{label}, max |K| {limit:.2g}', fontsize=8)
    return figure


def _draw_image(axis: Any, picture: Picture, first: Optional[Picture]) -> None:
    limit = picture.kernel.abs().max().item() or 1.
    # Samples are at the centres of their pixels, the outermost ones on the border of [-1, 1].
    bottom, right = (1 + 1 / max(k - 1, 1) for k in picture.kernel.shape)
    axis.imshow(
        picture.kernel.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit, extent=(-right, right, -bottom, bottom))
    x, y = picture.coords.T.numpy()
    if first is not None:
        x0, y0 = first.coords.T.numpy()
        axis.plot([x0, x], [y0, y], color='black', linewidth=0.8)
    axis.scatter(x, y, s=160 * picture.radius.numpy(), edgecolors='black', linewidths=0.5, **_colors(picture))
    axis.set(xticks=[], yticks=[])


def _draw_curve(axis: Any, picture: Picture, first: Optional[Picture]) -> None:
    last = len(picture.kernel) - 1

    def sample(coords: torch.Tensor) -> Any:
        return ((coords[:, 0] - 1) * last / 2).numpy()

    x, y = sample(picture.coords), picture.weight.numpy()
    axis.axhline(0, color='gray', linewidth=0.5)
    axis.plot(range(-last, 1), picture.kernel.numpy(), color='black', linewidth=1.2)
    axis.errorbar(x, y, xerr=(picture.radius * last / 2).numpy(), fmt='none', ecolor='gray', elinewidth=0.8)
    if first is not None:
        axis.plot([sample(first.coords), x], [first.weight.numpy(), y], color='orange', linewidth=0.6)
    axis.scatter(x, y, s=10, edgecolors='black', linewidths=0.5, zorder=3, **_colors(picture))
    axis.tick_params(labelsize=6)
    axis.set_xlabel('sample, 0 is the current one', fontsize=7)
    axis.set_xlim(-last * 1.03, last * 0.03)


def _colors(picture: Picture) -> Any:
    limit = picture.weight.abs().max().item()
    return dict(c=picture.weight.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit)
