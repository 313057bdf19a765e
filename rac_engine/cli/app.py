"""The `rac` command.

Exit codes: 0 done; 2 bad input (one line: what, where, how to mend); 75 stopped, and the command printed goes on;
1 anything else. Results go to stdout, progress and errors to stderr. A job that is published is done, whatever becomes
of what is printed. Modules are imported when a command needs them, so that `rac --help` is instant.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rac_engine import __version__
from rac_engine.base.errors import BadInput, Interrupted, one_line
from rac_engine.base.linux import require_linux
from rac_engine.base.names import is_utf8
from rac_engine.base.process import give_back_freed, give_back_large, prepare_process
from rac_engine.cli.commands import COMMANDS
from rac_engine.cli.options import Command, Parser, add_help, add_verbosity
from rac_engine.cli.output import OutputLost, complain, flush, prepared_streams

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST = 2000  # characters of an error
_LONG = ("run", "trace", "prune", "eval")
"""Commands of jobs that go on when they are called again."""
_PUBLISHING = (*_LONG, "mask", "pack", "unpack")
"""Commands that are done once OUT is published, whatever comes then."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(110, _columns() - 2))


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((112, 24)).columns


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; by default the process's own) and return the exit code.

    For the process's own, signals that come behind the command are ignored: its exit code stands.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prepare_process()
    with prepared_streams():
        try:
            code = _dispatch(words, last=argv is None)
            flush()
            return code
        except BadInput as error:
            return _fail(2, f"error: {error}")
        except (Interrupted, KeyboardInterrupt) as error:
            return _stopped(words, error)
        except OutputLost as lost:
            return _unheard(words, lost)
        except Exception as error:
            return _failed(error, verbose=bool({"-v", "--verbose"} & set(words)))


def _dispatch(words: Sequence[str], last: bool) -> int:
    for word in words:
        if not is_utf8(word):
            raise BadInput(f"{word!r}: has bytes that are not UTF-8; rename it")
    try:
        args = _parser(words).parse_args(words)
    except SystemExit as done:  # --help and --version have said it all
        return int(done.code or 0)
    require_linux()
    if args.verbosity <= 0:  # transformers' own bars and advice would stand between our lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if getattr(args, "host_memory", None) is not None:
        give_back_freed()
    else:
        give_back_large()
    with _terminable(args.out if args.command in _PUBLISHING else None, last):
        return COMMANDS[args.command].run(args)


def _fail(code: int, text: str) -> int:
    line = one_line(text)
    if len(line) > _LONGEST:  # a stranger's file may name things by whole pages
        line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
    complain(f"rac: {line}")
    return code


def _is_one_of(words: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a command line is that of one of these commands."""
    return next((word for word in words if word in COMMANDS), None) in names


def _unheard(words: Sequence[str], lost: OutputLost) -> int:
    """Exit where the result could not be printed: a job is done all the same, any other had nothing else to do."""
    if _is_one_of(words, _PUBLISHING) and "--dry-run" not in words:
        if lost.reason:
            complain(f"rac: done, but the result could not be printed: standard output: {lost.reason}")
        return 0
    return _fail(1, f"failed: standard output: {lost.reason}") if lost.reason else 1


def _stopped(words: Sequence[str], error: BaseException) -> int:
    if not _is_one_of(words, _LONG):
        return _fail(1, "stopped")
    command = shlex.join(["rac", *(word for word in words if word != "--restart")])
    return _fail(75, f"{error if str(error) else 'stopped'}; to go on: {command}")


def _failed(error: Exception, verbose: bool) -> int:
    """Exit after an error: a line for what a user can understand and mend, a traceback for a bug."""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return _fail(2, f"error: no space left for {error.filename or 'the output'}; free some and run this again")
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED and error.filename:
        return _fail(2, f"error: {error.filename}: {error.strerror}; give this user the right, or another path")
    if kind in ("OutOfMemoryError", "MemoryError"):
        return _fail(1, f"out of memory: {error}; fewer --chunk-tokens or calibration tokens need less")
    if verbose or (kind not in ("FactorError", "Damaged") and not (isinstance(error, OSError) and error.errno)):
        shown = io.StringIO()
        traceback.print_exception(error, file=shown)
        complain(shown.getvalue().rstrip())
    return _fail(1, f"failed: {kind}: {error}")


@contextmanager
def _terminable(out: Path | None = None, last: bool = False) -> Iterator[None]:
    """While a command runs, SIGTERM stops it as Ctrl-C does, until `out` is published, if there is to be one.

    Behind it the signals do what they did before, or nothing if the command is the `last` thing that the process does:
    a job that is done ends as done.
    """
    from rac_engine.jobs.job import has_published

    def stop(number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt; within a finalizer, whose exceptions Python only reports, a moment later."""
        if out is not None and has_published(out):
            return
        while frame is not None:
            if frame.f_code.co_name == "__del__":
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    heard = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        heard.append(signal.SIGINT)
    before = {}
    try:
        for number in heard:
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


def _parser(words: Sequence[str]) -> Parser:
    """The parser, with options for those commands only that are named in `words`.

    For `completion` all commands have all of theirs, and the parser itself stands in the namespace as `whole`.
    """
    every = _is_one_of(words, ["completion"])
    parser = Parser(
        prog="rac",
        description="Prune reasoning language models, calibrated on their own chains of thought.",
        epilog="`rac COMMAND --help` lists a command's options. Sizes may be written 8192, 8k, 1M or 6GiB.\n\n"
        "exit codes: 0 done, 2 bad input (one line says how to mend it), 75 stopped (the command\n"
        "printed goes on where it was), 1 anything else",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rac {__version__}")
    add_verbosity(parser, 0)
    parser.set_defaults(whole=parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        if name in words or every:
            _add_options(sub, command, full=every or "--help-all" in words)
    return parser


def _add_options(parser: Parser, command: Command, full: bool) -> None:
    """Add a command's options, with help on all of them or on those that are used most."""
    parser.full = full
    command.add_options(parser)
    add_help(parser)
    add_verbosity(parser, argparse.SUPPRESS)
    more = [] if full or not parser.hidden else [f"`{parser.prog} --help-all` shows {parser.hidden} more options.", ""]
    parser.epilog = "\n".join([*more, "examples:", *(f"  {line}" for line in command.examples)])
