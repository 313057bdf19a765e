"""Evaluation: accuracy and length of a model's answers, by the same random numbers for every model, and perplexity."""

from __future__ import annotations

from rac_engine.evaluation.job import EvalResult, evaluate
from rac_engine.evaluation.perplexity import table as perplexity_table
from rac_engine.evaluation.problems import load_problems
from rac_engine.evaluation.results import evaluations
from rac_engine.evaluation.statistics import wilson

__all__ = [
    "EvalResult",
    "evaluate",
    "evaluations",
    "load_problems",
    "perplexity_table",
    "wilson",
]
