"""`python -m moonlang.router` is the command `moonlang router`."""

import sys

from moonlang.router.command import main

sys.exit(main())
