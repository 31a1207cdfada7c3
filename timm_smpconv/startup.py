"""Ctrl-C while the command line imports this package ends the process without a traceback.

The import takes seconds, most of them in torch. The package imports this module first; `__main__` calls `finished`.
"""
import signal
import sys
import threading
from pathlib import Path

__all__ = ['finished']

# What Python was started with: `timm-smpconv ARGS`, or `-m timm_smpconv ARGS` while argv is still `-m ARGS`.
_program = ''.join(sys.orig_argv[-len(sys.argv):][:1])
_deferred = (
    Path(_program).name in ('timm-smpconv', 'timm-smpconv.exe', 'timm_smpconv', '-mtimm_smpconv')
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
if _deferred:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if _deferred:
        signal.signal(signal.SIGINT, signal.default_int_handler)
