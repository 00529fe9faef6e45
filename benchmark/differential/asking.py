"""Random requests for a server, and of its answers what has to be the same wherever they come from."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

Body = dict[str, Any]
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
WORDS = "once upon a time the little dog ran to see his friend who had 3 big balls and 12 apples été 日本 😀".split()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
GRAMMARS: tuple[Body, ...] = (
    {"regex": "[0-9]{3}-[a-f]{2}"},
    {"json_schema": json.dumps(SCHEMA)},
    {"ebnf": 'root ::= "yes" | "no " [a-z]+ "!"'},
)
SAME_META = ("finish_reason", "prompt_tokens", "completion_tokens")
LOGPROBS = tuple(f"{side}_{kind}logprobs" for side in ("input", "output") for kind in ("token_", "top_", "token_ids_"))


@dataclass(frozen=True, slots=True)
class Request:
    """One request. leaves: how its client behaves: "" stays, "abort" asks for the end, "hang up" just goes away."""

    path: str
    body: Body
    leaves: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """Requests that are sent one after the other; those after the first continue what it has said."""

    first: Request
    turns: tuple[list[int], ...] = ()


@dataclass
class Maker:
    """Draws requests. vocab: token ids below it occur in prompts; context: longest sequence."""

    random: random.Random
    vocab: int
    context: int
    shared: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = [self.ids(self.random.randrange(8, 500)) for _ in range(6)]

    def chains(self, count: int) -> list[Chain]:
        return [self.chain() for _ in range(count)]

    def chain(self) -> Chain:
        kinds = (self.native, self.native, self.native, self.guided, self.samples, self.chat, self.completion)
        request = self.random.choice(kinds)()
        several = request.path != NATIVE or "input_ids" not in request.body or "n" in request.body["sampling_params"]
        if not several and self.random.random() < 0.3:
            return Chain(request, tuple(self.ids(self.random.randrange(1, 40)) for _ in range(2)))
        if self.random.random() < 0.15:
            return Chain(Request(request.path, request.body, self.random.choice(("abort", "hang up"))))
        return Chain(request)

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(10, self.vocab) for _ in range(count)]

    def prompt(self) -> list[int]:
        """Token ids; half of the prompts begin like others, somewhere within a page."""
        rng = self.random
        shared = rng.choice(self.shared) if rng.random() < 0.6 else []
        long = rng.choice((2, 16, 60, 300, 900))
        return shared[: rng.randrange(len(shared) + 1)] + self.ids(rng.randrange(1, min(long, self.context - 400)))

    def text(self) -> str:
        return " ".join(self.random.choice(WORDS) for _ in range(self.random.randrange(1, 60)))

    def sampling(self) -> Body:
        """Sampling parameters with equal answers everywhere: greedy, or with a seed."""
        rng = self.random
        found: Body = {"max_new_tokens": rng.choice((0, 1, 2, 8, 24, 24, 90))}
        if rng.random() < 0.5:
            found |= {"temperature": 0}
        else:
            found |= {"temperature": rng.choice((0.6, 1.0, 1.7)), "sampling_seed": rng.randrange(2**31)}
            found |= rng.choice(({}, {"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.05}, {"top_p": 0.95, "top_k": 50}))
        if rng.random() < 0.3:
            found |= rng.choice(({"frequency_penalty": 0.7}, {"presence_penalty": 1.1}, {"repetition_penalty": 1.2}))
        if rng.random() < 0.1:
            found |= {"logit_bias": {str(rng.randrange(10, self.vocab)): 4.5}}
        if rng.random() < 0.1:
            found |= {"min_new_tokens": min(5, found["max_new_tokens"])}
        if rng.random() < 0.3:
            found |= self.end()
        return found

    def end(self) -> Body:
        """Something to stop at."""
        rng = self.random
        return rng.choice(
            (
                {"stop": rng.sample("aeiou., 1", 2)},
                {"stop": ["the", " dog"], "no_stop_trim": True},
                {"stop_token_ids": self.ids(30)},
                {"stop_regex": "[0-9]|th."},
                {"ignore_eos": True},
            )
        )

    def native(self) -> Request:
        rng = self.random
        body: Body = {"sampling_params": self.sampling(), "stream": rng.random() < 0.5}
        if rng.random() < 0.2:
            body |= {"text": [self.text() for _ in range(rng.randrange(1, 4))]}
        elif rng.random() < 0.2:
            body |= {"text": self.text()}
        else:
            body |= {"input_ids": self.prompt()}
        if rng.random() < 0.5:
            body |= {"return_logprob": True, "top_logprobs_num": rng.randrange(4)}
            if rng.random() < 0.4:
                body |= {"logprob_start_len": rng.choice((0, 0, 1))}
            if rng.random() < 0.2:
                body |= {"token_ids_logprob": [11, 12]}
        return Request(NATIVE, body | self.apart())

    def apart(self) -> Body:
        """What says nothing about the answer: where it is cached, and when its turn is."""
        rng = self.random
        chances = ({"cache_salt": f"s{rng.randrange(2)}"}, {"extra_key": "k"}, {"priority": rng.randrange(3)})
        return rng.choice((*chances, {}, {}, {}, {}))

    def guided(self) -> Request:
        rng = self.random
        end = {"max_new_tokens": rng.choice((5, 30, 60))}
        how = {"temperature": 0} if rng.random() < 0.5 else {"temperature": 1.0, "sampling_seed": rng.randrange(2**31)}
        body = {"text": self.text(), "sampling_params": {**rng.choice(GRAMMARS), **end, **how}}
        return Request(NATIVE, body | {"return_logprob": rng.random() < 0.5, "stream": rng.random() < 0.3})

    def samples(self) -> Request:
        rng = self.random
        sampling = {"n": rng.randrange(2, 5), "temperature": 1.0, "sampling_seed": rng.randrange(2**31)}
        tokens = {"max_new_tokens": rng.randrange(1, 30)}
        return Request(NATIVE, {"input_ids": self.prompt(), "sampling_params": {**sampling, **tokens}, **self.apart()})

    def open_fields(self) -> Body:
        """Fields that both of OpenAI's routes know."""
        rng = self.random
        found: Body = {"model": "default", "stream": rng.random() < 0.5, "max_tokens": rng.choice((1, 12, 40))}
        found |= {"temperature": 0} if rng.random() < 0.5 else {"temperature": 0.9, "seed": rng.randrange(2**31)}
        if rng.random() < 0.2:
            found |= {"n": 2}
        if rng.random() < 0.2:
            found |= {"stop": rng.choice((["the"], "a", [".", "!"]))}
        return found

    def chat(self) -> Request:
        rng = self.random
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": self.text()} for role in roles[: rng.choice((1, 3))]]
        body = self.open_fields() | {"messages": messages}
        if rng.random() < 0.4:
            body |= {"logprobs": True, "top_logprobs": rng.randrange(3)}
        if rng.random() < 0.2:
            schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
            body |= {"response_format": rng.choice((schema, {"type": "json_object"}))}
        return Request(CHAT, body)

    def completion(self) -> Request:
        rng = self.random
        prompt = rng.choice((self.text(), [self.text(), self.text()], self.prompt()))
        body = self.open_fields() | {"prompt": prompt}
        if rng.random() < 0.4:
            body |= {"logprobs": rng.randrange(3)}
        if rng.random() < 0.2:
            body |= {"echo": True}
        return Request(TEXT, body)


