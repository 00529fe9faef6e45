"""Start-up is short: libraries that take seconds to import are not imported before something needs them."""

import subprocess
import sys
from pathlib import Path

import moonlang

SOURCE = """
import sys
import moonlang.model_executor.runner, moonlang.models.llama, moonlang.models.transformers
import moonlang.constrained.xgrammar, moonlang.attention.torch_native
print(sorted({"transformers", "xgrammar", "sympy"} & set(sys.modules)))
"""


def test_the_normal_path_imports_no_transformers():
    done = subprocess.run(
        [sys.executable, "-c", SOURCE],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": str(Path(moonlang.__file__).parents[1])},
    )
    assert done.stdout.strip() == "[]", done.stderr
