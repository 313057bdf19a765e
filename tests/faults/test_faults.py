"""Jobs that are killed, or whose disk fails, at every point where they write, sync or rename.

Whatever happens, the output is absent or whole, and the same command run again ends with the same bytes as a job that
nothing happened to. `make test` takes a selection of the points, `make soak` all of them.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest

from rac_engine.base.faults import OPERATIONS
from tests.faults.conftest import SOAK, Bench

JOBS = ("prune", "trace", "eval", "run")
KILLS = {"prune": 26, "trace": 14, "eval": 8, "run": 8}
"""Points at which a job is killed in `make test`, of some 960."""


def kill_points(bench: Bench, name: str) -> list[str]:
    """Plans that kill the job before, during and after every operation."""
    return [
        f"kill:any:{number}:{phase}"
        for number, point in enumerate(bench.points[name], 1)
        for phase in ("before", "during", "after")
        if phase != "during" or point.startswith("write ")
    ]


def spread(plans: list[str], count: int) -> list[str]:
    """`count` of the plans at even distances, the first and the last among them; all of them in a soak."""
    if SOAK or count >= len(plans):
        return plans
    return [plans[round(index * (len(plans) - 1) / max(count - 1, 1))] for index in range(count)]


def test_points_are_many_enough(bench: Bench) -> None:
    assert sum(KILLS.values()) >= 50
    assert all(len(kill_points(bench, name)) > KILLS[name] for name in JOBS)
    for operation in ("write", "reserve", "sync", "rename"):
        assert any(point.startswith(operation) for point in bench.points["prune"])


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_goes_on_to_the_same_bytes(bench: Bench, name: str) -> None:
    job, failures = bench.jobs[name], list[str]()
    plans = spread(kill_points(bench, name), KILLS[name])
    for plan in plans:
        status = bench.run(job, plan)
        if status != -signal.SIGKILL:
            failures.append(f"{plan}: {status} {bench.said}")
        elif problem := bench.mended(job):
            failures.append(f"{plan} ({bench.points[name][int(plan.split(':')[2]) - 1]}): {problem}")
        bench.clean(job)
    print(f"\n{name}: killed at {len(plans)} points, {len(failures)} failures")
    assert failures == []


@pytest.mark.parametrize("name", ["prune", "trace", "eval"])
def test_a_job_killed_again_and_again_ends_with_the_same_bytes(bench: Bench, name: str) -> None:
    job, stops, at = bench.jobs[name], 0, len(bench.points[name]) // 2
    while not (bench.folder / job.out).exists() and bench.run(job, f"kill:any:{at}:before") == -signal.SIGKILL:
        stops, at = stops + 1, at + 1
        assert not bench.problem(job)
    assert stops >= 2
    assert bench.mended(job) == ""


@pytest.mark.skipif(not SOAK, reason="kills at random times are for `make soak`")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_stopped_at_a_random_time_goes_on(bench: Bench, sent: signal.Signals) -> None:
    draw, failures, stopped, cleanly = random.Random(int(sent)), list[str](), 0, 0
    for _ in range(20):
        job = bench.jobs[draw.choice(JOBS)]
        after = draw.uniform(0, 0.5 if job.name != "run" else 2.0)
        status = bench.run(job, signal=int(sent), after=after)
        wanted = -sent if sent == signal.SIGKILL else 75
        # A signal that comes before Python has its handler in place ends the process the hard way.
        if status not in (0, wanted, -sent):
            failures.append(f"{job.name} after {after:.3f} s: {status} {bench.said}")
        if status == 75 and "to go on: rac " not in bench.said:
            failures.append(f"{job.name} after {after:.3f} s: {bench.said}")
        stopped += status != 0
        cleanly += status == 75
        if problem := bench.mended(job):
            failures.append(f"{job.name} after {after:.3f} s: {problem}")
        bench.clean(job)
    print(f"\n{sent.name} at 20 random times: {stopped} stopped, {cleanly} with 75, {len(failures)} failures")
    assert failures == []
    assert cleanly or sent == signal.SIGKILL


def operations(bench: Bench, name: str, kind: str) -> list[int]:
    """The numbers of all operations of a kind, among those of that kind."""
    return list(range(1, 1 + sum(point.startswith(f"{kind} ") for point in bench.points[name])))


def failing(bench: Bench, name: str) -> Iterator[tuple[str, int]]:
    """Plans with which something fails, and the exit code that is due."""
    few = 3 if name in ("prune", "trace") else 1
    for kind, code, status in (
        ("write", "ENOSPC", 2),
        ("reserve", "ENOSPC", 2),
        ("write", "EIO", 1),
        ("sync", "EIO", 1),
        ("rename", "EIO", 1),
        ("rename", "ENOSPC", 2),
        ("truncate", "EIO", 1),
        ("remove", "EIO", 1),
    ):
        plans = [f"fail:{kind}:{number}:{code}" for number in operations(bench, name, kind)]
        yield from ((plan, status) for plan in spread(plans, few))


def test_every_operation_is_among_the_points(bench: Bench) -> None:
    """So that no list of plans is empty without anybody noticing."""
    found = {point.partition(" ")[0] for points in bench.points.values() for point in points}
    assert found == set(OPERATIONS) - {"read"}


@pytest.mark.parametrize(("sent", "name"), [(signal.SIGTERM, "prune"), (signal.SIGINT, "trace")])
def test_a_signal_in_the_middle_of_a_job_ends_it_with_75(bench: Bench, sent: signal.Signals, name: str) -> None:
    job, ends, after = bench.jobs[name], list[int](), 0.04
    while 75 not in ends and len(ends) < 40:
        ends.append(bench.run(job, signal=int(sent), after=after))
        if ends[-1] == 75:
            assert f"to go on: rac {name} " in bench.said
        after *= 1.3 if ends[-1] else 0.6
        assert bench.mended(job) == ""
        bench.clean(job)
    assert 75 in ends


@pytest.mark.parametrize("name", JOBS)
def test_a_failing_disk_is_one_line_and_the_job_goes_on_later(bench: Bench, name: str) -> None:
    job, failures, count = bench.jobs[name], list[str](), 0
    for plan, due in failing(bench, name):
        count += 1
        status = bench.run(job, plan)
        lines = [line for line in bench.said.splitlines() if line.startswith("rac: ")]
        if status != due or len(lines) != 1 or "Traceback" in bench.said:
            failures.append(f"{plan}: {status} {bench.said}")
        if problem := bench.mended(job):
            failures.append(f"{plan}: {problem}")
        bench.clean(job)
    print(f"\n{name}: {count} failing writes, syncs and renames, {len(failures)} failures")
    assert failures == []


@pytest.mark.parametrize("name", JOBS)
def test_short_writes_change_nothing(bench: Bench, name: str) -> None:
    assert bench.run(bench.jobs[name], "short:write:1") == 0
    assert bench.problem(bench.jobs[name]) == ""


@pytest.mark.parametrize(("name", "few"), [("prune", 16), ("disk", 8)])
def test_a_flipped_bit_in_what_is_read_never_reaches_the_output(bench: Bench, name: str, few: int) -> None:
    """In a new job, and in one that goes on: a read that lies is found out, or what it read was not used."""
    job, failures, found = bench.jobs[name], list[str](), 0
    fresh = spread([f"flip:read:{number}" for number in range(1, bench.reads[name] + 1)], few)
    again = spread([f"flip:read:{number}" for number in range(1, bench.reads[name] // 2)], few // 2)
    half = f"kill:any:{len(bench.points[name]) * 2 // 3}:before"
    for plan, before in [(plan, "") for plan in fresh] + [(plan, half) for plan in again]:
        if before:
            assert bench.run(job, before) == -signal.SIGKILL
        status = bench.run(job, plan)
        found += status != 0
        if status not in (0, 1, 2) or "Traceback" in bench.said:
            failures.append(f"{plan}: {status} {bench.said}")
        if problem := bench.problem(job):
            failures.append(f"{plan}: published though not whole: {problem}")
        elif status and bench.run(job) == 2 and "another model: " in bench.said:
            # The bit was flipped as the source was gone through for the first time: that job had another source.
            bench.run(job, "", "--restart")
        if problem := bench.mended(job):
            failures.append(f"{plan}: {problem}")
        bench.clean(job)
    print(f"\n{name}: {len(fresh) + len(again)} reads with a flipped bit: {found} found out, {len(failures)} failures")
    assert failures == []
    assert found > 0.4 * (len(fresh) + len(again))


@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_renamed_before_it_is_on_the_disk(bench: Bench, name: str) -> None:
    """Every file that was written is synced again before the rename that publishes it, and so is its folder after."""
    dirty: set[str] = set()
    for point in bench.points[name]:
        operation, _, path = point.partition(" ")
        if operation in ("write", "reserve", "truncate"):
            dirty.add(path)
        elif operation == "sync":
            dirty.discard(path)
        elif operation == "rename" and (path.endswith(bench.jobs[name].out) or path.endswith(".parquet")):
            assert dirty == set()
    published = [index for index, point in enumerate(bench.points[name]) if point.startswith("rename ")][-1]
    assert bench.points[name][published].endswith(bench.jobs[name].out)
    assert bench.points[name][published + 1] == f"sync {bench.folder}"
