"""The engines: one file each, with how it writes a file and runs it, and the reason why it cannot."""
from .engine import Engine as Engine
from .table import ENGINES as ENGINES, PRECISIONS as PRECISIONS
