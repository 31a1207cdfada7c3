"""The backend that a caller requests, and where a request cannot be met."""
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generator, Optional

import torch

from ..backends import BACKENDS

__all__ = ['check_exportable', 'is_exporting', 'requested', 'requested_backend', 'use_backend']

_TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])
_requested: ContextVar[Optional[str]] = ContextVar('timm_smpconv_backend', default=None)


@contextmanager
def use_backend(name: str) -> Generator[None, None, None]:
    """Compute all convolutions called inside, and their gradients, by one of `BACKENDS`.

    It holds for the current thread (or asyncio task) alone: not for the replicas of `nn.DataParallel`, nor for a
    backward pass that computes checkpointed layers again in another thread (the models of this package see to that).
    `torch.compile` cannot trace it, and before torch 2.14 does not see it: in compiled code pass `backend=` to
    `depthwise_conv2d`.

    Args:
        name: 'native', 'contiguous', 'channels_last', 'fft' or 'triton'.

    Raises:
        ValueError: There is no such backend. A convolution raises it, too, if the backend cannot run there.

    Example:
        >>> from timm_smpconv import depthwise_conv2d, use_backend
        >>> with use_backend('fft'):
        ...     y = depthwise_conv2d(torch.randn(1, 8, 14, 14), torch.randn(8, 1, 27, 27))
    """
    _check('name', name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> Optional[str]:
    """The backend of the innermost `use_backend`, None outside; also None in code that torch before 2.14 compiles."""
    if _TORCH < (2, 14) and torch.compiler.is_compiling():
        return None
    return _requested.get()


def requested(backend: Optional[str]) -> Optional[str]:
    """The argument `backend` of an operator if it is given, else the `requested_backend`.

    Raises:
        ValueError: There is no such backend.
    """
    if backend is None:
        return requested_backend()
    _check('backend', backend)
    return backend


def _check(argument: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f'{argument} must be one of {", ".join(BACKENDS)}, got {name!r}')


@torch.compiler.assume_constant_result  # torch 2.8 answers True to every compiler that traces the question
def is_exporting() -> bool:
    """Whether a graph is captured to leave PyTorch, in which the operator has to be a standard convolution."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def check_exportable(backend: Optional[str]) -> None:
    """Raise if a backend is requested that a graph to be exported cannot hold."""
    if backend not in (None, 'native'):
        raise ValueError(f'backend {backend!r} was requested and cannot run: an exported graph holds F.conv2d')
