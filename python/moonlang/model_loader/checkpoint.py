"""A folder of safetensors files, seen as one set of named tensors. The files are memory-mapped, not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from moonlang.base import notify
from moonlang.base.errors import ConfigError

_SHARES = 50  # how often a checkpoint says how much of it has been read
_INDEX = "model.safetensors.index.json"


def safetensors_files(folder: str) -> list[Path]:
    """The weight files of a checkpoint, sorted: those its index names, or model.safetensors, or every *.safetensors.

    ConfigError when there are none or the index names a file that is not there.
    """
    root = Path(folder)
    index = root / _INDEX
    if not index.is_file():
        whole = root / "model.safetensors"
        found = [whole] if whole.is_file() else sorted(root.glob("*.safetensors"))
        if not found:
            raise ConfigError(f"No *.safetensors file in {folder}.", hint=_why_none(root))
        return found
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{index} is not a valid index of weights: {error!r}.", hint="Download the file again."
        ) from error
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing: {_some(missing)}.",
            hint="Finish the download, for instance by deleting the folder and starting again with the model's name.",
        )
    return [root / name for name in names]


class Checkpoint:
    """Tensors by name. Open for as long as the object lives."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._file_of: dict[str, Any] = {}  # tensor name -> the open file that holds it
        for path in safetensors_files(folder):
            for name in (file := _open(path)).keys():  # noqa: SIM118 - a file, not a dict: it cannot be iterated
                self._file_of[name] = file
        self._read: set[str] = set()

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: "BF16"."""
        return self._file_of[name].get_slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        """A tensor over the mapped file: copy it, never write to it."""
        if name not in self._read:
            self._read.add(name)
            done, total = len(self._read), len(self._file_of)
            if done * _SHARES // total != (done - 1) * _SHARES // total:
                notify.doing("loading weights", done / total)
        return self._file_of[name].get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(str(path), framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {error}.",
            hint="It is probably cut short by an interrupted download or copy: fetch this file again.",
        ) from error


def _why_none(root: Path) -> str:
    if not root.is_dir():
        return "The folder does not exist."
    if any(root.glob("*.bin")) or any(root.glob("*.pt")) or any(root.glob("*.pth")):
        return "It holds pickled weights, which are not read because they can run code: convert them to safetensors."
    return "Check --model-path, or use --load-format dummy for random weights."


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
