"""Standard output and error that survive closed pipes and limited encodings."""
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Generator, TextIO, cast

__all__ = ['robust_output']


class _Robust:
    """A text stream that drops what nobody reads, and encodes as file names what its own encoding cannot."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.flush()
                self._stream.buffer.write(os.fsencode(text))
            self._stream.flush()
        except BrokenPipeError:  # from here on, and at exit, the stream writes to the null device
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        return len(text)


@contextmanager
def robust_output() -> Generator[None, None, None]:
    """Let the program go on where its output cannot: the reader has gone (`| head -n 1`), or knows ASCII only.

    Every line is flushed. Paths come out as the bytes that they have on the disk, whatever the encoding.

    Example:
        >>> with robust_output():
        ...     print('48×48')
        48×48
    """
    with redirect_stdout(cast(TextIO, _Robust(sys.stdout))), redirect_stderr(cast(TextIO, _Robust(sys.stderr))):
        yield
