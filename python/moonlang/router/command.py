"""The command `moonlang router`, which is `python -m moonlang.router` too: start a router and stay until it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from moonlang.base.errors import ConfigError
from moonlang.router.args import parse


def main(argv: Sequence[str] | None = None, prog: str = "moonlang router", **defaults: Any) -> int:
    """The exit status of the router; 2 with a text on stderr when the configuration is wrong.

    defaults: of flags, where they differ from those of `RouterArgs`.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv, prog, **defaults)
        from moonlang.router.server import serve

        return serve(args)
    except ConfigError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_status
