"""What the `Prefill batch` lines say of the throughput."""

from __future__ import annotations

import logging
import re

import pytest

from moonlang.base.clock import NS_PER_S
from moonlang.roles.step_log import StepLog
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import PlanReport, SchedulerConfig

MS = NS_PER_S // 1000


def test_plans_of_one_moment_share_the_time_that_they_take(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = StepLog(40)
    stats = Scheduler(SchedulerConfig(num_pages=8, page_size=16, context_length=64, max_running=2)).stats()
    for now_ms, tokens in ((1000, 1000), (1000, 500), (1250, 500), (1500, 250)):  # two plans are made at once at first
        log.prefill(PlanReport(new_tokens=tokens), stats, now_ms * MS)
    said = [re.search(r"input throughput \(token/s\): ([0-9.]+)", line) for line in caplog.messages]
    assert [float(found[1]) for found in said if found] == [1000, 1000, 4000, 1000]
