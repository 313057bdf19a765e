"""Runs `rac` command lines in forked processes: everything is imported once, so that a job costs its own time only.

Reads an order a line from stdin, as JSON: `argv`, `cwd`, `output` (a file for stdout and stderr), `plans` (see
rac_engine.base.faults), `threads`, `disk` (activations live there), `free` (bytes that the disk has), and perhaps
`signal` and `after`, to send that signal after so many seconds. Answers with the exit status of the process, negative
for the signal that ended it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rac_engine.base import faults
from rac_engine.cli.app import main
from rac_engine.engine import setup
from tests.faults.world import make_world

LIMIT = 120.0


def serve() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # what is imported late, imported now
        for job in make_world(Path(folder)):
            os.chdir(folder)
            with open(os.devnull, "w") as nothing:
                sys.stdout, sys.stderr, out, err = nothing, nothing, sys.stdout, sys.stderr
                code = main(job.argv)
                sys.stdout, sys.stderr = out, err
            assert code == 0, job
    print("ready", flush=True)
    for line in sys.stdin:
        print(_run(json.loads(line)), flush=True)


def _run(order: dict[str, Any]) -> int:
    child = os.fork()
    if not child:
        code = 70
        try:
            os.chdir(order["cwd"])
            fd = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            torch.set_num_threads(order.get("threads", 1))
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            faults.arm(order.get("plans", ""))
            if "free" in order:
                vars(shutil)["disk_usage"] = lambda _: SimpleNamespace(free=order["free"])
            if order.get("disk"):
                planned = vars(setup)["plan_memory"]

                def on_disk(*args: Any, **options: Any) -> Any:
                    plan = planned(*args, **options)
                    return replace(plan, choice=replace(plan.choice, place="disk"))

                vars(setup)["plan_memory"] = on_disk
            code = main(order["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    began = time.monotonic()
    pidfd = os.pidfd_open(child)
    try:
        if "signal" in order and not _ended(pidfd, order["after"]):
            signal.pidfd_send_signal(pidfd, order["signal"])
        if not _ended(pidfd, LIMIT - (time.monotonic() - began)):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _ended(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], max(seconds, 0))[0])


if __name__ == "__main__":
    serve()
