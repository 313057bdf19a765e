"""RAC Engine runs on Linux: whatever needs it is refused elsewhere, when it is imported."""

from __future__ import annotations

import sys

from rac_engine.base.errors import BadInput


class NotLinux(BadInput, ImportError):
    """Another system: the CLI exits with 2, and an import fails as imports do."""


def require_linux() -> None:
    """Raise `NotLinux` on another system.

    Jobs reserve space with posix_fallocate, lock with flock, keep activations in files without a name and read their
    own memory from /proc. What other systems have instead does not promise the same.
    """
    if sys.platform != "linux":
        raise NotLinux("RAC Engine runs on Linux; on macOS and Windows use a container or WSL")
