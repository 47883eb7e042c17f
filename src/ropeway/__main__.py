"""`python -m ropeway`: the `ropeway` command."""

import sys

from ropeway.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
