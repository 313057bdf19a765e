"""The `rac` command."""

from __future__ import annotations

from rac_engine.cli.app import main

__all__ = ["main"]
