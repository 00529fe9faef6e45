"""The package `sglang` is an alias of this program; the real SGLang in the same environment would be a coin toss."""

from __future__ import annotations

import importlib.metadata

from moonlang.base.errors import ConfigError


def other_sglang() -> str | None:
    """The version of an installed distribution named `sglang`; ours comes with the distribution `moonlang`."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def check() -> None:
    """ConfigError when `import sglang` could mean another program."""
    version = other_sglang()
    if version is not None:
        raise ConfigError(
            f"SGLang {version} is installed in this environment, and MoonLang brings a package of the same name.",
            hint="Run `pip uninstall sglang`, or give MoonLang an environment of its own.",
        )
