"""The benchmarks' command line on tiny shapes: a record and a plot of every op; what `make gpu` reads and says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rac_engine import prune
from rac_engine.recipe.settings import ExpertSettings, PruneSettings
from tests import tiny
from tests.engine.inputs import inputs_of

ROOT = Path(__file__).parents[2]
OPS = ("hessian", "column_norm", "cross", "factor", "select", "sweep", "refine", "packed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_all_ops_in_one_record(tmp_path: Path) -> None:
    record, plot = tmp_path / "record.json", tmp_path / "plot.png"
    sizes = ["--columns", "40", "64", "--shapes", "24x40", "--tokens", "100", "--repeats", "2", "--device", "cpu"]
    done = run("benchmarks/kernels.py", *sizes, "--out", str(record), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert {row["op"] for row in found["measurements"]} == set(OPS)
    assert found["machine"]["versions"]["torch"] == torch.__version__.split("+")[0] or found["machine"]["cpu"]
    for row in found["measurements"]:
        assert len(row["seconds"]) == 2 and row["limit"] > 0 and row["share_of_limit"] == row["limit"] / row["median"]
        assert row["ratio"] == pytest.approx(1) if row["name"] == "rac_kernels" else row["ratio"] > 0
    errors = {
        (row["op"], row["name"]): float(row["extra"]["error"])
        for row in found["measurements"]
        if "error" in row["extra"]
    }
    ours = {op: error for (op, name), error in errors.items() if name == "rac_kernels"}
    assert set(ours) == {"hessian", "column_norm", "cross", "factor", "select"} and max(ours.values()) < 1e-5
    assert errors["cross", "torch, bf16, rounded each call"] > 1e-5
    assert all(float(row["extra"]["rounded"]) < 1e-2 for row in found["measurements"] if row["op"] == "packed")
    assert ours["select"] == 0 and not any(row["extra"].get("wrong") for row in found["measurements"])
    if "no plot" not in done.stdout:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_solvers_in_one_record_that_goes_on(tmp_path: Path) -> None:
    record, plot = tmp_path / "record.json", tmp_path / "plot.png"
    command = ["benchmarks/solvers.py", "--shapes", "24x32", "--out", str(record), "--sparsities", "0.6"]
    assert run(*command).returncode == 0
    (first, *_) = json.loads(record.read_text())["rows"]
    record.write_text(json.dumps({"rows": [{**first, "seconds": 5.0}]}))
    done = run(*command, "2:4", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    rows = json.loads(record.read_text())["rows"]
    assert rows[0] == {**first, "seconds": 5.0} and len(rows) == 6
    errors = {(row["method"], row["sparsity"]): row["error"] for row in rows}
    for sparsity in ("0.6", "2:4"):
        assert 0 < errors["admm", sparsity] < errors["sparsegpt", sparsity] < 1
        by_alps = errors["admm", sparsity] / errors["alps", sparsity]
        assert f"| {by_alps:.3f}, {by_alps:.3f} |" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


ALPS_LIKE = """
import torch
class ALPS_prune:
    def __init__(self, layer, nsamples, seqlen):
        self.layer = layer
    def ALPS_admm(self, sp, nm_n=0, nm_m=0):
        W = self.layer.weight.data.to("cuda:0")
        assert torch.equal(self.XtX, self.XtX.T) and self.XtX.shape[0] == W.shape[1]
        torch.cuda.synchronize()
        groups = W.reshape(-1, nm_m or W.numel())
        goes = groups.abs().topk(SPARED + (nm_m - nm_n if nm_m else round(sp * W.numel())), largest=False).indices
        self.layer.weight.data = groups.scatter(1, goes, 0.0).reshape(W.shape)
