"""--log-requests: what a line holds, and what it never holds."""

from __future__ import annotations

import json
import logging

import pytest

from moonlang.core.messages import Generate
from moonlang.core.sampling import SamplingParams
from moonlang.observability.request_log import Finished, RequestLog

REQUEST = Generate(rid="r1", input_ids=[71, 72, 73], sampling=SamplingParams(temperature=0.5, logit_bias={5: 1.0}))
END = Finished(
    rid="r1",
    finish="stop",
    message="",
    prompt_tokens=3,
    cached_tokens=1,
    completion_tokens=2,
    queue_s=0.25,
    first_token_s=None,
    e2e_s=0.5,
)
LOGGER = logging.getLogger("test.requests")


def lines(caplog: pytest.LogCaptureFixture, *arguments: object, **more: bool) -> list[str]:
    with caplog.at_level(logging.INFO, LOGGER.name):
        requests = RequestLog(LOGGER, *arguments, **more)  # type: ignore[arg-type]
        requests.received(REQUEST)
        requests.finished(END)
    return caplog.messages


def test_text(caplog: pytest.LogCaptureFixture) -> None:
    received, finished = lines(caplog, 2, "text")
    assert received.startswith("Receive: rid=r1, prompt_tokens=3, stream=False, sampling_params={'temperature': 0.5")
    assert finished.startswith("Finish: rid=r1, finish=stop")
    assert "71" not in received + finished


def test_json_without_parameters_at_level_0(caplog: pytest.LogCaptureFixture) -> None:
    received, finished = (json.loads(line) for line in lines(caplog, 0, "json"))
    assert received == {"event": "receive", "rid": "r1", "prompt_tokens": 3, "stream": False}
    assert (finished["event"], finished["completion_tokens"]) == ("finish", 2)


def test_times_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, None, "text", times=True) == [
        "Times: rid=r1, completion_tokens=2, queue_s=0.25, first_token_s=None, e2e_s=0.5"
    ]
