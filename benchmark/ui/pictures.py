"""The pictures of the page in docs/images: chats with a cluster, reads the answers, watches it under load.

    python benchmark/ui/pictures.py                    starts a cluster: two prefill servers, a decode server, a store
    python benchmark/ui/pictures.py --url URL          of a server or router that runs

Wants Chromium.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ui.browser import Browser, Page  # noqa: E402

from moonlang import Cluster  # noqa: E402

ROOT = HERE.parents[1]
FLAGS = {"page_size": 8, "max_total_tokens": 6000, "hicache_ratio": 2, "log_level": "warning"}
ANIMALS = "fox bear owl mouse turtle penguin wolf cat dog horse monkey frog".split()
ANSWERED = "document.querySelectorAll('.assistant .receipt').length === {}"
BUSY = "document.querySelector('#ttft .quantiles').textContent.startsWith('Half')"
GROWN = "document.querySelectorAll('#tree li').length > 8"


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Conversations on several threads until the end."""
    over = threading.Event()

    def talk(seed: int) -> None:
        draw = random.Random(seed)
        while not over.is_set():
            messages: list[dict[str, str]] = []
            for _ in range(draw.randrange(1, 5)):
                messages.append({"role": "user", "content": f"Write a short story about a {draw.choice(ANIMALS)}."})
                body = {"model": "", "messages": messages, "stream": True, "max_tokens": draw.randrange(20, 150)}
                messages.append({"role": "assistant", "content": said(url, body)})

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def said(url: str, body: dict[str, object]) -> str:
    """The text of a streamed answer."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        events = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def chat(page: Page, out: Path) -> None:
    """Two questions; the tokens and the receipt of the second answer."""
    page.evaluate("document.querySelector('#prompt').focus()")
    page.type("Write a short story about a fox.")
    page.press("Enter")
    page.until(ANSWERED.format(1))
    page.evaluate("document.querySelector('[name=logprobs]').click()")
    page.type("Write a short story about an owl.")
    page.press("Enter")
    page.until(ANSWERED.format(2))
    page.evaluate("[...document.querySelectorAll('.receipt')].at(-1).open = true")
    page.evaluate("document.querySelector('#log').scrollTop = 1e6")
    snap(page, out, "chat")


def snap(page: Page, out: Path, name: str) -> None:
    for scheme in ("light", "dark"):
        page.set_scheme(scheme)
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        page.screenshot(out / f"page-{name}-{scheme}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        url = args.url or stack.enter_context(Cluster(prefill=2, decode=1, store=True, **FLAGS)).url
        page = stack.enter_context(stack.enter_context(Browser(Path(name) / "browser")).page())
        page.resize(1200, 1180)
        page.open(f"{url}/ui#watch")
        page.until("document.querySelector('#model').textContent")
        with busy(url):
            page.until(BUSY, 60)
            page.until(GROWN, 60)
            page.evaluate("new Promise(done => setTimeout(done, 40000))")
            snap(page, args.out, "watch")
        page.resize(1200, 860)
        page.evaluate("document.querySelector('#tab-chat').click()")
        chat(page, args.out)
        assert page.problems == [], page.problems
    return 0


if __name__ == "__main__":
    sys.exit(main())
