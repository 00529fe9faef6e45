"""What `quantization_config` of a checkpoint and --quantization together mean. Reads no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moonlang.base.errors import ConfigError

FROM_FLOATS = ("int8", "int4", "w8a8_int8", "fp8")  # what weights can be turned into while they are loaded
# SGLang names kernels along with formats; here the kernel is chosen by what is there.
_SAME_FORMAT = {"gptq_marlin": "gptq", "awq_marlin": "awq"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """method: a file of `layers/quantization`. Sizes of groups and numbers of bits are read off the tensors."""

    method: str
    in_checkpoint: bool  # False: the checkpoint holds floats, which are quantised while they are loaded
    zero_offset: int = 0  # what has to be added to stored zero points (1 in GPTQ files of version 1)


def read_quantization(hf: Mapping[str, Any], wish: str | None) -> Quantization | None:
    """How the weights are, or become, quantised; None when they stay floats.

    hf: config.json; wish: --quantization. ConfigError when the checkpoint's format is not one that is read here, or is
    not the one wished for.
    """
    settings = hf.get("quantization_config") or hf.get("compression_config")
    if not settings:
        return _from_floats(wish)
    found = _in_checkpoint(settings if isinstance(settings, dict) else {})
    wished = {None: found.method, "compressed-tensors": found.method}.get(wish, _SAME_FORMAT.get(str(wish), wish))
    if wished != found.method:
        raise ConfigError(
            f"--quantization {wish} does not fit the checkpoint, which is quantized as {found.method}.",
            hint="Leave the flag out: the checkpoint's own format is taken.",
        )
    return found


def _from_floats(wish: str | None) -> Quantization | None:
    if wish is None:
        return None
    if wish not in FROM_FLOATS:
        raise ConfigError(
            f"--quantization {wish} is a format of checkpoints, and config.json has no quantization_config.",
            hint=f"Leave it out, or let the weights be quantized while loading: {', '.join(FROM_FLOATS)}.",
        )
    return Quantization(method=wish, in_checkpoint=False)


def _in_checkpoint(settings: Mapping[str, Any]) -> Quantization:
    method = str(settings.get("quant_method", "unknown")).lower()
    if method == "gptq":
        _refuse_unless(settings.get("bits") in (4, 8), method, f"{settings.get('bits')} bits")
        version2 = settings.get("checkpoint_format") == "gptq_v2"
        return Quantization(method="gptq", in_checkpoint=True, zero_offset=0 if version2 else 1)
    if method == "awq":
        bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
        _refuse_unless(bits == 4, method, f"{bits} bits")
        _refuse_unless(version == "gemm", method, f"version {version}")
        return Quantization(method="awq", in_checkpoint=True)
    if method == "fp8":
        return Quantization(method="fp8", in_checkpoint=True)
    if method in ("w8a8_int8", "mxfp4"):
        return Quantization(method=method, in_checkpoint=True)
    if method == "compressed-tensors":
        return Quantization(method=_compressed(settings), in_checkpoint=True)
    raise _refusal(method, "")


def _compressed(settings: Mapping[str, Any]) -> str:
    """The method that a compressed-tensors checkpoint amounts to: one of whole bytes with scales beside them."""
    groups = settings.get("config_groups") or {}
    whats = {_kind_of(group) for group in groups.values() if isinstance(group, dict)}
    form = str(settings.get("format"))
    if form == "float-quantized" and whats in ({("float", 8, True)}, {("float", 8, False)}):
        return "fp8"
    if form in ("int-quantized", "naive-quantized") and whats in ({("int", 8, True)}, {("int", 8, False)}):
        return "w8a8_int8" if ("int", 8, True) in whats else "int8"
    raise _refusal("compressed-tensors", f"format {form}")


def _kind_of(group: Mapping[str, Any]) -> tuple[Any, Any, bool]:
    """type and bits of the weights, and whether activations are quantised too."""
    weights = group.get("weights") or {}
    return weights.get("type"), weights.get("num_bits"), group.get("input_activations") is not None


def _refuse_unless(fine: bool, method: str, what: str) -> None:
    if not fine:
        raise _refusal(method, what)


def _refusal(method: str, what: str) -> ConfigError:
    return ConfigError(
        f"This checkpoint is quantized ({method}{', ' + what if what else ''}), a form that is not read here.",
        hint="Serve a GPTQ (4 or 8 bits), AWQ (4 bits, gemm) or fp8 checkpoint, or the unquantized one "
        f"with --quantization {'|'.join(FROM_FLOATS)}.",
    )
