"""The backends: one file each, with the convolution, its weight gradient and the reason why it cannot run."""
from .table import BACKENDS as BACKENDS, Backend as Backend
