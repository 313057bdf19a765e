"""`rac prune`: prune a checkpoint."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rac_engine.base.errors import BadInput
from rac_engine.cli.commands.pruning_options import add_pruning
from rac_engine.cli.options import (
    Command,
    Parser,
    add_device,
    add_fields,
    add_limits,
    add_model,
    add_restart,
    console_of,
    resolved_device,
    settings_of,
)
from rac_engine.cli.output import emit

if TYPE_CHECKING:
    from rac_engine.engine import Metrics
    from rac_engine.recipe import Recipe


def _add_options(parser: Parser) -> None:
    from rac_engine.recipe import CalibrationSettings

    add_model(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned checkpoint")
    parser.add_argument(
        "--calibration",
        dest="source",
        action="append",
        default=argparse.SUPPRESS,
        metavar="SOURCE[:SHARE]",
        help="traces folder or file of `rac trace`, a .jsonl, or text:FILE (magnitude needs none); several, each with "
        "its share of the tokens, like TRACES:0.8 and text:FILE:0.2: they sum to 1, and without they are equal",
    )
    names = [name for name in CalibrationSettings.model_fields if name != "source"]
    add_fields(parser, "calibration", CalibrationSettings, names, ("part", "tokens"))
    add_pruning(parser)
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="take the sections `calibration` and `prune` from here; options win"
    )
    add_device(parser)
    add_limits(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print recipe and plan, write nothing")
    add_restart(parser, "job")


def _recipe(args: argparse.Namespace) -> Recipe:
    """The sections of the recipe that was given, if any, with the options on top."""
    from rac_engine.recipe import CalibrationSettings, PruneSettings, Recipe, Variant, load_recipe

    base = load_recipe(args.recipe) if args.recipe else Recipe(model=args.model)
    options = settings_of(args, PruneSettings)
    prune = Variant(name="options", prune=options).settings(base.prune)
    calibration = settings_of(args, CalibrationSettings, base.calibration.model_dump())
    return Recipe(model=args.model, name=base.name, calibration=calibration, prune=prune)


def _prune(args: argparse.Namespace) -> int:
    from rac_engine.solve import find_method

    recipe = _recipe(args)
    if recipe.calibration.takes_own_traces and find_method(recipe.prune.method).needs != "nothing":
        raise BadInput(
            f"--calibration is missing: {recipe.prune.method} needs a traces folder, a .jsonl or text:FILE "
            "(`rac trace` samples the model's own traces)"
        )
    device = resolved_device(args.device)
    if args.dry_run:
        return _dry_run(recipe, args, device)
    from rac_engine.base.sizes import format_seconds, percent
    from rac_engine.engine import Metrics, prune
    from rac_engine.jobs.layout import RAC, REPORT
    from rac_engine.pack import load_report, pack_output
    from rac_engine.report import write_report

    with console_of(args) as console:
        done = prune(
            recipe.model,
            args.out,
            recipe,
            device=device,
            restart=args.restart,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            progress=console.progress,
            note=lambda remark: console.say(f"note: {remark}"),
            finish=write_report,
            packer=pack_output,
        )
    metrics = Metrics(done.run, done.matrices, done.end, done.blocks, done.layers)
    emit(
        f"{done.out}: {percent(metrics.sparsity, 2)} zeros in {len(metrics.pruned)} matrices, {_errors(metrics)}"
        f"{_recovered(metrics)}, "
        f"{format_seconds(done.end['seconds'])}"
    )
    for note in done.end["notes"]:
        emit(f"note    {note}")
    emit(f"report  {done.out / RAC / REPORT}")
    if (packed := load_report(done.out)) is not None:
        emit(packed.summary())
    return 0


def _errors(metrics: Metrics) -> str:
    """The errors of matrices and hidden states in words, each with that on sequences held out."""
    from rac_engine.base.sizes import figure

    def both(seen: float | None, held: float | None) -> str:
        return figure(seen) + ("" if held is None else f" ({figure(held)} held out)")

    text = f"mean relative error {both(metrics.mean_error, metrics.held_out_error)}"
    if (last := metrics.last_layer) is None:
        return text
    return f"{text}, behind the last layer {both(last['relative_error'], last['held_out_error'])}"


def _recovered(metrics: Metrics) -> str:
    """The divergence from the dense model before and after recovery in words, where there was one."""
    from rac_engine.base.sizes import figure

    found = metrics.end.get("recovery")
    if found is None:
        return ""
    held = " held out" if found["held_out"] else ""
    return f", KL{held} {figure(found['before'])} → {figure(found['after'])}"


def _dry_run(recipe: Recipe, args: argparse.Namespace, device: str) -> int:
    """Print the recipe and the plan of the job; nothing is written."""
    from rac_engine.checkpoint import local_folder
    from rac_engine.engine import arranged_of, calibration_of
    from rac_engine.plan import Machine, make_plan, render
    from rac_engine.recipe import dump
    from rac_engine.solve import find_method

    if os.path.lexists(args.out):
        raise BadInput(f"{args.out}: exists; choose another output folder, or remove it")
    machine = Machine(device.startswith("cuda"), args.device_memory, args.host_memory)
    if find_method(recipe.prune.method).needs == "nothing":
        plan = make_plan(recipe.model, recipe.prune, machine=machine)
    else:
        folder = local_folder(recipe.model, weights=False)
        there = recipe.model_copy(update={"model": folder})
        calibration = calibration_of(there)
        if find_method(recipe.prune.method).needs == "hessian":
            calibration = arranged_of(there, calibration).calibration
        lengths = [len(sequence.token_ids) for sequence in calibration.sequences]
        plan = make_plan(
            recipe.model,
            recipe.prune,
            sum(lengths),
            max(1, sum(lengths) // max(1, len(lengths))),
            max(lengths, default=1),
            machine,
        )
        emit(f"calibration: {calibration.describe()}")
        for remark in calibration.remarks:
            emit(f"note    {remark}")
        emit("")
    emit(dump(recipe))
    emit(render(plan))
    emit("\ndry run: nothing was written")
    return 0


PRUNE = Command(
    "prune a checkpoint",
    [
        "rac prune MODEL OUT --calibration TRACES --sparsity 0.5",
        "rac prune MODEL OUT --calibration TRACES --pattern 2:4 --dense 'model\\.layers\\.0\\..*'",
        "rac prune MODEL OUT --calibration text:FILE --method wanda --dry-run",
    ],
    _add_options,
    _prune,
)
