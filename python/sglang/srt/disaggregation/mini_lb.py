"""`python -m sglang.srt.disaggregation.mini_lb` under its SGLang name."""

import sys

from moonlang.router.mini_lb import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
