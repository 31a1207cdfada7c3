"""Pictures of SMP kernels and their points."""
from typing import List, Sequence, Tuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .kernel import render_kernel

# One channel of a kernel: coords (1, P, 2), radius (1, P), weight (1, 1, P), and the kernel's size.
Points = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]]


def draw_kernels(rows: Sequence[Tuple[str, List[Points]]], titles: Sequence[str]) -> Figure:
    """Draw one row of kernels for each (label, kernels), with the points over each kernel.

    Blue is negative, red is positive. A point's colour is its weight, relative to the largest of its kernel; its size
    is its radius. From the second row on, lines show how far points moved since the first.

    Example:
        >>> point = torch.zeros(1, 1, 2), torch.full((1, 1), 0.3), torch.ones(1, 1, 1), (9, 9)
        >>> len(draw_kernels([('before', [point]), ('after', [point])], ['a kernel']).axes)
        2
    """
    figure = Figure(figsize=(2.4 * len(titles) + 0.4, 2.6 * len(rows)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, kernels) in zip(axes, rows):
        for column, (axis, title, (coords, radius, weight, size)) in enumerate(zip(line, titles, kernels)):
            kernel = render_kernel(coords, radius, weight, size)[0, 0].numpy()
            limit = abs(kernel).max() or 1.
            # Samples are at the centres of their pixels, the outermost ones on the border of [-1, 1].
            half = [1 + 1 / max(k - 1, 1) for k in size]
            axis.imshow(
                kernel, cmap='RdBu_r', vmin=-limit, vmax=limit, extent=(-half[1], half[1], -half[0], half[0]))
            x, y = coords[0].T.numpy()
            if kernels is not rows[0][1]:
                x0, y0 = rows[0][1][column][0][0].T.numpy()
                axis.plot([x0, x], [y0, y], color='black', linewidth=0.8)
            height = weight[0, 0].numpy()
            axis.scatter(
                x, y, s=160 * radius[0].numpy(), c=height, cmap='RdBu_r',
                vmin=-abs(height).max(), vmax=abs(height).max(), edgecolors='black', linewidths=0.5)
            axis.set(xticks=[], yticks=[], title=f'{title}\n{label}, max |K| {limit:.2g}')
            axis.title.set_fontsize(8)
    return figure
