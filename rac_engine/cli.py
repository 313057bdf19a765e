"""The `rac` command.

Exit codes: 0 done; 2 bad input (one line: what, where, how to mend); 75 stopped, and the command printed goes on;
1 anything else. Results go to stdout, progress and errors to stderr. Modules are imported when a command needs them, so
that `rac --help` is instant.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from rac_engine import __version__
from rac_engine.errors import BadInput, Interrupted, one_line

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rac_engine.console import Console
    from rac_engine.recipe import Recipe

    M = TypeVar("M", bound=BaseModel)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_LONGEST = 2000  # characters of an error
_RESUMABLE = ("run", "trace", "prune", "eval")


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see `{self.prog} --help`")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(110, _columns() - 2))


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((112, 24)).columns


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; by default the process's own) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BadInput as error:
        return _fail(2, f"error: {error}")
    except (Interrupted, KeyboardInterrupt) as error:
        return _stopped(words, error)
    except BrokenPipeError:
        # Whoever read our output has closed it; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error, verbose=bool({"-v", "--verbose"} & set(words)))


def _dispatch(words: Sequence[str]) -> int:
    try:
        args = _parser(words).parse_args(words)
    except SystemExit as done:  # --help and --version have said it all
        return int(done.code or 0)
    if args.verbosity <= 0:  # transformers' own bars and advice would stand between our lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with _terminable():
        return _COMMANDS[args.command].run(args)


def _fail(code: int, text: str) -> int:
    line = one_line(text)
    if len(line) > _LONGEST:  # a stranger's file may name things by whole pages
        line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
    print(f"rac: {line}", file=sys.stderr)
    return code


def _stopped(words: Sequence[str], error: BaseException) -> int:
    if next((word for word in words if word in _COMMANDS), None) not in _RESUMABLE:
        return _fail(1, "stopped")
    command = getattr(error, "command", None) or shlex.join(["rac", *(word for word in words if word != "--restart")])
    return _fail(75, f"{error if str(error) else 'stopped'}; to go on: {command}")


def _failed(error: Exception, verbose: bool) -> int:
    """What a user can understand and mend is a line; a bug shows where it is."""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return _fail(2, f"error: no space left for {error.filename or 'the output'}; free some and run this again")
    if kind in ("OutOfMemoryError", "MemoryError"):
        return _fail(1, f"out of memory: {error}; fewer --chunk-tokens or calibration tokens need less")
    if verbose or (kind not in ("FactorError", "Damaged") and not (isinstance(error, OSError) and error.errno)):
        traceback.print_exception(error)
    return _fail(1, f"failed: {kind}: {error}")


@contextmanager
def _terminable() -> Iterator[None]:
    """While a command runs, SIGTERM stops it as Ctrl-C does."""
    heard = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        heard.append(signal.SIGINT)
    before = {}
    try:
        for number in heard:
            before[number] = signal.signal(number, _stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt; within a finalizer, whose exceptions Python only reports, a moment later."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


# Options. Those that set a field of a recipe take their help, type and default from the field.


def _kind(annotation: Any) -> Any:
    """The plain type (or Literal) under Annotated, Optional and list."""
    if get_origin(annotation) is Literal:
        return annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _kind(parts[0]) if parts else annotation


def _size(text: str) -> int:
    from rac_engine.sizes import parse_size

    try:
        return parse_size(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _fields(parser: argparse.ArgumentParser, title: str, model: type[BaseModel], *names: str) -> None:
    """An option for each of the model's fields `names`; one that is not given leaves no trace in the namespace."""
    group = parser.add_argument_group(title)
    for name in names:
        field = model.model_fields[name]
        kind = _kind(field.annotation)
        if hasattr(field.default, "model_fields_set") or hasattr(kind, "model_fields"):
            continue  # sections of their own, in recipes only
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = {int: _size, float: float, Path: Path}.get(kind, str)
            options["metavar"] = {int: "N", float: "X", Path: "FILE"}.get(
                kind, "N:M" if name == "pattern" else name.upper()
            )
        if get_origin(field.annotation) is list and name == "weight_positions":
            options |= {"type": str, "metavar": "S:W,…"}
        elif get_origin(field.annotation) is list:
            options |= {"action": "append"} if "choices" in options else {"action": "append", "metavar": "NAME"}
        shown = field.description or ""
        if field.is_required():
            options["required"] = True
        elif field.default not in (None, []):
            default = f"{field.default:,}" if isinstance(field.default, int) else field.default
            shown += f" (default: {default})"
        group.add_argument(_flag(name), dest=name, help=shown.replace("%", "%%"), **options)


def _given(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in model.model_fields if hasattr(args, name)}


def _settings(args: argparse.Namespace, model: type[M], **base: Any) -> M:
    """`model` from the options given, on top of `base`."""
    from rac_engine.recipe import build

    return build(model, {**base, **_given(args, model)}, _flag)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)",
    )


def _limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory that pruning keeps to")
    for name, what in (("device", "of the GPU"), ("host", "of this machine, the program itself included")):
        group.add_argument(f"--{name}-memory", type=_size, metavar="BYTES", help=f"at most so much {what}, like 6GiB")


