"""Entry of every child process: `python -m moonlang.roles.process JOB_FILE`. An edge: everything is caught here."""

from __future__ import annotations

import gc
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from moonlang.base import log
from moonlang.base.errors import ConfigError, MoonLangError
from moonlang.base.wakeup import Wakeup
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.seat import Seat
from moonlang.roles import lifeline, topology
from moonlang.roles.heartbeat import Heartbeat
from moonlang.roles.mailboxes import open_mailbox
from moonlang.roles.role import create, live


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """All a child is told; written by the parent as JSON into the run directory, which nobody else can enter."""

    role: str
    parent_pid: int
    addresses: dict[str, str]
    token: str
    args: ServerArgs
    model: ModelConfig
    seat: Seat | None = None  # among the ranks that compute the model, when there are several


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a child gave up, in its own words, for the parent to repeat."""

    code: str
    message: str
    hint: str


def job_file(directory: Path, role: str) -> Path:
    return directory / f"{role}.json"


def heartbeat_file(directory: Path, role: str) -> Path:
    return directory / f"{role}.beat"


def failure_file(directory: Path, role: str) -> Path:
    return directory / f"{role}.failed"


def main(path: Path, run: Callable[[Job, Path], None] | None = None) -> int:
    """Run the role described in `path` until SIGTERM (status 0). Status 2: a ConfigError; 1: anything else.

    run: what to do with the job and its folder; a role that is driven step by step if left out.
    """
    directory = path.parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    job = msgspec.json.decode(path.read_bytes(), type=Job)
    lifeline.die_with(job.parent_pid, directory)
    lifeline.set_title(topology.title(job.role))
    log.configure(job.role, job.args.log_level)
    try:
        (run or _run)(job, directory)
    except MoonLangError as error:
        failure = Failure(code=error.code, message=error.message, hint=error.hint)
        failure_file(directory, job.role).write_bytes(msgspec.json.encode(failure))
        if isinstance(error, ConfigError):
            log.get(__name__).error("%s", error)
            return error.exit_status
        traceback.print_exc()
        return 1
    except Exception:  # noqa: BLE001 - the edge of the process: whatever it was, the parent shows these lines
        traceback.print_exc()
        return 1
    return 0


def _run(job: Job, directory: Path) -> None:
    endpoint = open_mailbox(job.args.messaging_backend, job.role, job.addresses, job.token)
    heartbeat = Heartbeat(heartbeat_file(directory, job.role), job.args.watchdog_timeout)
    stop = Wakeup()
    role = create(job.role, job.args, job.model, endpoint, job.seat)
    lifeline.finished_loading()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    gc.collect()
    gc.freeze()  # what was loaded stays: no later collection has to walk it
    live(job.role, role, endpoint, stop=stop, heartbeat=heartbeat)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