"""


def test_the_published_code_of_alps_runs_beside(tmp_path: Path) -> None:
    """A stand-in with its names, which prunes by magnitude on a GPU; one that prunes too much is found out."""
    clone, record = tmp_path / "ALPS", tmp_path / "record.json"
    command = ["benchmarks/solvers.py", "--shapes", "24x32", "--methods", "admm", "--sparsities", "0.6", "2:4"]
    command += ["--out", str(record), "--alps-code", str(clone)]
    refused = run(*command)
    assert refused.returncode == 2 and "no alps.py there" in refused.stderr and not record.exists()
    clone.mkdir()
    (clone / "alps.py").write_text(ALPS_LIKE.replace("SPARED", "1"))
    assert "are not those of 0.6" in run(*command).stderr and not record.exists()
    (clone / "alps.py").write_text(ALPS_LIKE.replace("SPARED", "0"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["alps_code"] == {"url": "https://github.com/mazumder-lab/ALPS", "commit": None}
    errors = {(row["method"], row["sparsity"]): row["error"] for row in found["rows"]}
    for sparsity in ("0.6", "2:4"):
        by_code = errors["admm", sparsity] / errors["alps-code", sparsity]
        assert by_code < 1 and f"| {by_code:.3f}, {by_code:.3f} |" in done.stdout


def test_the_frontier_counts_bits_and_rounds_on_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    frontier = importlib.import_module("frontier")
    out = tmp_path / "pruned"
    prune(tiny.save(tmp_path / "source"), out, PruneSettings(method="magnitude", sparsity=0.75))
    frontier._round(out, tmp_path / "rounded", 0.25, "int4")
    assert frontier.bits(tmp_path / "source", "same", "0") == 16
    assert frontier.bits(out, "same", "0.75") == pytest.approx(5, abs=0.1)
    assert frontier.bits(out, "int4", "0.75") >= frontier.bits(tmp_path / "rounded", "int4", "0.75") > 1
    sequences = tiny.calibration().sequences[:2]
    assert frontier.hidden_error(out, out, sequences) == 0 < frontier.hidden_error(out, tmp_path / "rounded", sequences)
    cell = {"sparsity": "0.8", "values": "int4", "bits": 2.0, "accuracy": 0.5, "ci95": [0.4, 0.6], "hidden_error": 0.1}
    text = frontier.table([{**cell, "how": "solver"}, {**cell, "how": "nearest", "accuracy": 0.25}])
    assert "| 0.8 | int4 | 2.00 | 0.500 [0.400, 0.600] | 0.250 [0.400, 0.600] | 0.1000 | 0.1000 |" in text


def test_cells_of_the_quality_record_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is found again by its name, and no two cells share one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    options = ["--token-counts", "5k", "200k", "--dampings", "0.003", "--without", "sort", "--reconstruct", "auto"]
    monkeypatch.setattr(sys, "argv", ["quality.py", "--work", "x", "--methods", "admm", "magnitude", *options])
    names = [cell.name for cell in quality._cells(quality._arguments())]
    assert len(names) == len(set(names)) == 2 * 6 * 4
    assert "admm-text-1of4-damping0.003-tokens5000-without-sort" in names
    assert quality.Cell("admm", "traces", "2:4").name == "admm-traces-2of4"
    assert quality.Cell("alps", "traces", "0.8", "dense").name == "alps-traces-0.8-dense"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_either_router_may_choose_the_tokens_that_experts_are_matched_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    """By how many tokens an expert was pruned: those that the dense model's router sends to it, or the pruned one's."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    mixture = importlib.import_module("mixture")
    source, calibration = tiny.save(tmp_path / "model", family, dtype=torch.float32), tiny.calibration()
    ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
    errors = []
    for name in mixture.WAYS:
        out = tmp_path / name
        with mixture.way(name):
            report = prune(source, out, PruneSettings(sparsity=0.7, experts=ExpertSettings(min_tokens=0)), calibration)
        sent = inputs_of(source if name == "dense router" else out, ids)
        rows = [row for row in report.matrices if row.get("expert") is not None]
        for row in rows:
            chosen = sent[row["name"].partition(".experts.")[0] + ".experts: chosen"]
            assert row["tokens"] == int((chosen == row["expert"]).sum()), (name, row["name"])
        errors.append([row["objective"] for row in rows])
    assert errors[0] != errors[1] != errors[2] != errors[0]


def test_an_op_that_is_not_there() -> None:
    done = run("benchmarks/kernels.py", "magic")
    assert done.returncode == 2 and "magic is not one of hessian" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run it all")
