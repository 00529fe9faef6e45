"""Does a message over rings ever wait for a timeout? Two processes answer each other at random moments: at once, while
the other one stays awake, as it goes to sleep, and long after.

python benchmark/lost_wakes.py [--seconds 60]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.core.messages import StopHit
from moonlang.mooncake.endpoint import MooncakeEndpoint

TIMEOUT_NS = 3 * NS_PER_S
_START_NS = 60 * NS_PER_S


def pause(draw: random.Random) -> None:
    kind = draw.random()
    if kind < 0.4:
        until_ns = monotonic_ns() + draw.randrange(200_000)
        while monotonic_ns() < until_ns:
            pass
    elif kind < 0.5:
        sleep_s(draw.random() / 1000)


def play(name: str, folder: str, seconds: float) -> tuple[int, int, int]:
    """Messages that came, those that were there when a wait had timed out, the longest wait (ns)."""
    other = "b" if name == "a" else "a"
    box = MooncakeEndpoint(name, {peer: f"ipc://{folder}/{peer}" for peer in ("a", "b")})
    draw = random.Random(name)
    came = lost = longest_ns = 0
    if name == "a":
        box.send(other, StopHit("begin"))
        box.wait(_START_NS)
    end_ns = monotonic_ns() + int(seconds * NS_PER_S)
    while True:
        begun_ns = monotonic_ns()
        box.wait(TIMEOUT_NS)
        waited_ns = monotonic_ns() - begun_ns
        if not (found := box.recv()):
            continue
        came += 1
        lost += came > 1 and waited_ns >= TIMEOUT_NS
        longest_ns = max(longest_ns, waited_ns if came > 1 else 0)
        over = name == "a" and monotonic_ns() > end_ns
        if found[0].body == StopHit("end"):
            break
        pause(draw)
        box.send(other, StopHit("end" if over else "on"))
        if over:
            break
    box.close()
    return came, lost, longest_ns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--as", dest="name", default="a", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        folder = args.folder or own
        peer = None
        if args.name == "a":
            peer = subprocess.Popen([sys.executable, __file__, "--as", "b", "--folder", folder])
        came, lost, longest_ns = play(args.name, folder, args.seconds)
        print(f"{args.name}: {came} messages came, {lost} of them too late; the longest wait {longest_ns / 1e6:.1f} ms")
        if peer is not None:
            peer.wait(2 * TIMEOUT_NS / NS_PER_S)


if __name__ == "__main__":
    main()
