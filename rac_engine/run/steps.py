"""The steps of a run, each done once, and the journal that says so."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rac_engine.base import faults
from rac_engine.base.console import Console
from rac_engine.base.files import copy_file, disk_errors, sha256_files, write_file
from rac_engine.base.jsonfiles import read_json
from rac_engine.base.sizes import format_bytes, percent
from rac_engine.engine import calibration_of, load_metrics, model_card, prune
from rac_engine.evaluation import evaluate
from rac_engine.jobs.journal import Journal
from rac_engine.jobs.layout import (
    CARD,
    DENSE,
    MANIFEST,
    METRICS,
    PACK,
    PRUNE_JOURNAL,
    PRUNED,
    RAC,
    RECIPE,
    REPORT,
    TRACES,
    TRACES_SUMMARY,
    VARIANTS,
    WORK,
    partial_of,
    results_of,
)
from rac_engine.jobs.publish import write_manifest
from rac_engine.pack import load_report, pack_output, packed_card
from rac_engine.recipe import CalibrationSettings, PruneSettings, Recipe, absolute, dump
from rac_engine.report import Row, comparison, write_report
from rac_engine.solve import find_method
from rac_engine.traces import Calibration, generate

_REWRITTEN = (CARD, f"{RAC}/{RECIPE}")  # at the end, to tell of the whole job


@dataclass(frozen=True)
class Limits:
    """The device of a job, and the bytes that it keeps to."""

    device: str
    device_memory: int | None
    host_memory: int | None


def models_of(recipe: Recipe) -> list[tuple[str, CalibrationSettings, PruneSettings]]:
    """Name, calibration and settings of the main model and the variants."""
    variants = [(v.name, v.calibration or recipe.calibration, v.settings(recipe.prune)) for v in recipe.compare]
    return [(PRUNED, recipe.calibration, recipe.prune), *variants]


@dataclass(frozen=True)
class _RunStep:
    """A piece of a run that is done once: `act` does it, `files` gives its files' SHA-256, `undo` removes them."""

    name: str
    act: Callable[[], None]
    files: Callable[[], dict[str, str]]
    undo: Callable[[], None]
    needs: Path | None = None
    """A folder that the step before has made for this one, and a later one removes."""


