"""Triton programs for depthwise convolution and its weight gradient, on tensor cores. Imported for CUDA tensors only.

A row of outputs is a product of input rows with banded Toeplitz matrices of the kernel's rows. Shapes: B batch,
C channels, H and W height and width, KH and KW height and width of the kernel, P = W rounded up to a power of two,
at least 16; R rows of outputs and T rows of the kernel that one program computes.

    S[c, s, j, i] = w[c, KH - 1 - (s - R + 1), i - j + KW // 2], zero outside the kernel
    y[b, c, g + r, j] = Σ_ti  x[b, c, g + t, i] S[c, s(t) + r, j, i]
    s(t) = (KH - 1) - (t + KH // 2) + (R - 1)    slabs (C, KH + 2 (R - 1), P, P)

As ky runs backwards in S, the slabs of R consecutive rows of outputs lie together, and each t is one product of a
(M, P) tile of x with an (R P, P) block of S. M runs over images and, where there are few, over groups of R rows.
Programs compute G for T rows of the kernel at once: one row of g then meets T rows of x.

    G[c, kh, i, j] = Σ_bh x[b, c, h + kh - KH // 2, i] g[b, c, h, j]
    dw[c, kh, kw] = Σ_j G[c, kh, j + kw - KW // 2, j]

Every sum has a fixed order: the results are deterministic. Products of half precision are summed in float32; float32 is
computed in tf32 where PyTorch allows that in matrix products, else exactly.
"""
from typing import Optional

import torch
import triton
import triton.language as tl

from .tiles import MOST_ROWS, columns, conv_tile, gradient_tile, precision, stages, warps

__all__ = ['conv', 'weight_gradient']


@triton.jit
def _slabs_program(w, slabs, KH, KW, R: tl.constexpr, P: tl.constexpr):
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # A block, not a scalar, as masks must be in Triton's interpreter from 3.9 on.
    kh = KH - 1 - (s - (R - 1)) + tl.zeros((P, P), tl.int32)
    j, i = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    kw = i - j + KW // 2
    inside = (kh >= 0) & (kh < KH) & (kw >= 0) & (kw < KW)
    values = tl.load(w + (c * KH + kh) * KW + kw, mask=inside, other=0.)
    tl.store(slabs + ((c * (KH + 2 * (R - 1)) + s) * P + j) * P + i, values.to(slabs.dtype.element_ty))


