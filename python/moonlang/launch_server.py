"""`python -m moonlang.launch_server [flags]`: start a server and stay until it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moonlang.base.errors import ConfigError
from moonlang.config import alias
from moonlang.config.server_args import parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the server; 2 with a text on stderr when the configuration is wrong."""
    try:
        alias.check()
        args = parse(sys.argv[1:] if argv is None else argv)
        from moonlang.entrypoints.http_server import serve

        return serve(args)
    except ConfigError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:  # before the server minds signals by itself: while modules are loaded
        return 130


if __name__ == "__main__":
    sys.exit(main())
