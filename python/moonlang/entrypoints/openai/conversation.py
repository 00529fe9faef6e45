"""From chat messages to prompt text: contents flattened, the template rendered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moonlang.base.errors import RequestError
from moonlang.text.chat_template import ChatTemplate

MAX_MESSAGES = 4096
_RESERVED = ("self", "messages", "tools", "add_generation_prompt")  # what `chat_template_kwargs` cannot name


def render(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a conversation. RequestError 400 when messages are malformed or the template refuses them.

    continue_final: the last message, the assistant's, is the beginning of the answer.
    """
    flat = [_flat(index, message) for index, message in enumerate(_some(messages))]
    for name in _RESERVED:
        if name in (variables or {}):
            raise RequestError(f"chat_template_kwargs must not hold {name!r}.")
    opening = ""
    if continue_final and flat[-1].get("role") == "assistant":
        opening = flat.pop().get("content") or ""
        add_generation_prompt = True
    try:
        return template.render(flat, tools or None, add_generation_prompt, **(variables or {})) + opening
    except RecursionError:
        raise RequestError("The messages or tools are nested too deeply.") from None


def _some(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise RequestError("messages must hold at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages must hold at most {MAX_MESSAGES} messages, got {len(messages)}.")
    return messages


def _flat(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one string."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"messages[{index}].role must be a string.")
    _check_calls(index, message.get("tool_calls"))
    if content is None or isinstance(content, str):
        if content is None and role != "assistant":
            raise RequestError(f"messages[{index}].content must be a string or a list of parts.")
        return message
    if not isinstance(content, list):
        raise RequestError(f"messages[{index}].content must be a string or a list of parts.")
    return {**message, "content": " ".join(_part(index, part) for part in content)}


def _check_calls(index: int, calls: Any) -> None:
    """Templates read the tool calls of earlier answers: a list of objects, each with the object `function`."""
    if calls is None:
        return
    if not isinstance(calls, list) or not all(
        isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) for call in calls
    ):
        raise RequestError(f"messages[{index}].tool_calls must be a list of objects that name a function.")


def _part(index: int, part: Any) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise RequestError(f"messages[{index}].content must hold parts with a type.")
    if part["type"] != "text":
        raise RequestError(
            f"messages[{index}].content holds a part of type {part['type'][:64]!r}; only text is served."
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"messages[{index}].content holds a text part without text.")
    return part["text"]
