"""`rac run`: traces → dense answers → prune → its answers → variants → report, in one folder that appears at the end.

Everything happens in OUT.partial. A journal there says which steps are finished, with the SHA-256 of every file that
they left; a job started again skips those whose files are still so, does the first one that is not and all behind it
once more, and the step at hand goes on where it stopped as far as it can (see traces, engine and evaluate).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rac_engine import faults
from rac_engine.card import model_card
from rac_engine.checkpoint import (
    Checkpoint,
    copy_file,
    disk_errors,
    publish,
    require_space,
    sha256_files,
    write_file,
    write_manifest,
)
from rac_engine.console import Console
from rac_engine.doctor import surroundings
from rac_engine.engine import calibration_of, not_finite, prune, require_memory, skipped_matrices
from rac_engine.errors import BadInput, Damaged, Interrupted
from rac_engine.evaluation import evaluate, load_problems
from rac_engine.journal import Journal, claimed, open_journal
from rac_engine.models import Model
from rac_engine.recipe import CalibrationSettings, PruneSettings, Recipe, absolute, dump
from rac_engine.report import REPORT, comparison, write_report
from rac_engine.results import (
    JOURNAL,
    MANIFEST,
    METRICS,
    RAC,
    STEPS,
    TRACES,
    Row,
    load_metrics,
    percent,
    read_json,
    step_times,
)
from rac_engine.solve import METHODS
from rac_engine.traces import SUMMARY, TOKEN_BYTES, Calibration, generate, load_prompts
from rac_engine.verify import verify

_WORK = "work"
_MAIN = "pruned"
_REWRITTEN = ("README.md", f"{RAC}/recipe.yaml")  # at the end, to tell of the whole job


@dataclass(frozen=True)
class _Limits:
    """Where a job computes, and in how many bytes it prunes."""

    device: str
    device_memory: int | None
    host_memory: int | None


@dataclass(frozen=True)
class RunResult:
    """What `rac run` made: the folder, its comparison table, and its report."""

    out: Path
    rows: list[Row]
    report: Path


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "cpu",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    console: Console | None = None,
) -> RunResult:
    """Do the whole job of `recipe` into the new folder `out`.

    Goes on with a job found unfinished in OUT.partial, unless `restart`. What is pruned keeps to `device_memory` and
    `host_memory` (see `prune`); a job may go on with others, where a step that has begun keeps its chunks. Raises
    `BadInput` for what cannot work, before anything is sampled where it can be known, and `Interrupted` on SIGINT,
    after which the same call goes on.
    """
    out, console = Path(out), console or Console(-1)
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists; choose another output folder, or remove it")
    limits = _Limits(device, device_memory, host_memory)
    with claimed(out) as folder:  # before anything is read: a second process is refused at once
        fresh = not any(folder.iterdir())
        identity = {**_flat(yaml.safe_load(dump(recipe))), **_check(recipe, limits), **surroundings(device)}
        journal = open_journal(folder, f"{RAC}/{STEPS}", identity, restart)
        rows: list[Row] = []
        try:
            _require_space(recipe, folder)
            job = _Job(recipe, folder, journal, limits, console)
            job.do()
            rows = job.finish()
            if problems := verify(folder, recipe.model, console.progress).problems:
                raise Damaged(f"{folder}: the finished output is damaged: {problems[0]}; run this again")
            publish(folder, out)
        except KeyboardInterrupt:
            if folder.exists() or not out.exists():
                raise Interrupted("stopped between two steps") from None
        except (BadInput, OSError):
            if fresh and not _worth_keeping(folder):
                shutil.rmtree(folder)
            raise
    return RunResult(out, rows, out / RAC / REPORT)


def _require_space(recipe: Recipe, folder: Path) -> None:
    """`BadInput` unless the traces, the pruned model and a variant beside it fit on the disk with what is there."""
    model = Checkpoint.open(recipe.model)
    copies = 2 if recipe.compare else 1
    wanted = copies * sum(info.nbytes for info in model.tensors.values())
    wanted += TOKEN_BYTES * recipe.trace.tokens if recipe.trace else 0
    taken = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    with disk_errors(folder):
        require_space(folder, max(wanted - taken, 0))


def _worth_keeping(folder: Path) -> bool:
    """Whether a run that cannot go on has something that took time: traces, or a finished step."""
    return any((folder / RAC).glob(f"{TRACES}*/*.parquet")) or bool(step_times(folder))


def _check(recipe: Recipe, limits: _Limits) -> dict[str, str]:
    """Find what can be known to fail before hours of sampling. Returns the SHA-256 of all that the job starts from."""
    model = Model.open(Checkpoint.open(recipe.model))
    digests = {"model": model.checkpoint.sha256()}
    for name, calibration, settings in _models(recipe):
        label = recipe.name if name == _MAIN else name
        try:
            skipped_matrices(model, settings)
            not_finite(model, settings)
            require_memory(model, settings, **vars(limits))
        except BadInput as error:
            raise BadInput(f"{label}: {error}") from None
        if METHODS[settings.method].needs == "nothing":
            continue
        if calibration.source is None and recipe.trace is None:
            raise BadInput(f"{label}: give the recipe a `trace` section, or `calibration` a source")
        if calibration.source is not None:
            known = calibration_of(recipe.model_copy(update={"calibration": calibration}))
            digests[f"calibration of {label}"] = known.sha256
    if recipe.trace:
        load_prompts(recipe.trace.prompts)
        digests["prompts"] = _sha256(recipe.trace.prompts)
    if recipe.evaluate:
        load_problems(recipe.evaluate.problems)
        digests["problems"] = _sha256(recipe.evaluate.problems)
    return digests


def _sha256(file: Path) -> str:
    return sha256_files(file.parent, [file.name])[file.name]


def _models(recipe: Recipe) -> list[tuple[str, CalibrationSettings, PruneSettings]]:
    """Name, calibration and settings of the main model and the variants."""
    variants = [(v.name, v.calibration or recipe.calibration, v.settings(recipe.prune)) for v in recipe.compare]
    return [(_MAIN, recipe.calibration, recipe.prune), *variants]


@dataclass(frozen=True)
class _Step:
    """What is done once: `act` does it, `files` are the SHA-256 of what that left, `undo` removes it."""

    name: str
    act: Callable[[], None]
    files: Callable[[], dict[str, str]]
    undo: Callable[[], None]
    needs: Path | None = None
    """What the step before has made for this one, and a later one removes."""


class _Job:
    """A run whose folder is claimed. `done` are the seconds of the finished steps."""

    def __init__(self, recipe: Recipe, folder: Path, journal: Journal, limits: _Limits, console: Console) -> None:
        self.recipe, self.folder, self.journal, self.limits, self.console = recipe, folder, journal, limits, console
        self.rac = folder / RAC
        self.work = self.rac / _WORK
        with disk_errors(folder):
            self.work.mkdir(parents=True, exist_ok=True)
        self.steps = self._steps()
        self._distrust()
        self.done: dict[str, float] = {record["step"]: record["seconds"] for record in self.journal.records[1:]}

    def do(self) -> None:
        """All steps that are not finished yet."""
        for number, step in enumerate(self.steps, 1):
            name = step.name
            self.console.step(number, len(self.steps), name + ("" if name not in self.done else ": was done"))
            if name in self.done:
                continue
            began = time.monotonic()
            step.act()
            self.done[name] = time.monotonic() - began
            self.journal.append({"step": name, "seconds": self.done[name], "files": step.files()})

    def _distrust(self) -> None:
        """Forget the first finished step whose files are not as it left them, and all behind it."""
        records = self.journal.records[1:]
        first = next((at for at, record in enumerate(records) if not self._is_whole(at, record)), len(records))
        if first == len(records):
            return
        needed = self.steps[first].needs
        if needed is not None and not needed.exists():
            first -= 1
        self.console.say(f"  what {self.steps[first].name!r} left is not as it was: it is done again")
        self.journal.cut(1 + first)
        for step in reversed(self.steps[first:]):
            step.undo()

    def _is_whole(self, at: int, record: dict[str, Any]) -> bool:
        files = record.get("files")
        if at >= len(self.steps) or record.get("step") != self.steps[at].name or not isinstance(files, dict):
            return False
        last = self.recipe.evaluate is not None and at == len(self.journal.records) - 2
        # A variant's weights go once they have answered.
        names = [name for name in files if last or not name.startswith(f"{RAC}/{_WORK}/")]
        if not all((self.folder / name).is_file() for name in names):
            return False
        return sha256_files(self.folder, names) == {name: files[name] for name in names}

    def finish(self) -> list[Row]:
        """Write what says how it went, remove what was only for the work, and return the comparison."""
        shutil.rmtree(self.work, ignore_errors=True)
        with disk_errors(self.folder):
            write_file(self.rac / "recipe.yaml", dump(absolute(self.recipe)).encode())
            rows = comparison(self.folder)
            metrics = load_metrics(self.rac)
            card = {**metrics.run, "matrices": metrics.matrices, "evaluation": [asdict(row) for row in rows]}
            write_file(self.folder / "README.md", model_card(card).encode())
            write_report(self.folder)
        write_manifest(self.folder)
        return rows

    def _steps(self) -> list[_Step]:
        recipe, traces = self.recipe, self.rac / TRACES
        steps: list[_Step] = []
        if recipe.trace:
            steps.append(_Step("traces", self._trace, partial(self._digests, traces), partial(_remove, traces)))
        if recipe.evaluate:
            steps.append(self._answers("the dense model", "dense", recipe.model))
        for name, calibration, settings in _models(recipe):
            label = recipe.name if name == _MAIN else name
            act = partial(self._prune, name, calibration, settings)
            steps.append(_Step(f"prune {label}", act, partial(self._pruned, name), partial(self._unprune, name)))
            if recipe.evaluate:
                steps.append(self._answers(label, name, self.folder if name == _MAIN else self.work / name))
        return steps

    def _answers(self, label: str, name: str, model: Path) -> _Step:
        file = self.rac / "eval" / f"{name}.json"
        act, files = partial(self._evaluate, model, name), partial(self._digests, file)
        undo = partial(_remove, file, file.with_name(f"{file.name}.partial"))
        return _Step(f"answers of {label}", act, files, undo, model if model.is_relative_to(self.work) else None)

    def _digests(self, *made: Path) -> dict[str, str]:
        """SHA-256 of files, or of all that are in folders, by their names in the run's folder."""
        files = [file for at in made for file in (sorted(at.rglob("*")) if at.is_dir() else [at]) if file.is_file()]
        return sha256_files(self.folder, [str(file.relative_to(self.folder)) for file in files])

    def _pruned(self, name: str) -> dict[str, str]:
        """SHA-256 of what pruning left, the checkpoint's by its own manifest, without what `finish` writes again."""
        at, rewritten = (self.folder, _REWRITTEN) if name == _MAIN else (self.work / name, ())
        manifest = read_json(at / RAC / MANIFEST)["files"]
        files = {
            str((at / file).relative_to(self.folder)): entry["sha256"]
            for file, entry in manifest.items()
            if file not in rewritten
        }
        return files if name == _MAIN else files | self._digests(self._home(name))

    def _unprune(self, name: str) -> None:
        _remove(self.work / name, self.work / f"{name}.partial")
        if name != _MAIN:
            _remove(self._home(name))
            return
        _remove(*(entry for entry in self.folder.iterdir() if entry != self.rac))
        _remove(*(self.rac / file for file in (METRICS, JOURNAL, MANIFEST, "recipe.yaml", REPORT)))

    def _trace(self) -> None:
        assert self.recipe.trace
        out = self.rac / TRACES
        if not (out / SUMMARY).exists():
            model, trace = self.recipe.model, self.recipe.trace
            report = generate(model, trace, out, device=self.limits.device, progress=self.console.progress)
            self.console.say(f"  {report.describe()}")

    def _evaluate(self, model: Path, name: str) -> None:
        assert self.recipe.evaluate
        file = self.rac / "eval" / f"{name}.json"
        if file.exists():
            file.with_name(file.name + ".partial").unlink(missing_ok=True)
        else:
            evaluate(model, self.recipe.evaluate, file, device=self.limits.device, progress=self.console.progress)
        figures = read_json(file)["summary"]
        self.console.say(
            f"  {percent(figures['accuracy'])} of {figures['problems']} right, "
            f"{figures['mean_tokens']:.0f} tokens each, {percent(figures['cut_off_share'])} cut off"
        )

    def _prune(self, name: str, calibration: CalibrationSettings, settings: PruneSettings) -> None:
        made = self.work / name
        for earlier in self.work.iterdir():
            if earlier.name not in (name, f"{name}.partial"):
                shutil.rmtree(earlier)  # a variant's weights, which have answered
        if not made.exists() and not (self._home(name) / METRICS).exists():
            recipe = self.recipe.model_copy(update={"calibration": calibration, "prune": settings})
            tokens = None if METHODS[settings.method].needs == "nothing" else self._tokens(recipe)
            prune(recipe.model, made, recipe, tokens, **vars(self.limits), progress=self.console.progress)
        if name == _MAIN:
            _move_up(made, self.folder)
        else:
            self._home(name).mkdir(parents=True, exist_ok=True)
            for file in ("recipe.yaml", METRICS):
                copy_file(made / RAC / file, self._home(name) / file)

    def _tokens(self, recipe: Recipe) -> Calibration:
        """The calibration of a recipe, in which no source means this job's traces."""
        if recipe.calibration.source is not None:
            return calibration_of(recipe)
        here = recipe.calibration.model_copy(update={"source": str(self.rac / TRACES)})
        return replace(calibration_of(recipe.model_copy(update={"calibration": here})), source=f"{RAC}/{TRACES}")

    def _home(self, name: str) -> Path:
        """Where the metrics of a model are kept."""
        return self.rac if name == _MAIN else self.rac / "variants" / name


def _remove(*entries: Path) -> None:
    """Remove files and folders, as far as they are there."""
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _move_up(made: Path, folder: Path) -> None:
    """Move a finished checkpoint from a folder within `folder` up into it; can be done again after a crash."""
    for source in filter(Path.exists, (made / RAC, made)):
        for entry in source.iterdir():
            faults.rename(entry, folder / entry.relative_to(made))
        source.rmdir()


def _flat(value: Any, at: str = "recipe") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names."""
    if isinstance(value, dict):
        children: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return {at: value}
    return {name: leaf for key, child in children for name, leaf in _flat(child, f"{at}.{key}").items()}