def _restart(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--restart", action="store_true", help=f"start afresh where an unfinished {what} would go on")


def _resolved_device(name: str) -> str:
    """The device to use; `BadInput` for one that this machine does not have."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--device {name}: {reason}; `rac doctor` shows what there is") from None
    return name


def _console(args: argparse.Namespace) -> Console:
    from rac_engine.console import Console

    return Console(args.verbosity)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file that says everything about the job")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned checkpoint and all results")
    _device(parser)
    _limits(parser)
    _restart(parser, "job")


def _run(args: argparse.Namespace) -> int:
    from rac_engine.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    from rac_engine.results import table
    from rac_engine.run import run

    result = run(
        recipe,
        args.out,
        device=_resolved_device(args.device),
        restart=args.restart,
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        console=_console(args),
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
    _fields(parser, "what is sampled", TraceSettings, *names)
    _device(parser)
    _restart(parser, "sampling")


def _trace(args: argparse.Namespace) -> int:
    from rac_engine.recipe import TraceSettings

    settings = _settings(args, TraceSettings)
    from rac_engine.traces import generate

    report = generate(
        args.model,
        settings,
        args.out,
        device=_resolved_device(args.device),
        restart=args.restart,
        progress=_console(args).progress,
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
    _fields(parser, "calibration", CalibrationSettings, *[n for n in CalibrationSettings.model_fields if n != "source"])
    _fields(parser, "pruning", PruneSettings, *PruneSettings.model_fields)
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="take the sections `calibration` and `prune` from here; options win"
    )
    _device(parser)
    _limits(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print recipe and plan, write nothing")
    _restart(parser, "job")


def _pruning_recipe(args: argparse.Namespace) -> Recipe:
    """What `rac prune` was asked for: the recipe's sections, if one is given, with the options on top."""
    from rac_engine.recipe import CalibrationSettings, PruneSettings, Recipe, Variant, load_recipe

    base = load_recipe(args.recipe) if args.recipe else Recipe(model=args.model)
    options = _settings(args, PruneSettings)
    prune = Variant(name="options", prune=options).settings(base.prune)
    calibration = _settings(args, CalibrationSettings, **base.calibration.model_dump())
    return Recipe(model=args.model, name=base.name, calibration=calibration, prune=prune)


def _prune(args: argparse.Namespace) -> int:
    recipe = _pruning_recipe(args)
    if recipe.calibration.source is None and recipe.prune.method != "magnitude":
        raise BadInput(
            f"--calibration is missing: {recipe.prune.method} needs a traces folder, a .jsonl or text:FILE "
            "(`rac trace` samples the model's own traces)"
        )
    device = _resolved_device(args.device)
    if args.dry_run:
        return _dry_run(recipe, args, device)
    from rac_engine.engine import prune
    from rac_engine.report import REPORT, write_report
    from rac_engine.results import RAC, Metrics, figure, percent
    from rac_engine.sizes import format_seconds

    console = _console(args)
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
    _fields(parser, "what is asked", EvalSettings, *EvalSettings.model_fields)
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RESULTS0",
        help="results of another model on the same problems, to compare with",
    )
    _device(parser)
    _restart(parser, "evaluation")


def _eval(args: argparse.Namespace) -> int:
    from rac_engine.recipe import EvalSettings

    settings = _settings(args, EvalSettings)
    from rac_engine.evaluation import evaluate
    from rac_engine.results import percent

    result = evaluate(
        args.model,
        settings,
        args.out,
        baseline=args.baseline,
        device=_resolved_device(args.device),
        restart=args.restart,
        progress=_console(args).progress,
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
    parser.add_argument("--tokens", type=_size, default=1_000_000, metavar="N", help="calibration tokens (default: 1M)")
    parser.add_argument(
        "--length", type=_size, default=1024, metavar="N", help="mean length of a sequence (default: 1024)"
    )
    parser.add_argument(
        "--max-length", type=_size, metavar="N", help="tokens of the longest sequence (default: the mean length)"
    )
    _fields(parser, "pruning", PruneSettings, *PruneSettings.model_fields)
    _limits(parser)
    parser.add_argument("--json", action="store_true", help="print it for programs: bytes and FLOPs as numbers")


def _plan(args: argparse.Namespace) -> int:
    from rac_engine.plan import device_peaks, make_plan, render
    from rac_engine.recipe import PruneSettings

    settings = _settings(args, PruneSettings)
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
    from rac_engine.verify import verify

    result = verify(args.out, args.source, _console(args).progress)
    print(result.to_json() if args.json else result.summary())
    return 1 if result.problems else 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it for programs")


def _doctor(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from rac_engine.doctor import examine, render

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


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with options for those commands only that are named in `words`."""
    parser = _Parser(
        prog="rac",
        description="Prune reasoning language models, calibrated on their own chains of thought.",
        epilog="`rac COMMAND --help` lists a command's options. Sizes may be written 8192, 8k, 1M or 6GiB.\n\n"
        "exit codes: 0 done, 2 bad input (one line says how to mend it), 75 stopped (the command\n"
        "printed goes on where it was), 1 anything else",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rac {__version__}")
    _add_verbosity(parser, 0)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples.splitlines()),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        if name in words:
            command.options(sub)
            _add_verbosity(sub, argparse.SUPPRESS)
    return parser


def _add_verbosity(parser: argparse.ArgumentParser, default: Any) -> None:
    options = {"dest": "verbosity", "action": "store_const", "default": default}
    parser.add_argument("-q", "--quiet", const=-1, help="show no progress, only results and errors", **options)
    parser.add_argument(
        "-v", "--verbose", const=1, help="show more on the way, and where an error comes from", **options
    )


if __name__ == "__main__":
    sys.exit(main())
