"""``python -m iokernels``: the same as the command ``iokernels``."""

import sys

from iokernels.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
