"""What every room stands on: errors, sizes, faults, files, the console."""

from __future__ import annotations
