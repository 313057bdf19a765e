"""The subcommands, one a module. What they need is imported when they run, so that `rac --help` is instant."""

from __future__ import annotations

from rac_engine.cli.commands.completion import COMPLETION
from rac_engine.cli.commands.doctor import DOCTOR
from rac_engine.cli.commands.eval import EVAL
from rac_engine.cli.commands.mask import MASK
from rac_engine.cli.commands.pack import PACK, UNPACK
from rac_engine.cli.commands.plan import PLAN
from rac_engine.cli.commands.prune import PRUNE
from rac_engine.cli.commands.report import REPORT
from rac_engine.cli.commands.run import RUN
from rac_engine.cli.commands.trace import TRACE
from rac_engine.cli.commands.verify import VERIFY

COMMANDS = {
    "run": RUN,
    "trace": TRACE,
    "prune": PRUNE,
    "eval": EVAL,
    "report": REPORT,
    "plan": PLAN,
    "verify": VERIFY,
    "pack": PACK,
    "unpack": UNPACK,
    "mask": MASK,
    "doctor": DOCTOR,
    "completion": COMPLETION,
}
"""In the order in which the overview names them."""

__all__ = ["COMMANDS"]
