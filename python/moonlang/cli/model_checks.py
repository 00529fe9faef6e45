"""What the doctor looks at in the checkpoint: the folder, the configuration, the tokenizer, its memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moonlang.base.errors import MoonLangError
from moonlang.cli.check import Check
from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs

SAMPLE = "The quick brown fox."


def run(args: ServerArgs) -> Iterator[Check]:
    try:
        prepared = prepare(args)
    except MoonLangError as error:
        yield Check("model", "failed", error.message, error.hint)
        return
    model = prepared.model
    size = sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors"))
    name = ", ".join(model.architectures) or model.model_type
    yield Check("model", "ok", f"{model.path}: {name}, {model.dtype}, {size / 1e6:.1f} MB of weights")
    yield _implementation(prepared)
    if not args.skip_tokenizer_init:
        yield _tokenizer(prepared)


def _implementation(prepared: Prepared) -> Check:
    """Importing the model registry brings torch: this check also finds a torch that does not load."""
    try:
        from moonlang.models.registry import spec_for

        spec = spec_for(prepared.model, prepared.args.model_impl)
    except ImportError as error:
        return Check("torch", "failed", f"cannot be imported: {error}", "Run `pip install torch` again.")
    except MoonLangError as error:
        return Check("implementation", "failed", error.message, error.hint)
    return Check("implementation", "ok", f"for {', '.join(spec.architectures) or 'any causal language model'}")


def _tokenizer(prepared: Prepared) -> Check:
    from moonlang.text.tokenizer import load_tokenizer

    folder = prepared.args.tokenizer_path or prepared.model.path
    try:
        tokenizer = load_tokenizer(folder, prepared.args.trust_remote_code)
    except MoonLangError as error:
        return Check("tokenizer", "failed", error.message, error.hint)
    ids = tokenizer.encode(SAMPLE)
    if not ids or max(ids) >= prepared.model.vocab_size:
        text = f"{folder}: its ids go beyond the model's vocabulary of {prepared.model.vocab_size}"
        return Check("tokenizer", "failed", text, "Name the model's own tokenizer with --tokenizer-path.")
    return Check("tokenizer", "ok", f"{folder}: {len(ids)} tokens for {len(SAMPLE)} characters")
