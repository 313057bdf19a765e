"""The report of a job: one HTML file, and the table that compares models."""

from __future__ import annotations

from rac_engine.report.comparison import Row, comparison, table
from rac_engine.report.page import write_report

__all__ = [
    "Row",
    "comparison",
    "table",
    "write_report",
]