def test_make_gpu_without_a_gpu() -> None:
    done = run("benchmarks/gpu.py")
    assert done.returncode == 2 and "needs a GPU" in done.stderr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("make_gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_gpu", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_sanitizer_summaries(gpu: Any) -> None:
    assert gpu.errors("x") is None
    assert gpu.errors("= ERROR SUMMARY: 0 errors") == 0
    assert gpu.errors("= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)") == 3
    assert gpu.refused("========= Error: Device not supported. Please refer to ...\n")
    assert not gpu.refused("= ERROR SUMMARY: 1 error")


@pytest.fixture
def session(gpu: Any, tmp_path: Path) -> Any:
    """Of five minutes."""
    (tmp_path / "out").mkdir()
    return gpu.Session(tmp_path / "out", time.perf_counter() + 300)


def test_make_gpu_goes_on_after_a_part_that_hangs(gpu: Any, session: Any) -> None:
    first = ["build", "small", "hot", "hot tests", "streaming"]
    assert list(gpu.PARTS)[:5] == first and sum(gpu.LIMITS[part] for part in first) < 9 * 60
    assert list(gpu.PARTS) == list(gpu.LIMITS)
    gpu.LIMITS["tests"] = 1
    found = session.run("tests", [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(60)"])
    assert found["ended"] == "stopped after 1 s" and "so far" in found["output"] and gpu.is_failure(found)
    assert session.run("build", [sys.executable, "-c", "raise SystemExit(3)"])["ended"] == "failed with 3"
    assert "so far" in (session.out / "tests.log").read_text()


def test_make_gpu_runs_the_tests_files_at_once(gpu: Any, session: Any, tmp_path: Path) -> None:
    """Within one limit; one that has nothing to run is no failure, one that hangs is told from the others."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_good.py").write_text("def test(): pass")
    (folder / "test_none.py").write_text("import pytest\npytest.skip('no GPU', allow_module_level=True)")
    (folder / "test_bad.py").write_text("def test(): assert False")
    (folder / "test_sweep.py").write_text("def test(): pass")
    gpu.ROOT, gpu.LIMITS["tests"] = tmp_path, 50
    found = gpu.tests(session)
    assert found["ended"] == "failed: test_bad failed with 1"
    assert set(found["files"]) == {"good", "none", "bad"}
    assert found["files"]["none"]["ended"].startswith("passed")
    (folder / "test_bad.py").write_text("import time\ndef test(): time.sleep(60)")
    gpu.LIMITS["tests"] = 10
    found = gpu.tests(session, some=("sweep", "bad", "not there"))
    assert list(found["files"]) == ["sweep", "bad"]
    assert "test_bad stopped" in found["ended"] and gpu.is_failure(found) and found["seconds"] < 40


def test_make_gpu_stops_what_a_part_started(gpu: Any, session: Any) -> None:
    gpu.LIMITS["tests"] = 5
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    found = session.run("tests", [sys.executable, "-c", f"{child}; import time; time.sleep(60)"])
    assert found["ended"] == "stopped after 5 s"
    stat = Path(f"/proc/{found['output'].strip()}/stat")

    def stopped() -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):
            return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
        return True

    until = time.monotonic() + 20  # a busy machine takes its time over a process that is killed
    while not stopped() and time.monotonic() < until:
        time.sleep(0.05)
    assert stopped()


ORDER = ["build", "small", "hot", "hot tests", "streaming", "packed", "benchmarks", "tests"]
ORDER += ["memcheck", "racecheck", "initcheck"]


def test_make_gpu_writes_after_each_part(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    before: list[list[str]] = []

    def ended(_: Any) -> dict[str, Any]:
        file = out / "record.json"
        before.append(list(json.loads(file.read_text())["parts"]) if file.exists() else [])
        return {"ended": "passed", "seconds": 1, "output": ""}

    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, ended))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.main() == 0
    assert before == [ORDER[:done] for done in range(len(ORDER))]
    record = json.loads((out / "record.json").read_text())
    assert list(record["parts"]) == ORDER and record["not_reached"] == [] and "driver" in record


def test_make_gpu_ends_with_its_minutes(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that fail, raise, hang and are left out; those that there is no time for are listed and are no failure."""

    def python(name: str, code: str) -> Any:
        return lambda session: session.run(name, [sys.executable, "-c", code])

    def raises(_: Any) -> dict[str, Any]:
        raise OSError("disk full")

    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "SAVING", 0.5)
    parts = {"build": python("build", "pass"), "small": raises, "hot": python("hot", "raise SystemExit(1)")}
    parts |= {"hot tests": lambda _: gpu.left_out("nothing there")}
    parts |= {"streaming": python("streaming", "import time; time.sleep(60)"), "packed": python("packed", "pass")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    start = time.perf_counter()
    assert gpu.go(gpu.Session(tmp_path, start + 6), {"device": "none"}) == ["small", "hot"]
    assert time.perf_counter() - start < 20
    record = json.loads((tmp_path / "record.json").read_text())
    ends = {name: part["ended"] for name, part in record["parts"].items()}
    assert ends["small"] == "failed: OSError('disk full')" and ends["hot"] == "failed with 1"
    assert ends["streaming"].startswith("not done") and ends["packed"] == "not reached"
    assert record["not_reached"] == ["streaming", "packed"] and record["device"] == "none"


REACHED = """
import sys
import time
from contextlib import suppress
import rac_kernels.backends.gpu
import small
from triton.runtime.interpreter import InterpretedFunction as Kernel

def name(kernel):
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"

modules = [module for key, module in sys.modules.items() if key.startswith("rac_kernels.")]
kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
seen, launch, said = set(), Kernel.__getitem__, []

def spy(kernel, grid):
    seen.add(name(kernel))
    return launch(kernel, grid)

Kernel.__getitem__ = spy
rac_kernels.backends.gpu.processors = lambda device: 132  # sums are split as on a large GPU
assert small.main("cpu", 132, 1100, (small.torch.float16,), 3000, said.append) == [], said
print(sorted({name(kernel) for kernel in kernels if kernel.fn.__name__.endswith("_kernel")} - seen))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets what a GPU would run")
def test_the_sanitizers_cases_reach_every_kernel() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT / 'tests' / 'gpu'}"}
    done = subprocess.run(
        [sys.executable, "-c", REACHED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
