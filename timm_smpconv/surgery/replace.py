"""Replace the depthwise convolutions of any network by SMP convolutions.

Shapes: B batch, C channels, k×k samples of an old kernel and K×K of the new one (which may also be rectangular), N the
number of all samples of a kernel, P points, R rows that span the kernels of all channels.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Dict, Generator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, to_2tuple
from torch.utils._pytree import tree_leaves

from ..layers._folding import forward_of
from ..layers.small_conv import DepthwiseConv2d
from ..layers.smp_conv import SMPConv2d
from ..layers.smp_kernel import SMPKernel
from ..ops.render import grid

__all__ = ['ReplaceReport', 'Replacement', 'evaluation_mode', 'replace_depthwise', 'tensors']

_Size = Tuple[int, int]
_int_or_pair = Union[int, _Size]
_Sizes = Mapping[Union[str, int, _Size], Optional[_int_or_pair]]

# Lengths are in distances between neighbouring samples. A point exactly on a sample, with a cone that ends exactly at
# its neighbours, would never move: |x| has no gradient at its kink, nor has ReLU.
OFFSET = 0.02  # of a point from its sample, on each axis, towards the centre
EXACT_RADIUS = 0.99  # ends before the neighbours; with that offset the nearest is at a distance of 1
START_RADIUS = 1.5  # of fewer points than samples
LEAST_RADIUS = 0.75  # with a smaller one a point might reach no sample
STEPS = 200
RATE = 0.05  # Adam's, falling to 0
RIDGE = 1e-3  # keeps the weights of points that come close from growing against each other

MERGING_METHODS = ('fuse', 'reparameterize', 'switch_to_deploy')  # that `timm.utils.reparameterize_model` calls


class Replacement(NamedTuple):
    """One convolution that was replaced, or several places of a network that share it.

    Attributes:
        name: Of the module in the network.
        old_size: (k rows, k columns).
        kernel_size: (K rows, K columns).
        points: Number of points P.
        error: Norm of the difference between the new kernels and the old ones, padded with zeros, relative to the
            norm of the old ones. NaN on the meta device.
        worst: The same for the channel where it is largest. Channels of zeros do not count.
    """
    name: str
    old_size: _Size
    kernel_size: _Size
    points: int
    error: float
    worst: float


@dataclass(frozen=True)
class ReplaceReport:
    """What `replace_depthwise` did. As a string it is a table.

    Attributes:
        replaced: One entry per convolution.
        left: Why each other depthwise convolution was left alone, by its name.
        logits: Norm of the difference between the network's outputs after and before, relative to the norm before.
            None without images, or if the shapes of the outputs depend on their values.

    Example:
        >>> row = Replacement('stem.conv', (7, 7), (13, 13), 79, 1.25e-7, 3e-7)
        >>> print(ReplaceReport([row], {'down.conv': 'has stride 2×2'}, 2e-7))
        convolution  kernel       points  error    worst channel
        stem.conv    7×7 → 13×13  79      1.2e-07  3.0e-07
        The outputs moved by 2.0e-07.
        Left alone (has stride 2×2): down.conv.
    """
    replaced: List[Replacement]
    left: Dict[str, str]
    logits: Optional[float]

    def __str__(self) -> str:
        rows = [('convolution', 'kernel', 'points', 'error', 'worst channel')]
        for r in self.replaced:
            sizes = f'{_text(r.old_size)} → {_text(r.kernel_size)}'
            rows.append((r.name, sizes, str(r.points), f'{r.error:.1e}', f'{r.worst:.1e}'))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if self.logits is not None:
            lines.append(f'The outputs moved by {self.logits:.1e}.')
        names: Dict[str, List[str]] = {}
        for name, reason in self.left.items():
            names.setdefault(reason, []).append(name)
        for reason, those in names.items():
            more = f' and {len(those) - 3} more' if len(those) > 3 else ''
            lines.append(f'Left alone ({reason}): {", ".join(those[:3])}{more}.')
        return '\n'.join(lines)


def replace_depthwise(
        model: nn.Module,
        kernel_size: Union[_int_or_pair, _Sizes, None] = None,
        min_size: int = 7,
        fit: bool = True,
        *,
        points: Optional[int] = None,
        images: Optional[torch.Tensor] = None,
) -> ReplaceReport:
    """Replace depthwise convolutions of a network by SMP convolutions of the same or a larger size, in place.

    With `fit`, the points are fitted to the old kernels, and the network goes on from where it was. A larger kernel
    has the k×k samples of the old one at its centre and zeros around them. With at least k * k points, the new kernels
    equal the old ones up to rounding: one point stands at each old sample, and the others have weight 0 and are drawn
    as in a new `SMPKernel`. With fewer points, the weights are the least squares fit to all channels, and the positions
    and radii minimize its residual by gradient descent (variable projection; Golub and Pereyra, 1973). The fit runs in
    float64 on the CPU and draws no global random numbers, so the same network gives the same points on every device.

    This replaces every depthwise `nn.Conv2d` of stride 1 and dilation 1 that has odd kernels and whose zero padding
    keeps the size. It leaves everything else alone, and the report says why. A bias stays the same parameter. A module
    that is used in several places is replaced by one module. Frozen weights become frozen points.

    Args:
        model: Any network, in either mode. It must contain the convolutions: it cannot itself be replaced.
        kernel_size: The odd size of all new kernels; None to keep the old sizes; or a dict, of which the first matching
            entry counts. Convolutions that match no entry are left alone. The keys are old sizes, as in `{7: 31}`, or
            names of modules with the wildcards of `fnmatch`, as in `{'stages.0.*': 31, 'stages.3.*': None}`.
        min_size: Leave kernels with a shorter side than this alone, whatever `kernel_size` says.
        fit: Fit the points to the old kernels. If false, they get the initial values of `SMPConv2d`, for training from
            scratch or for loading the weights of a replaced network.
        points: The number of points of each kernel. The default is k * k, plus a quarter of the samples that a larger
            kernel adds.
        images: Images (B, channels, H, W) on which to compare the outputs. The default is two images of random numbers,
            if the model has a `pretrained_cfg` with an input size, as timm's models have.

    Returns:
        How far each kernel and the outputs moved, and what was left alone.

    Raises:
        ValueError: An argument breaks the rules above, no convolution can be replaced, an entry of the dict matches
            none that can be, kernels to fit are on the meta device or not finite, or the model fails on random images.
            The model is unchanged after any error.

    Example:
        >>> import timm, timm_smpconv
        >>> model = timm.create_model('convnext_atto')
        >>> report = timm_smpconv.replace_depthwise(model, {'stages.0.*': 31, 'stages.1.*': 13})
        >>> [(r.name, r.points) for r in report.replaced]
        [('stages.0.blocks.0.conv_dw', 277), ('stages.0.blocks.1.conv_dw', 277), \
('stages.1.blocks.0.conv_dw', 79), ('stages.1.blocks.1.conv_dw', 79)]
        >>> report.logits < 1e-5, report.left['stages.2.blocks.0.conv_dw']
        (True, 'is matched by no entry of kernel_size')
    """
    for name, value in (('min_size', min_size), ('points', points)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f'{name} must be an integer of at least 1, got {value!r}')
    if images is not None and not (isinstance(images, torch.Tensor) and images.is_floating_point()):
        found = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f'images must be a floating-point tensor, got {found}')
    places, left = _candidates(model)
    sizes = _chosen_sizes(places, left, kernel_size, min_size)
    if not sizes:
        raise ValueError(f'model must have a depthwise convolution that can be replaced, got {_why_none(model, left)}')
    with torch.inference_mode(False):
        new = {conv: _smp_conv(conv, places[conv].name, size, points, fit) for conv, size in sizes.items()}
        replaced = [_replacement(places[conv].name, conv, smp) for conv, smp in new.items()]
        before = _first_outputs(model, images)
        swapped = []
        try:
            for conv, smp in new.items():
                for parent, child in places[conv].parents:
                    swapped.append((parent, child, conv))
                    setattr(parent, child, smp)
            logits = None if before is None else _distance(_outputs(model, before[0]), before[1])
        except BaseException:  # an interrupt, too: all or nothing
            for parent, child, conv in swapped:
                setattr(parent, child, conv)
            raise
    return ReplaceReport(replaced, left, logits)


class _Place(NamedTuple):
    """Where a module is."""
    name: str  # the first of its names
    names: List[str]
    parents: List[Tuple[nn.Module, str]]


def _candidates(model: nn.Module) -> Tuple[Dict[Any, _Place], Dict[str, str]]:
    """Where the convolutions are that an SMP convolution can replace, and why other depthwise ones are left alone."""
    owners: Dict[int, List[str]] = {}
    places: Dict[Any, _Place] = {}
    for name, module in model.named_modules():
        for parameter in set(module._parameters.values()) - {None}:
            owners.setdefault(id(parameter), []).append(name)
        if _is_depthwise(module):
            places[module] = _Place(name, [], [])
    everything = dict(model.named_modules(remove_duplicate=False))
    for name, parent in everything.items():
        for child, module in parent._modules.items():
            if module in places:
                places[module].names.append(f'{name}.{child}' if name else child)
                if (parent, child) not in places[module].parents:
                    places[module].parents.append((parent, child))
    left = {}
    for module, place in list(places.items()):
        reason = _reason(module)
        if not reason and not place.parents:
            reason = 'is the model itself'
        if not reason and len(owners[id(module.weight)]) > 1:
            others = ' and '.join(other for other in owners[id(module.weight)] if other != place.name)
            reason = f'shares its weight with {others}'
        if not reason:
            above = (everything[name[:i]] for name in place.names for i, c in enumerate(name) if c == '.')
            merging = next((m for m in above if any(hasattr(type(m), method) for method in MERGING_METHODS)), None)
            if merging is not None:
                reason = f'is part of a {type(merging).__name__}, which reads its weight to merge it'
        if reason:
            left[place.name] = reason
            del places[module]
    return places, left


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels and (
        module.groups > 1 or module.out_channels == 1)


def _reason(conv: Any) -> str:
    """Why a depthwise convolution cannot become an SMP convolution; empty if it can."""
    kind = type(conv).__name__
    if not isinstance(conv, nn.Conv2d):
        return f'is a {kind}'
    same = forward_of(conv) is Conv2dSame.forward  # at stride 1 it pads odd kernels on both sides alike
    plain = getattr(conv._conv_forward, '__func__', None) is nn.Conv2d._conv_forward
    if not same and not (plain and forward_of(conv) in (nn.Conv2d.forward, DepthwiseConv2d.forward)):
        return f'is a {kind} with a forward of its own'
    parameters = [p for p in (conv._parameters.get('weight'), conv.bias) if p is not None]
    if set(conv._parameters) != {'weight', 'bias'} or any(type(p) is not nn.Parameter for p in parameters):
        return 'computes its weight from others: it is parametrised, pruned, quantised or sharded'
    if any(getattr(conv, f'_{name}') for name in (
            'forward_hooks', 'forward_pre_hooks', 'backward_hooks', 'backward_pre_hooks')):
        return 'has hooks'
    if not conv.weight.is_floating_point():
        return f'has weights of {conv.weight.dtype}'
    if conv.out_channels != conv.groups:
        return f'has {conv.out_channels // conv.groups} kernels per channel'
    size = conv.kernel_size
    for name, value in (('stride', conv.stride), ('dilation', conv.dilation)):
        if value != (1, 1):
            return f'has {name} {_text(value)}'
    if any(k % 2 == 0 for k in size):
        return f'has an even kernel, {_text(size)}'
    if conv.padding_mode != 'zeros':
        return f'has padding_mode {conv.padding_mode!r}'
    if not same and conv.padding not in ('same', (size[0] // 2, size[1] // 2)):
        padding = repr(conv.padding) if isinstance(conv.padding, str) else _text(conv.padding)
        return f'has padding {padding}, which does not keep the size'
    return ''


def _chosen_sizes(
        places: Dict[Any, _Place],
        left: Dict[str, str],
        kernel_size: Union[_int_or_pair, _Sizes, None],
        min_size: int,
) -> Dict[Any, _Size]:
    """The new size of each convolution to replace; adds to `left` why others are not."""
    entries = kernel_size.items() if isinstance(kernel_size, Mapping) else [('*', kernel_size)]
    rules = [
        (key if isinstance(key, str) else _pair('an old size in kernel_size', key, odd=False),
         None if value is None else _pair('kernel_size', value, odd=True))
        for key, value in entries]
    sizes, used = {}, set()
    for conv, place in places.items():
        old = conv.kernel_size
        found = next((rule for rule in rules if _matches(rule[0], place.names, old)), None)
        if min(old) < min_size:
            left[place.name] = f'is {_text(old)}, with a side shorter than min_size = {min_size}'
        elif found is None:
            left[place.name] = 'is matched by no entry of kernel_size'
        elif found[1] is not None and (found[1][0] < old[0] or found[1][1] < old[1]):
            left[place.name] = f'is {_text(old)}, larger than kernel_size = {_text(found[1])}'
        else:
            sizes[conv] = found[1] or old
            used.add(found[0])
    if isinstance(kernel_size, Mapping) and sizes:
        for key, _ in rules:
            if key not in used:
                raise ValueError(
                    f'every entry of kernel_size must match a convolution that can be replaced and that no entry '
                    f'before it matches, got {key!r}, which matches none')
    return sizes


def _matches(rule: Union[str, _Size], names: List[str], size: _Size) -> bool:
    return any(fnmatchcase(name, rule) for name in names) if isinstance(rule, str) else rule == size


def _pair(name: str, size: Any, odd: bool) -> _Size:
    pair = tuple(to_2tuple(size))
    if len(pair) != 2 or not all(isinstance(k, int) and k > 0 and (k % 2 or not odd) for k in pair):
        raise ValueError(f'{name} must be one or two positive {"odd " if odd else ""}integers, got {size!r}')
    return pair[0], pair[1]


def _text(size: Tuple[int, ...]) -> str:
    return '×'.join(map(str, size))


def _why_none(model: nn.Module, left: Dict[str, str]) -> str:
    if not left:
        return f'{type(model).__name__} without any'
    name, reason = next(iter(left.items()))
    more = f', and {len(left) - 1} more are left alone' if len(left) > 1 else ''
    return f'{type(model).__name__}, where {name or "the convolution"} {reason}{more}'


def _smp_conv(conv: Any, name: str, size: _Size, points: Optional[int], fit: bool) -> SMPConv2d:
    """The SMP convolution of a size that takes the place of a depthwise one."""
    old = math.prod(conv.kernel_size)
    channels, count = conv.in_channels, points or old + (math.prod(size) - old) // 4
    weight = conv.weight.detach()
    if fit and (weight.is_meta or not weight.isfinite().all()):
        found = 'the meta device' if weight.is_meta else 'NaN or infinity'
        raise ValueError(f'model must have finite kernels to fit points to, got {found} in {name}.weight')
    smp = SMPConv2d(
        channels, channels, size, padding='same', groups=channels, bias=False, points=count,
        device='meta' if fit else weight.device, dtype=weight.dtype)
    if fit:
        values = _fitted(weight.squeeze(1).to('cpu', torch.float64), smp.kernel)
        for key, value in zip(('coords', 'radius', 'weight'), values):
            like = getattr(smp.kernel, key)
            setattr(smp.kernel, key, nn.Parameter(value.unsqueeze(0).to(weight.device, like.dtype)))
    smp.bias = conv.bias
    smp.kernel.requires_grad_(conv.weight.requires_grad)
    return smp.train(conv.training)


def _fitted(target: torch.Tensor, kernel: SMPKernel) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, (P, 2), radii, (P,), and weights, (C, P), that render a target, (C, k, k), inside a kernel."""
    step = min((2 / (n - 1) for n in kernel.size if n > 1), default=1.)  # between neighbouring samples
    samples = _samples(kernel.size, target.shape[1:])
    start = samples - torch.where(samples > 0, OFFSET * step, -OFFSET * step)
    count, largest = kernel.coords.shape[1], kernel.radius_range[1]
    if count < len(samples):
        return _descend(target, kernel.size, start, step, count, largest)
    others, dtype = count - len(samples), kernel.coords.dtype
    radius = torch.cat([
        start.new_full([len(start)], EXACT_RADIUS * step), start.new_full([others], kernel.init_radius)])
    drawn = start.new_empty(others, 2)
    nn.init.trunc_normal_(
        drawn, kernel.coords_mean, kernel.coords_std, -1., 1., generator=torch.Generator('cpu').manual_seed(0))
    # Heights of the cones at their samples after rounding: a float32 near 1 is coarse beside the step of a large kernel
    start, radius = start.to(dtype), radius.to(dtype)
    samples = _samples(kernel.size, target.shape[1:], dtype)
    height = 1 - (start.double() - samples.double()).abs().sum(1) / radius[:len(start)].double()
    return torch.cat([start, drawn.to(dtype)]), radius, F.pad(target.flatten(1) / height, (0, others))


