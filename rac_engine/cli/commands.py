"""The subcommands: their options, and what they do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_engine.base.errors import BadInput
from rac_engine.cli.options import (
    add_device,
    add_fields,
    add_limits,
    add_restart,
    console_of,
    resolved_device,
    settings_of,
    size,
)

if TYPE_CHECKING:
    from rac_engine.recipe import Recipe


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file that says everything about the job")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned checkpoint and all results")
    add_device(parser)
    add_limits(parser)
    add_restart(parser, "job")


def _run(args: argparse.Namespace) -> int:
    from rac_engine.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    from rac_engine.report import table
    from rac_engine.run import run

    result = run(
        recipe,
        args.out,
        device=resolved_device(args.device),
        restart=args.restart,
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        console=console_of(args),
    )
    if result.rows:
        print(table(result.rows))
    print(f"report  {result.report}")
    return 0


def _add_trace(parser: argparse.ArgumentParser) -> None:
    from rac_engine.recipe import TraceSettings

    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="TRACES", help="new folder for the traces")
    names = ("prompts", "tokens", "samples", "max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    add_fields(parser, "what is sampled", TraceSettings, *names)
    add_device(parser)
    add_restart(parser, "sampling")


def _trace(args: argparse.Namespace) -> int:
    from rac_engine.recipe import TraceSettings

    settings = settings_of(args, TraceSettings)
    from rac_engine.traces import generate

    report = generate(
        args.model,
        settings,
        args.out,
        device=resolved_device(args.device),
        restart=args.restart,
        progress=console_of(args).progress,
    )
    print(f"{report.out}: {report.describe()}")
    return 0


def _add_prune(parser: argparse.ArgumentParser) -> None:
    from rac_engine.recipe import CalibrationSettings, PruneSettings

    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a Hugging Face checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned checkpoint")
    parser.add_argument(
        "--calibration",
        dest="source",
        default=argparse.SUPPRESS,
        metavar="SOURCE",
        help="traces folder or file of `rac trace`, a .jsonl, or text:FILE (magnitude needs none)",
    )
    add_fields(
        parser, "calibration", CalibrationSettings, *[n for n in CalibrationSettings.model_fields if n != "source"]
    )
    add_fields(parser, "pruning", PruneSettings, *PruneSettings.model_fields)
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="take the sections `calibration` and `prune` from here; options win"
    )
    add_device(parser)
    add_limits(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print recipe and plan, write nothing")
    add_restart(parser, "job")


def _pruning_recipe(args: argparse.Namespace) -> Recipe:
    """What `rac prune` was asked for: the recipe's sections, if one is given, with the options on top."""
    from rac_engine.recipe import CalibrationSettings, PruneSettings, Recipe, Variant, load_recipe

    base = load_recipe(args.recipe) if args.recipe else Recipe(model=args.model)
    options = settings_of(args, PruneSettings)
    prune = Variant(name="options", prune=options).settings(base.prune)
    calibration = settings_of(args, CalibrationSettings, **base.calibration.model_dump())
    return Recipe(model=args.model, name=base.name, calibration=calibration, prune=prune)


def _prune(args: argparse.Namespace) -> int:
    recipe = _pruning_recipe(args)
    if recipe.calibration.source is None and recipe.prune.method != "magnitude":
        raise BadInput(
            f"--calibration is missing: {recipe.prune.method} needs a traces folder, a .jsonl or text:FILE "
            "(`rac trace` samples the model's own traces)"
        )
    device = resolved_device(args.device)
    if args.dry_run:
        return _dry_run(recipe, args, device)
    from rac_engine.base.sizes import figure, format_seconds, percent
    from rac_engine.engine import Metrics, prune
    from rac_engine.jobs.layout import RAC, REPORT
    from rac_engine.report import write_report

    console = console_of(args)
    done = prune(
        recipe.model,
        args.out,
        recipe,
        device=device,
        restart=args.restart,
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        progress=console.progress,
        finish=write_report,
    )
    metrics = Metrics(done.run, done.matrices, done.end)
    print(
        f"{done.out}: {percent(metrics.sparsity, 2)} zeros in {len(metrics.pruned)} matrices, mean relative error "
        f"{figure(metrics.mean_error)}, {format_seconds(done.end['seconds'])}"
    )
    for note in done.end["notes"]:
        print(f"note    {note}")
    print(f"report  {done.out / RAC / REPORT}")
    return 0


def _dry_run(recipe: Recipe, args: argparse.Namespace, device: str) -> int:
    from rac_engine.engine import calibration_of
    from rac_engine.plan import make_plan, render
    from rac_engine.recipe import dump

    if os.path.lexists(args.out):
        raise BadInput(f"{args.out}: exists; choose another output folder, or remove it")
    limits: dict[str, Any] = {"on_gpu": device.startswith("cuda")}
    limits |= {"device_memory": args.device_memory, "host_memory": args.host_memory}
    if recipe.prune.method == "magnitude":
        plan = make_plan(recipe.model, recipe.prune, **limits)
    else:
        calibration = calibration_of(recipe)
        lengths = [len(sequence.token_ids) for sequence in calibration.sequences]
        mean = max(1, sum(lengths) // max(1, len(lengths)))
        plan = make_plan(recipe.model, recipe.prune, sum(lengths), mean, max(lengths, default=1), **limits)
        print(f"calibration: {calibration.describe()}\n")
    print(dump(recipe))
    print(render(plan))
    print("\ndry run: nothing was written")
    return 0


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from rac_engine.recipe import EvalSettings

    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="folder of a Hugging Face checkpoint, dense or pruned"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS", help="JSON file for the results")
    add_fields(parser, "what is asked", EvalSettings, *EvalSettings.model_fields)
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RESULTS0",
        help="results of another model on the same problems, to compare with",
    )
    add_device(parser)
    add_restart(parser, "evaluation")


