"""Entry point of the command `timm-smpconv`.

Importing the package takes seconds, most of them in torch, and any module inside it imports the package first. This one
does not, so that Ctrl-C during the import ends the process without a traceback.
"""
import signal


def main() -> int:
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from timm_smpconv.__main__ import main as run
    signal.signal(signal.SIGINT, handler)
    return run()
