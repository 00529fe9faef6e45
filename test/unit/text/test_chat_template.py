"""Templates of every source, what they may use, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError, RequestError
from moonlang.text.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}]


def template(folder: Path, source: str | None = None, **options) -> ChatTemplate:
    return ChatTemplate(str(folder), source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, **options)


def config(folder: Path, entry: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))


def test_from_tokenizer_config(tmp_path: Path) -> None:
    config(tmp_path, CHATML)
    found = template(tmp_path)
    assert found.exists
    assert found.render(MESSAGES) == "<|user|>hi\n<|assistant|>"
    assert found.render(MESSAGES, add_generation_prompt=False) == "<|user|>hi\n"


def test_a_file_of_its_own_goes_before_the_config(tmp_path: Path) -> None:
    config(tmp_path, "config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template(tmp_path).render(MESSAGES) == "file"


def test_named_templates(tmp_path: Path) -> None:
    config(tmp_path, [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools|length }}"}])
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert template(tmp_path).render(MESSAGES) == "plain"
    assert template(tmp_path).render(MESSAGES, tools=[{}, {}]) == "2"
    assert template(tmp_path, name="rag").render(MESSAGES) == "rag"
    with pytest.raises(ConfigError, match="nothing") as error:
        template(tmp_path, name="nothing")
    assert "default, rag, tool_use" in error.value.hint


def test_an_override_is_a_file_or_the_text(tmp_path: Path) -> None:
    config(tmp_path, "config")
    (tmp_path / "own.jinja").write_text("own")
    (tmp_path / "own.json").write_text(json.dumps({"chat_template": "from json"}))
    assert template(tmp_path, str(tmp_path / "own.jinja")).render(MESSAGES) == "own"
    assert template(tmp_path, str(tmp_path / "own.json")).render(MESSAGES) == "from json"
    assert template(tmp_path, "{{ bos_token }}").render(MESSAGES) == "<s>"
    with pytest.raises(ConfigError, match="cannot be read"):
        template(tmp_path, "chatml-v9")


def test_no_template(tmp_path: Path) -> None:
    found = template(tmp_path)
    assert not found.exists
    with pytest.raises(RequestError, match="no chat template"):
        found.render(MESSAGES)


def test_a_broken_template_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        template(tmp_path, "{{ bos_token }}\n{% if %}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        ("{{ eos_token }}{{ enable_thinking }}{{ tools is none }}{{ strftime_now('%Y') | length }}", "</s>FalseTrue4"),
        ("{%- set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}", "3"),
        ("    {% if true %}\nx\n    {% endif %}\ny", "x\ny"),
    ],
)
def test_what_templates_use(tmp_path: Path, source: str, text: str) -> None:
    assert template(tmp_path, source).render(MESSAGES, enable_thinking=False) == text


def test_messages_as_templates_expect_them(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}[{{ m.content }}]"
        "{% for call in m.tool_calls %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    messages = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"city": "Rome"}'}}],
        }
    ]
    assert template(tmp_path, source).render(messages) == "[]Rome"
    assert messages[0]["content"] is None
    messages[0]["tool_calls"] = [{"function": {"name": "f", "arguments": "{"}}]
    with pytest.raises(RequestError, match="not JSON"):
        template(tmp_path, source).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_is_a_request_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages") as error:
        template(tmp_path, "{# {{ #}" + source).render(MESSAGES)
    assert error.value.status == 400
    if "raise_exception" in source:
        assert "roles must alternate" in str(error.value)
