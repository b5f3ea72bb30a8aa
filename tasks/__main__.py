"""``python -m tasks``: the drydock command."""

import sys

from tasks.cli import main

if __name__ == "__main__":
    sys.exit(main())
