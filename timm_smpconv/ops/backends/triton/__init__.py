"""The backend 'triton': `backend.py` is imported with the package, the programs where Triton is needed."""
from .backend import conv as conv, unsupported as unsupported, weight_gradient as weight_gradient
