"""From --model-path to a complete local folder: the embedded model, a folder, the Hugging Face hub or ModelScope."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import cast

import msgspec

from moonlang.base import notify
from moonlang.base.errors import ConfigError
from moonlang.config.server_args import ServerArgs

EMBEDDED_NAME = "moonlang-tiny"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "models" / "embedded" / EMBEDDED_NAME

_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", "*.tiktoken"]
_IGNORED = ["original/*", "onnx/*", "*.gguf", "*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
_OFFLINE = (
    "Give --model-path a local folder, set HF_ENDPOINT to a mirror, or fetch the model where there is a network "
    "(`hf download NAME`), copy the cache (HF_HOME) here and set HF_HUB_OFFLINE=1."
)


def local_path(args: ServerArgs) -> str:
    """The folder of the checkpoint, fetched if it is a hub name, and checked. ConfigError says what to do."""
    if args.model_path is None:
        if not EMBEDDED_FOLDER.is_dir():
            hint = "Make it with `python scripts/train_tiny.py`, or name another model with --model-path."
            raise ConfigError(f"This copy of MoonLang lacks its embedded model {EMBEDDED_FOLDER}.", hint=hint)
        return str(checked(EMBEDDED_FOLDER, args))
    return str(checked(_folder(args.model_path, args), args))


def tokenizer_folder(args: ServerArgs, model_folder: str) -> str:
    """The folder with the tokenizer: the model's, or what --tokenizer-path names (a folder, or a hub name to fetch)."""
    if args.tokenizer_path is None or args.tokenizer_path == args.model_path:
        return model_folder
    folder = _folder(args.tokenizer_path, args, weights=False)
    _check_tokenizer(folder)
    return str(folder)


def checked(folder: Path, args: ServerArgs) -> Path:
    """The folder itself when everything that serving it needs is there."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json.", hint="Give --model-path a folder in the Hugging Face form.")
    if args.load_format != "dummy":
        _check_weights(folder)
    if not args.skip_tokenizer_init and args.tokenizer_path is None:
        _check_tokenizer(folder)
    return folder


def _folder(name: str, args: ServerArgs, weights: bool = True) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(
            f"{name} is a file.", hint="Give the folder that holds config.json and the safetensors files."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConfigError(
            f"There is no folder {name}.", hint="Give an existing folder, or a hub name like Qwen/Qwen3-0.6B."
        )
    patterns = _FILES + (["*.safetensors"] if weights and args.load_format != "dummy" else [])
    patterns += ["*.py"] if args.trust_remote_code else []
    if os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return _fetch_modelscope(name, args, patterns)
    return _fetch_hub(name, args, patterns)


def _fetch_hub(name: str, args: ServerArgs, patterns: list[str]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    notify.doing("fetching the model")
    # OSError, and the base error of the HTTP library below, whichever that is in the installed version.
    network_errors = cast("tuple[type[Exception], ...]", hub.HfHubHTTPError.__bases__)
    try:
        return Path(
            snapshot_download(
                name,
                revision=args.revision,
                cache_dir=args.download_dir,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
            )
        )
    except hub.GatedRepoError:
        hint = "Accept its terms on its page, then set HF_TOKEN (https://huggingface.co/settings/tokens)."
        raise ConfigError(f"The model {name} is gated.", hint=hint) from None
    except hub.RevisionNotFoundError:
        raise ConfigError(f"The model {name} has no revision {args.revision}.", hint="Check --revision.") from None
    except hub.RepositoryNotFoundError:
        hint = "Check the name; for a private model set HF_TOKEN; for a local one give the path of its folder."
        raise ConfigError(f"There is no folder {name}, and no such model on the hub.", hint=hint) from None
    except hub.HFValidationError as error:
        raise ConfigError(f"{name} is neither a folder nor a hub name: {error}.", hint="Check --model-path.") from None
    except network_errors as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"There is no folder {name}, and the hub cannot be reached: {reason}.", hint=_OFFLINE
        ) from None


def _fetch_modelscope(name: str, args: ServerArgs, patterns: list[str]) -> Path:
    if importlib.util.find_spec("modelscope") is None:
        hint = "Run `pip install modelscope`, or unset SGLANG_USE_MODELSCOPE to use the Hugging Face hub."
        raise ConfigError("SGLANG_USE_MODELSCOPE is set and the package modelscope is not installed.", hint=hint)
    download = importlib.import_module("modelscope.hub.snapshot_download").snapshot_download
    errors = importlib.import_module("modelscope.hub.errors")
    try:
        return Path(
            download(
                name,
                revision=args.revision,
                cache_dir=args.download_dir,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
            )
        )
    except (errors.HubError, OSError, ValueError) as error:
        hint = "Check the name and the network, or give --model-path a local folder."
        raise ConfigError(f"ModelScope does not give {name}: {error}.", hint=hint) from None


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        hint = "Add tokenizer.json, name another folder with --tokenizer-path, or use --skip-tokenizer-init."
        raise ConfigError(f"{folder} has no tokenizer.", hint=hint)


def _check_weights(folder: Path) -> None:
    """Every shard that the index names, or at least one safetensors file, is there and whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _shards(index)
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError(
                f"{folder} lacks {missing[0]}{more}, named in {index.name}.", hint="Fetch the missing files (again)."
            )
    else:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in shards:
        _check_whole(folder / name)
    if shards:
        return
    others = [path.name for pattern in _OTHER_WEIGHTS for path in sorted(folder.glob(pattern))]
    if others:
        hint = "Convert it: load it with transformers and call save_pretrained(folder, safe_serialization=True)."
        raise ConfigError(f"{folder} has {others[0]} but no safetensors file.", hint=hint)
    raise ConfigError(f"{folder} has no weights (*.safetensors).", hint="Fetch them, or use --load-format dummy.")


def _shards(index: Path) -> list[str]:
    try:
        names = msgspec.json.decode(index.read_bytes())["weight_map"].values()
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is not a safetensors index.", hint="Fetch the file again.") from None
    return sorted(set(names))


def _check_whole(path: Path) -> None:
    """A safetensors file starts with the length of its JSON header, which says where the last tensor ends."""
    again = "Fetch the file again (with git: `git lfs pull`)."
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConfigError(f"{path} is not a whole safetensors file.", hint=again)
        try:
            header = msgspec.json.decode(file.read(length), type=dict[str, dict])
        except msgspec.DecodeError:
            raise ConfigError(f"{path} is not a safetensors file.", hint=again) from None
    end = max((entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry), default=0)
    if size < 8 + length + end:
        raise ConfigError(f"{path} is cut off: {size} of {8 + length + end} bytes.", hint=again)
