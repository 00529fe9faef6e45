"""`python -m sglang.launch_server` is `python -m moonlang.launch_server`."""

import sys

from moonlang.launch_server import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
