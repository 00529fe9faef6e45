"""The description of the package agrees with the code: what is imported is declared, what is declared is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "moonlang"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "python" / "pyproject.toml").read_text())["project"]
# Imported where it is there: modelscope, mooncake and openai at first use, with an error that says how to install;
# sgl_kernel, which scripts/setup builds, in place of the torch reference path.
OPTIONAL = {"modelscope", "mooncake", "openai", "sgl_kernel"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}  # type: ignore[index]


def imported() -> Iterator[str]:
    """Top-level names of all imports, also of those inside functions."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def test_third_party_imports_are_dependencies_and_nothing_else_is() -> None:
    distributions = packages_distributions()
    names = set(imported()) - set(sys.stdlib_module_names) - {"moonlang", "sglang"} - OPTIONAL
    used = {canonical(distributions.get(name, [name])[0]) for name in names}
    by_name = {"httptools"}  # named to uvicorn, which imports it
    assert declared(PROJECT["dependencies"]) - by_name == used


def test_every_dependency_has_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.partition("==")[0]) for line in lines if "==" in line}
    extras = PROJECT["optional-dependencies"]
    assert declared(PROJECT["dependencies"] + extras["client"] + extras["dev"]) <= pinned
    assert "torch==2.13.0" in lines


def test_extras_choose_one_mooncake_each() -> None:
    extras = PROJECT["optional-dependencies"]
    wheels = [extras[name][0].partition(">=")[0] for name in ("cpu", "cuda12", "cuda13")]
    assert wheels == [
        "mooncake-transfer-engine-non-cuda",
        "mooncake-transfer-engine",
        "mooncake-transfer-engine-cuda13",
    ]
