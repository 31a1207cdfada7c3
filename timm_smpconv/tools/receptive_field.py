"""The effective receptive field: on which part of an image the centre of a network's last map depends.

Shapes: B batch, C channels, H and W height and width of the images, N tokens.

Sources: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016,
https://arxiv.org/abs/1701.04128; as a picture and a table in Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting
Large Kernel Design in CNNs", CVPR 2022, https://arxiv.org/abs/2203.06717.
"""
from contextlib import contextmanager
from typing import Any, Generator, Iterable, Mapping, NamedTuple, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..surgery.replace import evaluation_mode

__all__ = ['SHARES', 'Square', 'receptive_field', 'share_table', 'smallest_square']

SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution, those of the RepLKNet paper's table


class Square(NamedTuple):
    """A square of pixels."""
    top: int
    left: int
    side: int


def receptive_field(model: nn.Module, images: Iterable[torch.Tensor]) -> torch.Tensor:
    r"""The effective receptive field of a network: a mean absolute gradient.

    For an image x and the last map F with its centre z, entry (h, w) is the mean over the images of

    .. math:: \sum_c \left| \frac{\partial}{\partial x_{chw}} \sum_k \max(0, F_{kz}) \right|

    The centre of a map of even size is the entry below and to the right of its middle. The model runs in evaluation
    mode and is restored afterwards. Images are read one batch at a time, so memory does not depend on their number.

    Args:
        model: The last map is what its `forward_features` returns, or what the module itself returns if it has no such
            method. A map is (B, C, H', W'), or (B, H', W', C) if the model's `output_fmt` is 'NHWC', or tokens
            (B, N, C) of the grid of its `patch_embed`.
        images: Batches (B, C, H, W), all of the same H and W; converted to the model's device and dtype.

    Returns:
        (H, W), float64, on the CPU.

    Raises:
        ValueError: There are no images, they differ in size, the model has no last map, its gradient is not finite, or
            its centre does not depend on the images.

    Example:
        The field of a convolution is its kernel, without signs:

        >>> conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = conv.load_state_dict({'weight': torch.arange(9.).view(1, 1, 3, 3)})
        >>> receptive_field(conv, [torch.ones(1, 1, 5, 5)])[1:4, 1:4].int()
        tensor([[0, 1, 2],
                [3, 4, 5],
                [6, 7, 8]], dtype=torch.int32)
    """
    features = getattr(model, 'forward_features', model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    total, count = torch.zeros(0, 0, dtype=torch.float64), 0
    with _frozen(model), torch.inference_mode(False), torch.enable_grad():
        for batch in images:
            if batch.ndim != 4 or (count and batch.shape[2:] != total.shape):
                raise ValueError(
                    'images must be batches (B, C, H, W) of one size, '
                    f'got {tuple(batch.shape)}{f" after {tuple(total.shape)}" if count else ""}')
            x = batch.detach().to(like, copy=True).requires_grad_()
            (gradient,) = torch.autograd.grad(F.relu(_centre(model, features(x))).sum(), x)
            field = gradient.abs().sum((0, 1)).cpu().double()  # (H, W)
            total = total + field if count else field
            count += len(batch)
    if not count:
        raise ValueError('images must hold at least one batch, got none')
    if not total.isfinite().all() or not total.any():
        fault = 'zero everywhere' if total.isfinite().all() else 'infinity or NaN'
        raise ValueError(
            f'model must have a finite gradient of the centre of its last map that is not zero, got {fault}')
    return total / count


def _centre(model: nn.Module, features: Any) -> torch.Tensor:
    """The features of the centre, (B, C)."""
    if isinstance(features, torch.Tensor) and features.ndim == 4:
        if getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
            features = features.permute(0, 3, 1, 2)
        return features[:, :, features.shape[2] // 2, features.shape[3] // 2]
    if isinstance(features, torch.Tensor) and features.ndim == 3:
        grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
        prefix = int(getattr(model, 'num_prefix_tokens', 0))
        if grid and features.shape[1] == prefix + grid[0] * grid[1]:
            return features[:, prefix + grid[0] // 2 * grid[1] + grid[1] // 2]
    found = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
    raise ValueError(
        f'model must have a last map, (B, C, H, W), or tokens of a grid, (B, N, C), got {found} from '
        f'{type(model).__name__}')


@contextmanager
def _frozen(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode, without gradients of the parameters, which would be computed in vain."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for p in parameters:
            p.requires_grad_()


def smallest_square(field: torch.Tensor, share: float) -> Square:
    """The smallest square of pixels, wherever it lies, that holds a share of a field's sum; the first of several.

    It need not be in the middle of the image, because the centre of the last map seldom is: for `resnet50` at 224
    pixels it is 16 pixels away. If the border cuts off the field, it cuts off the square as well.

    Args:
        field: (H, W), not negative.
        share: In (0, 1].

    Example:
        >>> field = torch.zeros(9, 9)
        >>> field[3:6, 4:7] = 1
        >>> smallest_square(field, 0.99)
        Square(top=3, left=4, side=3)
    """
    if field.ndim != 2 or not field.numel() or not field.min() >= 0 or not field.any():
        raise ValueError(f'field must be (H, W), not negative and not zero everywhere, got shape {tuple(field.shape)}')
    if not 0 < share <= 1:
        raise ValueError(f'share must be above 0 and at most 1, got {share}')
    sums = F.pad(field.double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # (H + 1, W + 1): sums above and to the left
    least = share * sums[-1, -1] * (1 - 1e-9)  # sums have rounding errors
    low, high = 1, max(field.shape)
    while low < high:  # a larger square holds at least as much
        side = (low + high) // 2
        low, high = (low, side) if _sums_of_squares(sums, side).max() >= least else (side + 1, high)
    squares = _sums_of_squares(sums, low)
    top, left = divmod(int(squares.argmax()), squares.shape[1])
    return Square(top, left, low)


def _sums_of_squares(sums: torch.Tensor, side: int) -> torch.Tensor:
    """The sums of all squares with this side, from the sums of all rectangles at the upper left corner."""
    h, w = (min(side, n - 1) for n in sums.shape)
    return sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]


def share_table(fields: Mapping[str, torch.Tensor], shares: Sequence[float] = SHARES) -> str:
    """A Markdown table: the sides of the smallest squares that hold shares of fields, in percent of the image's side.

    Args:
        fields: Name of a model → its field, (H, W).
        shares: Each in (0, 1].

    Example:
        >>> print(share_table({'a_model': torch.eye(10)}))
        | model   |  20 % |  30 % |  50 % |  99 % |
        | ------- | ----- | ----- | ----- | ----- |
        | a_model |  20.0 |  30.0 |  50.0 | 100.0 |
    """
    width = max(len(name) for name in ('model', *fields))
    lines = [
        f'| {"model":{width}} |' + ''.join(f' {f"{100 * share:g} %":>5} |' for share in shares),
        f'| {"-" * width} |' + ' ----- |' * len(shares),
    ]
    for name, field in fields.items():
        sides = (100 * smallest_square(field, share).side / max(field.shape) for share in shares)
        lines.append(f'| {name:{width}} |' + ''.join(f' {side:>5.1f} |' for side in sides))
    return '\n'.join(lines)
