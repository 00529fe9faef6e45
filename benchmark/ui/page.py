"""Is the page quick, and does it stay as small as it was?

    python benchmark/ui/page.py                 10 minutes, as the figures are
    python benchmark/ui/page.py --minutes 1     a first look

Three figures: the first paint of a real server's page; the memory of a tab that watches 8 instances and a tree of
10,000 nodes, asked for 60 times a minute; and what a survey of a tree of 100,000 nodes costs the scheduler. It wants
Chromium.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import engines  # noqa: E402
from ui.browser import Browser, Page  # noqa: E402
from ui.crowd import Crowd, serving  # noqa: E402

from moonlang.mem_cache.eviction import ORDERS  # noqa: E402
from moonlang.mem_cache.pool import PagePool  # noqa: E402
from moonlang.mem_cache.radix import RadixCache  # noqa: E402
from moonlang.mem_cache.survey import Survey  # noqa: E402
from moonlang.roles.surveys import LOOKS  # noqa: E402

TINY = HERE.parents[1] / "python" / "moonlang" / "models" / "embedded" / "moonlang-tiny"
SETTLE_S = 30  # compiled code and the charts' windows grow at first
LOADS = 5


def first_paint_ms(folder: Path) -> list[float]:
    """Milliseconds from the request for a real server's page to its first content, each in a fresh browser context."""
    with engines.serving(engines.MOONLANG, TINY, folder / "server.log") as server, Browser(folder / "paint") as browser:
        found: list[float] = []
        for _ in range(LOADS):
            with browser.page() as page:
                page.open(f"http://127.0.0.1:{server.port}/ui")
                entries = "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)"
                found += page.until(f"{entries}.length && {entries}")
        return found


def tab_memory(folder: Path, minutes: float, instances: int, nodes: int) -> dict[str, Any]:
    """Heap of a tab that watches, in bytes, from `SETTLE_S` on; how many states and trees it took."""
    crowd = Crowd(instances, nodes)
    with serving(crowd) as url, Browser(folder / "memory") as browser, browser.page() as page:
        page.resize(1280, 1000)
        page.open(f"{url}/ui#watch")
        page.evaluate("document.querySelector('[name=nodes]').value = '10000'")
        page.evaluate("document.querySelector('#tree-form').dispatchEvent(new Event('change'))")
        time.sleep(SETTLE_S)
        crowd.states = crowd.trees = 0
        begin = time.monotonic()
        heap = [page.heap_bytes()]
        busy_s = _busy_s(page)
        while time.monotonic() - begin < 60 * minutes:
            time.sleep(min(10.0, 60 * minutes))
            heap.append(page.heap_bytes())
        taken = time.monotonic() - begin
        shown = page.evaluate("document.querySelector('#tree-summary').textContent")
        return {
            "shown": shown,
            "states_per_minute": crowd.states / taken * 60,
            "trees_per_minute": crowd.trees / taken * 60,
            "busy_share": (_busy_s(page) - busy_s) / taken,
            "elements": page.evaluate("document.querySelectorAll('*').length"),
            "heap_bytes": heap,
            "problems": page.problems,
        }


def _busy_s(page: Page) -> float:
    page.call("Performance.enable")
    metrics = page.call("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def survey_ms(nodes: int, wanted: int) -> dict[str, float]:
    """Milliseconds of CPU for a survey of a tree with so many nodes: in all, and its longest piece."""
    pool = PagePool(nodes * 3)
    cache = RadixCache(pool, 1, ORDERS["lru"])
    for first in range(nodes // 100):
        for last in range(99):
            tokens = [first, 1_000_000 + first, 2_000_000 + last]
            held = cache.pages(cache.match(tokens, "", 3))
            cache.insert(tokens, held + pool.take(3 - len(held)), "")
    gc.collect()  # what is due for all that has just been made is not the survey's
    survey, pieces, done = Survey(cache, wanted), [], False
    while not done:
        begin = time.thread_time()
        done = survey.advance(LOOKS)
        if done:
            survey.report()
        pieces.append(1000 * (time.thread_time() - begin))
    return {"nodes": cache.num_nodes, "all": sum(pieces), "longest_piece": max(pieces)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "ui_page.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paint = first_paint_ms(folder)
        memory = tab_memory(folder, args.minutes, args.instances, args.nodes)
    surveys = {str(wanted): survey_ms(100_000, wanted) for wanted in (1000, 10_000)}
    heap = memory["heap_bytes"]
    tenth = max(1, len(heap) // 10)
    before, after = statistics.median(heap[:tenth]), statistics.median(heap[-tenth:])
    print(f"first paint        {statistics.median(paint):8.0f} ms (most {max(paint):.0f})")
    print(f"tab's heap         {before / 1e6:8.2f} MB, {args.minutes:g} minutes later {after / 1e6:.2f} MB")
    print(
        f"updates            {memory['states_per_minute']:8.1f} a minute, busy {memory['busy_share']:.1%} of the time"
    )
    for wanted, found in surveys.items():
        print(f"survey of {wanted:>6}   {found['all']:8.1f} ms, its longest piece {found['longest_piece']:.2f} ms")
    result = {
        "machine": engines.machine(),
        "minutes": args.minutes,
        "paint_ms": paint,
        "tab": memory,
        "survey_ms": surveys,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