@triton.jit
def _conv_program(
        x, slabs, bias, y,
        B, C, H, W, KH,
        groups,  # of R rows
        ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        IMAGES: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):
    # Programs of a channel are neighbours in the grid: they share its slabs in the cache.
    W = W // ALIGNED * ALIGNED  # tells the compiler that rows are aligned: it loads several columns at a time
    tile, c = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group_tiles = tl.cdiv(groups, GROUPS)
    first_group = tile % group_tiles * GROUPS
    m = tl.arange(0, IMAGES * GROUPS)
    b = (tile // group_tiles * IMAGES + m % IMAGES).to(tl.int64)
    top = (first_group + m // IMAGES) * R  # first row of outputs, g above
    column = tl.arange(0, P)
    n = tl.arange(0, R * P)
    images = x + (b * C + c) * H * W
    channel = slabs + c * (KH + 2 * (R - 1)) * P * P
    acc = tl.zeros((IMAGES * GROUPS, R * P), tl.float32)
    half = KH // 2
    last_top = tl.minimum(first_group + GROUPS - 1, groups - 1) * R
    start = tl.maximum(-half, -last_top)
    end = tl.minimum(R - 1 + half, H - 1 - first_group * R)
    for t in range(start, end + 1):
        row = top + t
        inside = (b < B) & (row >= 0) & (row < H)
        a = tl.load(
            images[:, None] + row[:, None] * W + column[None, :],
            mask=inside[:, None] & (column[None, :] < W), other=0.)  # (M, P)
        s = (KH - 1) - (t + half) + (R - 1)
        block = tl.load(channel + s * P * P + n[None, :] * P + column[:, None])  # (P, R P)
        acc = tl.dot(a, block, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    row, j = top[:, None] + n[None, :] // P, n[None, :] % P
    tl.store(
        y + (b[:, None] * C + c) * H * W + row * W + j, acc.to(y.dtype.element_ty),
        mask=(b[:, None] < B) & (row < H) & (j < W))


@triton.jit
def _products_program(
        grad, x, products,
        B, C, H, W, KH,
        ALIGNED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):
    """G of one channel and T rows of the kernel, over all images and rows."""
    W = W // ALIGNED * ALIGNED
    first_k, c = tl.program_id(0) * T, tl.program_id(1).to(tl.int64)
    offset = first_k - KH // 2
    m, column = tl.arange(0, T * P), tl.arange(0, P)
    t, i = m // P, m % P
    acc = tl.zeros((T * P, P), tl.float32)
    first, last = tl.maximum(0, 1 - T - offset), tl.minimum(H, H - offset)  # rows of grad that meet a row of x
    height = tl.maximum(last - first, 0)
    for start in range(0, B * height, ROWS):
        index = start + tl.arange(0, ROWS)
        b, h = (index // height).to(tl.int64), first + index % height
        inside = index < B * height
        base = ((b * C + c) * H + h) * W
        row = (h + offset)[None, :] + t[:, None]
        a = tl.load(
            x + (base + offset * W)[None, :] + (t * W + i)[:, None],
            mask=inside[None, :] & (i[:, None] < W) & (row >= 0) & (row < H), other=0.)  # (T P, ROWS)
        g = tl.load(
            grad + base[:, None] + column[None, :],
            mask=inside[:, None] & (column[None, :] < W), other=0.)  # (ROWS, P)
        acc = tl.dot(a, g, acc, input_precision=PRECISION)
    slabs = tl.num_programs(0) * T
    tl.store(products + (c * slabs + first_k) * P * P + m[:, None] * P + column[None, :], acc)


@triton.jit
def _diagonals_program(products, dw, slabs, KH, KW, W, P: tl.constexpr, TAPS: tl.constexpr):
    """dw of one channel and one row of the kernel."""
    kh, c = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kw, j = tl.arange(0, TAPS)[:, None], tl.arange(0, P)[None, :]
    i = j + kw - KW // 2
    inside = (i >= 0) & (i < W) & (j < W) & (kw < KW)
    values = tl.load(products + ((c * slabs + kh) * P + i) * P + j, mask=inside, other=0.)
    kw = tl.arange(0, TAPS)
    tl.store(dw + (c * KH + kh) * KW + kw, tl.sum(values, 1).to(dw.dtype.element_ty), mask=kw < KW)


def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """(B, C, H, W) and (C, 1, KH, KW), neither empty → (B, C, H, W), contiguous."""
    b, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    x, weight = x.contiguous(), weight.contiguous()
    tile = conv_tile(x)
    p = columns(w)
    r = max(1, min(tile.n // p, triton.next_power_of_2(h)))
    images = min(tile.m, triton.next_power_of_2(b))
    groups = triton.cdiv(h, r)
    group_tile = max(1, min(min(tile.m, 64) // images, triton.next_power_of_2(groups)))
    images = max(images, 16 // group_tile)
    slabs = x.new_empty(c, kh + 2 * (r - 1), p, p)
    y = torch.empty_like(x)
    with _on(x):
        _slabs_program[c, slabs.shape[1]](weight, slabs, kh, kw, R=r, P=p)
        _conv_program[triton.cdiv(b, images) * triton.cdiv(groups, group_tile), c](
            x, slabs, bias, y, b, c, h, w, kh, groups,
            ALIGNED=_aligned(w), HAS_BIAS=bias is not None, PRECISION=_input_precision(x),
            IMAGES=images, GROUPS=group_tile, R=r, P=p,
            num_warps=max(4, min(warps(tile, x), images * group_tile * r * p // 512)), num_stages=stages(tile, x))
    return y


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """(B, C, H, W) twice, not empty → (C, 1, KH, KW) in float32."""
    b, c, h, w = x.shape
    grad, x = grad.contiguous(), x.contiguous()
    tile = gradient_tile(x)
    p = columns(w)
    t = max(1, min(tile.m // p, MOST_ROWS, triton.next_power_of_2(kh)))
    programs = triton.cdiv(kh, t)
    products = x.new_empty(c, programs * t, p, p, dtype=torch.float32)
    dw = x.new_empty(c, 1, kh, kw, dtype=torch.float32)
    with _on(x):
        _products_program[programs, c](
            grad, x, products, b, c, h, w, kh,
            ALIGNED=_aligned(w), PRECISION=_input_precision(x), ROWS=tile.step, T=t, P=p,
            num_warps=warps(tile, x) if p < 128 else 8, num_stages=stages(tile, x))
        _diagonals_program[kh, c](products, dw, programs * t, kh, kw, w, P=p, TAPS=triton.next_power_of_2(kw))
    return dw


def _aligned(width: int) -> int:
    """The largest power of two, at most 16, that divides the width."""
    return min(16, width & -width)


def _input_precision(x: torch.Tensor) -> str:
    return 'tf32' if precision(x) == 'tf32' else 'ieee'


def _on(x: torch.Tensor):
    """The device of x as the current one, on whose current stream programs are launched."""
    return torch.cuda.device_of(x)
