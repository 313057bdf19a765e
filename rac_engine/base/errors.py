"""The ways a job ends early on purpose."""

from __future__ import annotations


class BadInput(Exception):
    """An input that cannot work. The message is one line: what, where, and how to mend it; the CLI exits with 2."""


class Interrupted(Exception):
    """A job stopped cleanly, and the same call goes on with it later; the CLI exits with 75."""


class Damaged(Exception):
    """Data that was read back and is not as it was written: a disk or memory fails, or somebody else writes there.

    Nothing was published, and the same call goes on with what is still whole. The CLI exits with 1.
    """


def one_line(text: str) -> str:
    """Text for a terminal, whatever a stranger's file calls things: on one line, control characters spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
