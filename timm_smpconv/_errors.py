"""The two kinds of errors: a wrong argument is a `ValueError`, wrong data are a `DataError`."""


class DataError(RuntimeError):
    """A file, a folder, a download or a network is not what it has to be."""
