"""Foundations of every room: errors, sizes, files, faults, the process, the console."""

from __future__ import annotations