def _descend(
        target: torch.Tensor,
        size: Sequence[int],
        samples: torch.Tensor,
        step: float,
        count: int,
        largest: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit fewer points than samples: start at the strongest samples and minimize the residual of the least squares.

    The residual's gradient is the one with the weights held fixed, since they are optimal (the envelope theorem).
    """
    grown = [(n - k) // 2 for n, k in zip(size, target.shape[1:])]
    padding = [grown[1], grown[1], grown[0], grown[0]]
    _, values, basis = torch.linalg.svd(target.flatten(1), full_matrices=False)
    rows = values.unsqueeze(1) * basis / values.norm().clamp(min=torch.finfo(values.dtype).tiny)
    rows = F.pad(rows.unflatten(1, target.shape[1:]), padding).flatten(1)  # (R, N), which spans all channels
    everywhere = _samples(size, size)  # (N, 2)
    strongest = target.flatten(1).square().sum(0).topk(count).indices
    coords = samples[strongest] / step
    radius = coords.new_full([count], min(START_RADIUS, largest / step))
    best = math.inf, coords, radius
    with torch.enable_grad():
        coords, radius = coords.clone().requires_grad_(), radius.clone().requires_grad_()
        optimizer = torch.optim.Adam([coords, radius], lr=RATE)
        for i in range(STEPS):
            cones = _cones(coords * step, radius * step, everywhere)
            weight = _least_squares(cones.detach(), rows)
            loss = (weight @ cones - rows).square().sum() + RIDGE * weight.square().sum()
            if loss.item() < best[0]:
                best = loss.item(), coords.detach().clone(), radius.detach().clone()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]['lr'] = RATE * (1 - i / STEPS)
            optimizer.step()
            with torch.no_grad():
                coords.clamp_(-1 / step, 1 / step)
                radius.clamp_(LEAST_RADIUS, largest / step)
    coords, radius = best[1] * step, best[2] * step
    return coords, radius, _least_squares(_cones(coords, radius, everywhere), F.pad(target, padding).flatten(1))


def _samples(size: Sequence[int], window: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Positions of the samples of a kernel in a central window of it, row by row, (N, 2)."""
    rows, columns = (grid(n, torch.device('cpu'), dtype)[(n - k) // 2:(n + k) // 2] for n, k in zip(size, window))
    y, x = torch.meshgrid(-rows, columns, indexing='ij')
    return torch.stack([x, y], -1).flatten(0, 1)


def _cones(coords: torch.Tensor, radius: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """What each point adds to each sample per weight, (P, N)."""
    return F.relu(1 - torch.cdist(coords, samples, p=1) / radius.unsqueeze(1))


def _least_squares(cones: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weights with which cones, (P, N), come closest to rows, (R, N): (R, P)."""
    normal = cones @ cones.T
    normal.diagonal().add_(RIDGE)
    return torch.cholesky_solve(cones @ rows.T, torch.linalg.cholesky(normal)).T


@torch.no_grad()
def _replacement(name: str, conv: Any, smp: SMPConv2d) -> Replacement:
    old, size = conv.weight.detach(), (smp.kernel_size[0], smp.kernel_size[1])
    points = smp.kernel.coords.shape[1]
    if old.is_meta:
        return Replacement(name, conv.kernel_size, size, points, math.nan, math.nan)
    old = old.to('cpu', torch.float64)
    grown = [(n - k) // 2 for n, k in zip(size, old.shape[2:])]
    new = smp.render().to(conv.weight.dtype).to('cpu', torch.float64)
    moved = new - F.pad(old, [grown[1], grown[1], grown[0], grown[0]])
    norms, moves = old.flatten(1).norm(dim=1), moved.flatten(1).norm(dim=1)  # (C,)
    worst = (moves / norms)[norms > 0].max().item() if norms.any() else 0.
    return Replacement(name, conv.kernel_size, size, points, _relative(moves, norms), worst)


def _relative(moves: torch.Tensor, norms: torch.Tensor) -> float:
    moved, norm = moves.norm().item(), norms.norm().item()
    return moved / norm if norm != 0 else 0. if moved == 0 else moved * math.inf  # NaN stays NaN


def _first_outputs(
        model: nn.Module,
        images: Optional[torch.Tensor],
) -> Optional[Tuple[torch.Tensor, List[torch.Tensor]]]:
    """Images and what a model makes of them: those given, or random ones of the size that a model of timm expects."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    if first.weight.is_meta:
        return None
    if images is not None:
        images = images.to(first.weight.device, first.weight.dtype)
        return images, _outputs(model, images)
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, Mapping) or not cfg.get('input_size'):
        return None
    shape = (2, first.in_channels, *cfg['input_size'][1:])  # the configuration does not know `in_chans`
    images = torch.randn(shape, generator=torch.Generator('cpu').manual_seed(0), device='cpu')
    images = images.to(first.weight.device, first.weight.dtype)
    try:
        return images, _outputs(model, images)
    except Exception as error:
        raise ValueError(
            f'images must be given for a model that fails on random ones, got {type(error).__name__} for shape '
            f'{shape}: {error}') from error


@torch.no_grad()
def _outputs(model: nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """All tensors that a model returns in evaluation mode; it stays in its mode."""
    with evaluation_mode(model):
        return [y.detach().to('cpu', torch.float64) for y in tensors(model(images))]


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode, and then the mode of each module again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False  # `eval()` may do more than this in a module that overrides `train`
        yield
    finally:
        for module, training in modes:
            module.training = training


def tensors(output: Any) -> List[torch.Tensor]:
    """All tensors that a model returned, in tuples, lists, dicts and what PyTorch knows as such."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _distance(after: List[torch.Tensor], before: List[torch.Tensor]) -> Optional[float]:
    if not before or [y.shape for y in after] != [y.shape for y in before]:
        return None
    moves = torch.stack([(a - b).norm() for a, b in zip(after, before)])
    return _relative(moves, torch.stack([b.norm() for b in before]))