def _eval(args: argparse.Namespace) -> int:
    from rac_engine.recipe import EvalSettings

    settings = settings_of(args, EvalSettings)
    from rac_engine.base.sizes import percent
    from rac_engine.evaluation import evaluate

    result = evaluate(
        args.model,
        settings,
        args.out,
        baseline=args.baseline,
        device=resolved_device(args.device),
        restart=args.restart,
        progress=console_of(args).progress,
    )
    figures = result.summary
    low, high = figures["ci95"]
    print(
        f"{args.model}: {percent(figures['accuracy'])} of {figures['problems']} right "
        f"[{percent(low)}, {percent(high)}], decode length mean {figures['mean_tokens']:.0f}, "
        f"p95 {figures['p95_tokens']}, {percent(figures['cut_off_share'])} cut off"
    )
    if result.comparison:
        against = result.comparison
        print(
            f"against {against['baseline']}: {against['lost']} lost, {against['gained']} gained "
            f"(McNemar p = {against['mcnemar_p']:.2g}), {against['length_ratio']:.2f} × as long"
        )
    print(f"results  {result.path}")
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of `rac prune` or `rac run`")


def _report(args: argparse.Namespace) -> int:
    from rac_engine.report import write_report

    print(write_report(args.out))
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from rac_engine.recipe import PruneSettings

    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint; config.json alone is enough")
    parser.add_argument("--tokens", type=size, default=1_000_000, metavar="N", help="calibration tokens (default: 1M)")
    parser.add_argument(
        "--length", type=size, default=1024, metavar="N", help="mean length of a sequence (default: 1024)"
    )
    parser.add_argument(
        "--max-length", type=size, metavar="N", help="tokens of the longest sequence (default: the mean length)"
    )
    add_fields(parser, "pruning", PruneSettings, *PruneSettings.model_fields)
    add_limits(parser)
    parser.add_argument("--json", action="store_true", help="print it for programs: bytes and FLOPs as numbers")


def _plan(args: argparse.Namespace) -> int:
    from rac_engine.plan import device_peaks, make_plan, render
    from rac_engine.recipe import PruneSettings

    settings = settings_of(args, PruneSettings)
    if not args.tokens or not args.length:
        raise BadInput("--tokens and --length should be at least 1")
    on_gpu = args.device_memory is not None
    peaks, whose = device_peaks(on_gpu)
    plan = make_plan(
        args.model,
        settings,
        args.tokens,
        min(args.length, args.max_length or args.length),
        args.max_length,
        on_gpu=on_gpu,
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        peaks=peaks,
    )
    print(plan.to_json() if args.json else f"times after the peaks of {whose}\n\n{render(plan)}")
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of `rac prune` or `rac run`")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="MODEL",
        help="also prove that what was not pruned is bit-equal to this checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="print it for programs")


def _verify(args: argparse.Namespace) -> int:
    from rac_engine.engine import verify

    result = verify(args.out, args.source, console_of(args).progress)
    print(result.to_json() if args.json else result.summary())
    return 1 if result.problems else 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it for programs")


def _doctor(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from rac_engine.cli.doctor import examine, render

    findings = examine()
    print(json.dumps([dataclasses.asdict(f) for f in findings], indent=1) if args.json else render(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0


@dataclass(frozen=True)
class _Command:
    """A subcommand: its line in the overview, examples, its options, and what it does."""

    summary: str
    examples: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


_COMMANDS = {
    "run": _Command(
        "trace, prune, evaluate and report, as a recipe says",
        "rac run examples/demo.yaml OUT",
        _add_run,
        _run,
    ),
    "trace": _Command(
        "sample the model's own chains of thought",
        "rac trace MODEL --prompts prompts.jsonl --tokens 1M --out TRACES",
        _add_trace,
        _trace,
    ),
    "prune": _Command(
        "prune a checkpoint",
        "rac prune MODEL OUT --calibration TRACES --sparsity 0.5\n"
        "rac prune MODEL OUT --calibration TRACES --pattern 2:4 --dense 'model\\.layers\\.0\\..*'\n"
        "rac prune MODEL OUT --calibration text:FILE --method wanda --dry-run",
        _add_prune,
        _prune,
    ),
    "eval": _Command(
        "measure accuracy and decode lengths on problems with answers",
        "rac eval MODEL --problems problems.jsonl --out dense.json\n"
        "rac eval OUT --problems problems.jsonl --out pruned.json --baseline dense.json",
        _add_eval,
        _eval,
    ),
    "report": _Command("write the report of a job once more", "rac report OUT", _add_report, _report),
    "plan": _Command(
        "say what a job would touch and cost, without doing it",
        "rac plan MODEL --tokens 1M\n"
        "rac plan MODEL --device-memory 6GiB --host-memory 16GiB --tokens 1M --max-length 32k\n"
        "rac plan MODEL --pattern 2:4 --json",
        _add_plan,
        _plan,
    ),
    "verify": _Command(
        "prove from the files alone that an output is whole and sparse",
        "rac verify OUT --source MODEL",
        _add_verify,
        _verify,
    ),
    "doctor": _Command("say what this machine has and lacks for pruning", "rac doctor", _add_doctor, _doctor),
}
