"""``python -m quire``: the command line."""

import sys

from quire.server.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