class Run:
    """A run whose folder is claimed. `done` are the seconds of the finished steps."""

    def __init__(self, recipe: Recipe, folder: Path, journal: Journal, limits: Limits, console: Console) -> None:
        self.recipe, self.folder, self.journal, self.limits, self.console = recipe, folder, journal, limits, console
        self.rac = folder / RAC
        self.work = self.rac / WORK
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
        names = [name for name in files if last or not name.startswith(f"{RAC}/{WORK}/")]
        if not all((self.folder / name).is_file() for name in names):
            return False
        return sha256_files(self.folder, names) == {name: files[name] for name in names}

    def finish(self) -> list[Row]:
        """Write what says how it went, remove what was only for the work, and return the comparison."""
        shutil.rmtree(self.work, ignore_errors=True)
        with disk_errors(self.folder):
            write_file(self.rac / RECIPE, dump(absolute(self.recipe)).encode())
            rows = comparison(self.folder)
            metrics = load_metrics(self.rac)
            card = {**metrics.run, "matrices": metrics.matrices, "evaluation": [asdict(row) for row in rows]}
            text, packed = model_card(card), load_report(self.folder)
            write_file(self.folder / CARD, (text if packed is None else packed_card(text, packed)).encode())
            write_report(self.folder)
        write_manifest(self.folder)
        return rows

    def _steps(self) -> list[_RunStep]:
        recipe, traces = self.recipe, self.rac / TRACES
        steps: list[_RunStep] = []
        if recipe.trace:
            steps.append(_RunStep("traces", self._trace, partial(self._digests, traces), partial(_remove, traces)))
        if recipe.evaluate:
            steps.append(self._answers("the dense model", DENSE, recipe.model))
        for name, calibration, settings in models_of(recipe):
            label = recipe.name if name == PRUNED else name
            act = partial(self._prune, name, calibration, settings)
            steps.append(_RunStep(f"prune {label}", act, partial(self._pruned, name), partial(self._unprune, name)))
            if recipe.evaluate:
                steps.append(self._answers(label, name, self.folder if name == PRUNED else self.work / name))
        return steps

    def _answers(self, label: str, name: str, model: Path) -> _RunStep:
        file = results_of(self.folder, name)
        act, files = partial(self._evaluate, model, name), partial(self._digests, file)
        undo = partial(_remove, file, partial_of(file))
        return _RunStep(f"answers of {label}", act, files, undo, model if model.is_relative_to(self.work) else None)

    def _digests(self, *made: Path) -> dict[str, str]:
        """SHA-256 of files, or of all that are in folders, by their names in the run's folder."""
        files = [file for at in made for file in (sorted(at.rglob("*")) if at.is_dir() else [at]) if file.is_file()]
        return sha256_files(self.folder, [str(file.relative_to(self.folder)) for file in files])

    def _pruned(self, name: str) -> dict[str, str]:
        """SHA-256 of what pruning left, the checkpoint's by its own manifest, without what `finish` writes again."""
        at, rewritten = (self.folder, _REWRITTEN) if name == PRUNED else (self.work / name, ())
        manifest = read_json(at / RAC / MANIFEST)["files"]
        files = {
            str((at / file).relative_to(self.folder)): entry["sha256"]
            for file, entry in manifest.items()
            if file not in rewritten
        }
        return files if name == PRUNED else files | self._digests(self._home(name))

    def _unprune(self, name: str) -> None:
        _remove(self.work / name, partial_of(self.work / name))
        if name != PRUNED:
            _remove(self._home(name))
            return
        _remove(*(entry for entry in self.folder.iterdir() if entry != self.rac))
        _remove(self.folder / PRUNE_JOURNAL, *(self.rac / file for file in (METRICS, MANIFEST, RECIPE, REPORT, PACK)))

    def _trace(self) -> None:
        assert self.recipe.trace
        out = self.rac / TRACES
        if not (out / TRACES_SUMMARY).exists():
            model, trace = self.recipe.model, self.recipe.trace
            report = generate(model, trace, out, **vars(self.limits), progress=self.console.progress)
            self.console.say(f"  {report.describe()}")
            self._say_notes(out / TRACES_SUMMARY)

    def _evaluate(self, model: Path, name: str) -> None:
        assert self.recipe.evaluate
        file = results_of(self.folder, name)
        if file.exists():
            partial_of(file).unlink(missing_ok=True)
        else:
            evaluate(model, self.recipe.evaluate, file, **vars(self.limits), progress=self.console.progress)
        figures = read_json(file)["summary"]
        self.console.say(
            f"  {percent(figures['accuracy'])} of {figures['problems']} right, "
            f"{figures['mean_tokens']:.0f} tokens each, {percent(figures['cut_off_share'])} cut off"
        )
        self._say_notes(file)

    def _say_notes(self, file: Path) -> None:
        """Say what a summary of traces or answers has noted."""
        for note in read_json(file).get("notes", []):
            self.console.say(f"  note  {note}")

    def _prune(self, name: str, calibration: CalibrationSettings, settings: PruneSettings) -> None:
        made = self.work / name
        for earlier in self.work.iterdir():
            if earlier not in (made, partial_of(made)):
                shutil.rmtree(earlier)  # a variant's weights, which have answered
        if not made.exists() and not (self._home(name) / METRICS).exists():
            recipe = self.recipe.model_copy(update={"calibration": calibration, "prune": settings})
            tokens = None if find_method(settings.method).needs == "nothing" else self._tokens(recipe)
            prune(
                recipe.model,
                made,
                recipe,
                tokens,
                **vars(self.limits),
                progress=self.console.progress,
                note=self._note,
                packer=pack_output,
            )
            if (packed := load_report(made)) is not None:
                self.console.say(f"  packed: {packed.bits:.2f} bits a weight, {format_bytes(packed.packed)} in all")
        if name == PRUNED:
            _move_up(made, self.folder)
        else:
            self._home(name).mkdir(parents=True, exist_ok=True)
            for file in (RECIPE, METRICS):
                copy_file(made / RAC / file, self._home(name) / file)

    def _note(self, remark: str) -> None:
        self.console.say(f"  note: {remark}")

    def _tokens(self, recipe: Recipe) -> Calibration:
        """The calibration of a recipe, in which no source means this job's traces."""
        return calibration_of(recipe, self.rac / TRACES)

    def _home(self, name: str) -> Path:
        """The folder that keeps the metrics of a model."""
        return self.rac if name == PRUNED else self.rac / VARIANTS / name


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
