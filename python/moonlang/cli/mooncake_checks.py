"""What the doctor says of Mooncake. It matters only to a server that is to use it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from moonlang.cli.check import Check
from moonlang.config.server_args import ServerArgs
from moonlang.mooncake.probe import probe


def run(args: ServerArgs) -> Iterator[Check]:
    needed = args.disaggregation_mode != "null" and args.disaggregation_transfer_backend.startswith("mooncake")
    for finding in probe(os.environ, host=args.host, device=args.disaggregation_ib_device):
        status = finding.status
        if finding.name == "mooncake" and status != "ok":
            status = "failed" if needed else "warning"
        elif status == "failed" and not needed:
            status = "warning"
        yield Check(finding.name, status, finding.text, finding.fix)