class StreamError(Exception):
    """A stream that contradicts itself."""


async def ask(http: httpx.AsyncClient, request: Request, patience: float = 0.0) -> Any:
    """The answer in the form to compare; None of a client that has left. patience: seconds until it leaves."""
    if request.leaves:
        return await leave(http, request, patience)
    if not request.body.get("stream"):
        response = await http.post(request.path, json=request.body)
        if response.status_code != 200:
            return {"status": response.status_code, "text": response.text}
        return form(request.path, response.json())
    async with http.stream("POST", request.path, json=request.body) as response:
        if response.status_code != 200:
            return {"status": response.status_code, "text": (await response.aread()).decode()}
        events = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        raise StreamError(f"it does not end with [DONE]: {events[-1:]}")
    pieces = [json.loads(event) for event in events]
    if wrong := next((piece for piece in pieces if "error" in piece), None):
        return wrong
    return joined_native(pieces) if request.path == NATIVE else joined_open(pieces)


async def leave(http: httpx.AsyncClient, request: Request, patience: float) -> None:
    """Ask and go away, or have it aborted by its id."""
    rid = f"leaver-{id(request)}"
    body = request.body | {"rid": rid}
    asked = asyncio.ensure_future(http.post(request.path, json=body))
    await asyncio.wait([asked], timeout=patience)
    if request.leaves == "abort":
        while not asked.done():
            await http.post("/abort_request", json={"rid": rid})
            await asyncio.wait([asked], timeout=0.3)
    else:
        asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked


def form(path: str, answer: Any) -> Any:
    """What has to be equal of a whole answer."""
    if path == NATIVE:
        return [native_form(one) for one in answer] if isinstance(answer, list) else native_form(answer)
    return joined_open([answer])


def native_form(answer: Body) -> Body:
    meta = answer["meta_info"]
    same = {key: meta[key] for key in SAME_META}
    return {"text": answer["text"], "ids": answer["output_ids"], **same, **{k: meta[k] for k in LOGPROBS if k in meta}}


def joined_native(pieces: list[Body]) -> Any:
    """The last of the pieces of each sequence, each of which must continue the one before."""
    last: dict[int, Body] = {}
    for piece in pieces:
        index = piece.get("index", 0)
        before = last.get(index, {"text": "", "output_ids": []})
        if not piece["text"].startswith(before["text"]) and piece["meta_info"]["finish_reason"] is None:
            raise StreamError(f"{before['text']!r} became {piece['text']!r}")
        if piece["output_ids"][: len(before["output_ids"])] != before["output_ids"]:
            raise StreamError(f"{before['output_ids']} became {piece['output_ids']}")
        last[index] = piece
    if any("index" in piece for piece in pieces):
        return [native_form(last[index]) for index in sorted(last)]
    return native_form(last[0])


def joined_open(pieces: list[Body]) -> Any:
    """The choices, put together: each piece holds what is new, or everything."""
    choices: dict[int, Body] = {}
    for piece in pieces:
        for choice in piece["choices"]:
            found = choices.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish_reason": None})
            message = choice.get("delta", choice.get("message"))
            found["text"] += choice["text"] if message is None else message.get("content") or ""
            found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
            for key, values in (choice.get("logprobs") or {}).items():
                found["logprobs"].setdefault(key, []).extend(values or [])
    return [choices[index] for index in sorted(choices)]
