"""SGLang's small load balancer: the router with what is usual there, port 8000 and pairs drawn by lot."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moonlang.router import command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    return command.main(argv, "mini_lb", port=8000, policy="random", decode_policy="random", pd_disaggregation=True)


if __name__ == "__main__":
    sys.exit(main())
