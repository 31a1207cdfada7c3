"""The command line: `timm-smpconv` or `python -m timm_smpconv`."""
import sys

from .tools.cli import main

if __name__ == '__main__':
    sys.exit(main())
