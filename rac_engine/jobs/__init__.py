"""Foundations of all long jobs: their protocol (`job`), and the one list of paths in OUT (`layout`)."""

from __future__ import annotations

from rac_engine.base.linux import require_linux

require_linux()
