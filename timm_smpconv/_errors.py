"""The two kinds of errors: a wrong argument is a `ValueError`, wrong data are a `DataError`."""
import textwrap


class DataError(RuntimeError):
    """A file, a folder, a download or a network is not what it has to be."""


def one_line(error: BaseException, width: int = 400) -> str:
    """What an error says, in one line."""
    return textwrap.shorten(str(error), width, placeholder=' …')
