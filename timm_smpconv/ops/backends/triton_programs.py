"""Triton programs for depthwise convolution and its weight gradient, on tensor cores. Imported for CUDA tensors only.

A row of outputs is a product of input rows with banded Toeplitz matrices of the kernel's rows. Shapes: B batch,
C channels, H and W height and width, K and L height and width of the kernel, P = W rounded up to a power of two, at
least 16; R rows of outputs and T rows of the kernel that one program computes.

    S[c, s, j, i] = w[c, K - 1 - (s - R + 1), i - j + L // 2], zero outside the kernel    slabs (C, K + 2 (R - 1), P, P)
    y[b, c, g + r, j] = Σ_ti  x[b, c, g + t, i] S[c, s(t) + r, j, i]          s(t) = (K - 1) - (t + K // 2) + (R - 1)

As ky runs backwards in S, the slabs of R consecutive rows of outputs lie together, and each t is one product of a
(M, P) tile of x with an (R P, P) block of S. M runs over images and, where there are few, over groups of R rows.
Programs compute G for T rows of the kernel at once: one row of g then meets T rows of x.

    G[c, k, i, j] = Σ_bh x[b, c, h + k - K // 2, i] g[b, c, h, j]     dw[c, k, l] = Σ_j G[c, k, j + l - L // 2, j]

Every sum has a fixed order: the results are deterministic. Products of half precision are summed in float32; float32 is
computed in tf32 where PyTorch allows that in matrix products, else exactly.
"""
from typing import Optional

import torch
import triton
import triton.language as tl

from .triton_tiles import MOST_ROWS, ConvTile, CorrTile, columns, conv_tile, corr_tile, precision, stages, warps

__all__ = ['conv', 'corr']


@triton.jit
def _slabs_program(w, slabs, K, L, R: tl.constexpr, P: tl.constexpr):
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = K - 1 - (s - (R - 1))
    j, i = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    l = i - j + L // 2
    inside = (k >= 0) & (k < K) & (l >= 0) & (l < L)
    values = tl.load(w + (c * K + k) * L + l, mask=inside, other=0.)
    tl.store(slabs + ((c * (K + 2 * (R - 1)) + s) * P + j) * P + i, values.to(slabs.dtype.element_ty))


@triton.jit
def _conv_program(
        x, slabs, bias, y,
        B, C, H, W, K,
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
    channel = slabs + c * (K + 2 * (R - 1)) * P * P
    acc = tl.zeros((IMAGES * GROUPS, R * P), tl.float32)
    half = K // 2
    last_top = tl.minimum(first_group + GROUPS - 1, groups - 1) * R
    start = tl.maximum(-half, -last_top)
    end = tl.minimum(R - 1 + half, H - 1 - first_group * R)
    for t in range(start, end + 1):
        row = top + t
        inside = (b < B) & (row >= 0) & (row < H)
        a = tl.load(
            images[:, None] + row[:, None] * W + column[None, :],
            mask=inside[:, None] & (column[None, :] < W), other=0.)  # (M, P)
        s = (K - 1) - (t + half) + (R - 1)
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
        B, C, H, W, K,
        ALIGNED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):
    """G of one channel and T rows of the kernel, over all images and rows."""
    W = W // ALIGNED * ALIGNED
    first_k, c = tl.program_id(0) * T, tl.program_id(1).to(tl.int64)
    offset = first_k - K // 2
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
def _diagonals_program(products, dw, slabs, K, L, W, P: tl.constexpr, TAPS: tl.constexpr):
    """dw of one channel and one row of the kernel."""
    k, c = tl.program_id(0), tl.program_id(1).to(tl.int64)
    l, j = tl.arange(0, TAPS)[:, None], tl.arange(0, P)[None, :]
    i = j + l - L // 2
    inside = (i >= 0) & (i < W) & (j < W) & (l < L)
    values = tl.load(products + ((c * slabs + k) * P + i) * P + j, mask=inside, other=0.)
    l = tl.arange(0, TAPS)
    tl.store(dw + (c * K + k) * L + l, tl.sum(values, 1).to(dw.dtype.element_ty), mask=l < L)


def conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        tile: Optional[ConvTile] = None,
) -> torch.Tensor:
    """(B, C, H, W) and (C, 1, K, L), neither empty → (B, C, H, W), contiguous."""
    b, c, h, w = x.shape
    k, l = weight.shape[2:]
    x, weight = x.contiguous(), weight.contiguous()
    tile = tile or conv_tile(x)
    p = columns(w)
    r = max(1, min(tile.n // p, triton.next_power_of_2(h)))
    images = min(tile.m, triton.next_power_of_2(b))
    groups = triton.cdiv(h, r)
    group_tile = max(1, min(min(tile.m, 64) // images, triton.next_power_of_2(groups)))
    images = max(images, 16 // group_tile)
    slabs = x.new_empty(c, k + 2 * (r - 1), p, p)
    y = torch.empty_like(x)
    with _on(x):
        _slabs_program[c, slabs.shape[1]](weight, slabs, k, l, R=r, P=p)
        _conv_program[triton.cdiv(b, images) * triton.cdiv(groups, group_tile), c](
            x, slabs, bias, y, b, c, h, w, k, groups,
            ALIGNED=_aligned(w), HAS_BIAS=bias is not None, PRECISION=_input_precision(x),
            IMAGES=images, GROUPS=group_tile, R=r, P=p,
            num_warps=max(4, min(warps(tile, x), images * group_tile * r * p // 512)), num_stages=stages(tile, x))
    return y


def corr(
        grad: torch.Tensor,
        x: torch.Tensor,
        k: int,
        l: int,
        tile: Optional[CorrTile] = None,
) -> torch.Tensor:
    """(B, C, H, W) twice, not empty → (C, 1, K, L) in float32."""
    b, c, h, w = x.shape
    grad, x = grad.contiguous(), x.contiguous()
    tile = tile or corr_tile(x)
    p = columns(w)
    t = max(1, min(tile.m // p, MOST_ROWS, triton.next_power_of_2(k)))
    programs = triton.cdiv(k, t)
    products = x.new_empty(c, programs * t, p, p, dtype=torch.float32)
    dw = x.new_empty(c, 1, k, l, dtype=torch.float32)
    with _on(x):
        _products_program[programs, c](
            grad, x, products, b, c, h, w, k,
            ALIGNED=_aligned(w), PRECISION=_input_precision(x), ROWS=tile.step, T=t, P=p,
            num_warps=warps(tile, x) if p < 128 else 8, num_stages=stages(tile, x))
        _diagonals_program[k, c](products, dw, programs * t, k, l, w, P=p, TAPS=triton.next_power_of_2(l))
    return dw


def _aligned(width: int) -> int:
    """The largest power of two, at most 16, that divides the width."""
    return min(16, width & -width)


def _input_precision(x: torch.Tensor) -> str:
    return 'tf32' if precision(x) == 'tf32' else 'ieee'


def _on(x: torch.Tensor):
    """The device of x as the current one, on whose current stream programs are launched."""
    return torch.cuda.device_of(x)
