"""How long until the last of N workers has a message, against one worker: groups of 1, 2 and 4 take turns.

python benchmark/plan_broadcast.py [--messages 300] [--rounds 7] [--bytes 2000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import engines

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.mooncake.broadcast import Broadcast, Handles, Subscription

HERE = Path(__file__).parent
GROUPS = (1, 2, 4)
_STAMP = struct.Struct("<q")


def work(arguments: list[str]) -> None:
    """A worker: prints, for each batch that ends with an empty message, how late each message was (ns)."""
    memory, bell, room, slot, workers = map(int, arguments)
    subscription = Subscription(Handles(memory, bell, room), slot, workers)
    late: list[int] = []
    while True:
        subscription.wait(60 * NS_PER_S)
        for frame in subscription.recv():
            if not frame:
                print(json.dumps(late), flush=True)
                late.clear()
                continue
            late.append(monotonic_ns() - _STAMP.unpack_from(frame)[0])


class Group:
    """N workers in processes of their own."""

    def __init__(self, workers: int, stack: ExitStack) -> None:
        self._sender = Broadcast(workers)
        handles = self._sender.handles
        fds = (handles.memory, handles.bell, handles.room)
        self._workers: list[subprocess.Popen[str]] = []
        for slot in range(workers):
            command = [sys.executable, __file__, "worker", *map(str, (*fds, slot, workers))]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=fds, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            self._workers.append(process)

    def measure(self, messages: int, size: int) -> float:
        """Median over the messages of how late the last worker was, in microseconds."""
        for _ in range(messages):
            self._sender.send(_STAMP.pack(monotonic_ns()) + bytes(size - _STAMP.size), 10 * NS_PER_S)
            sleep_s(0.002)  # until all sleep again, as workers do between steps
        self._sender.send(b"", 10 * NS_PER_S)
        late = [json.loads(worker.stdout.readline()) for worker in self._workers if worker.stdout is not None]
        return statistics.median(max(times) for times in zip(*late, strict=True)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bytes", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plan_broadcast.json")
    args = parser.parse_args()
    with ExitStack() as stack:
        groups = {workers: Group(workers, stack) for workers in GROUPS}
        rows = []
        for number in range(args.rounds + 1):
            row = {workers: group.measure(args.messages, args.bytes) for workers, group in groups.items()}
            if number:
                rows.append(row)
    for workers in GROUPS:
        ratio = statistics.median(row[workers] / row[1] for row in rows)
        print(
            f"{workers} workers: the last after {statistics.median(row[workers] for row in rows):.1f} us, {ratio:.2f}x"
        )
    args.out.write_text(json.dumps({"machine": engines.machine(), "rounds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2:])
    else:
        main()
