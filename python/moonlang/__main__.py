"""`python -m moonlang` is the command `moonlang`."""

import sys

from moonlang.cli.main import main

sys.exit(main())
