"""`python -m moonlang.disaggregation.mini_lb` is `python -m moonlang.router.mini_lb`: a door for those who look here.

Nothing is imported: an adapter knows nothing of what stands above it.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("moonlang.router.mini_lb", run_name="__main__", alter_sys=True)
