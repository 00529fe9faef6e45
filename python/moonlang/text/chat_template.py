"""From a conversation to the prompt text: the model's Jinja template in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moonlang.base.clock import wall_s
from moonlang.base.errors import ConfigError, RequestError

_DEFAULT = "default"
_WITH_TOOLS = "tool_use"
_FILE = "chat_template.jinja"
_MORE_FILES = "additional_chat_templates"
_FAULTS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ChatTemplate:
    """The chat template of one model.

    folder: where the tokenizer is. override: a template file, or the template itself, in place of the model's own.
    name: which of several named templates. special_tokens: texts that templates know as bos_token, eos_token, ...
    ConfigError when `override` or `name` cannot be used. A model without a template is no error until `render`.
    """

    def __init__(
        self, folder: str, override: str | None = None, *, name: str | None = None, special_tokens: Mapping[str, str]
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._environment = _environment()
        sources = {_DEFAULT: _read_override(override)} if override is not None else _read_sources(Path(folder))
        if name is not None:
            if name not in sources:
                known = ", ".join(sorted(sources)) or "none"
                raise ConfigError(f"There is no chat template named {name!r}.", hint=f"The model has: {known}.")
            sources = {_DEFAULT: sources[name]}
        self._templates = {key: self._compile(key, source) for key, source in sources.items()}

    @property
    def exists(self) -> bool:
        """Whether the model can chat."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation whose contents are strings. RequestError when the template refuses it."""
        template = self._templates.get(_WITH_TOOLS) if tools else None
        template = template or self._templates.get(_DEFAULT)
        if template is None:
            raise RequestError(
                "This model has no chat template.", hint="Start the server with --chat-template FILE, or use /generate."
            )
        names = {
            **self._special_tokens,
            **variables,
            "messages": [_plain(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(names)
        except _FAULTS as error:
            raise RequestError(f"The chat template refuses these messages: {error}") from error

    def _compile(self, name: str, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template {name!r} is broken in line {error.lineno}: {error.message}"
            ) from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's own words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.fromtimestamp(wall_s()).strftime(pattern)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no null content, arguments of tool calls as objects."""
    plain = dict(message)
    if plain.get("content") is None:
        plain["content"] = ""
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = msgspec.json.decode(function["arguments"])
        except msgspec.DecodeError as error:
            raise RequestError(f"The arguments of a tool call are not JSON: {error}.") from error
    return {**call, "function": function}


def _read_override(override: str) -> str:
    """--chat-template: a file (Jinja, or JSON with the key chat_template), or the template itself."""
    if "{%" in override or "{{" in override:
        return override
    path = Path(override).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The chat template {override!r} cannot be read: {error}.", hint="Give --chat-template a Jinja file."
        ) from error
    if path.suffix != ".json":
        return text
    return _config_templates(_decode(path, text.encode())).get(_DEFAULT) or _missing(path)


def _missing(path: Path) -> NoReturn:
    raise ConfigError(f"{path} has no chat_template.", hint="Give --chat-template a Jinja file.")


def _read_sources(folder: Path) -> dict[str, str]:
    """Every template of the model by name. Files of their own go before the entry in tokenizer_config.json."""
    sources: dict[str, str] = {}
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if path.is_file():
            sources |= _config_templates(_decode(path, path.read_bytes()))
    if (folder / _FILE).is_file():
        sources[_DEFAULT] = (folder / _FILE).read_text(encoding="utf-8")
    for path in sorted((folder / _MORE_FILES).glob("*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    return sources


def _decode(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a JSON object: {error}.") from error


def _config_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """The entry `chat_template`: one template, or a list of named ones."""
    entry = config.get("chat_template")
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {_DEFAULT: entry}
    return {named["name"]: named["template"] for named in entry}
