"""Options for the settings of a pruning, as `rac prune` and `rac plan` take them."""

from __future__ import annotations

from rac_engine.cli.options import Parser, add_fields

GROUPS = {
    "pruning": ("method", "sparsity", "pattern", "values", "pack", "dense", "also"),
    "allocation of sparsity": ("allocation", "allocation_bounds"),
    "solving": ("damping", "block_size", "order", "reconstruct", "reorder", "tune", "recover"),
    "matrices without data": ("unseen", "nonfinite"),
    "computing": ("chunk_tokens", "dtype"),
}
"""Fields of PruneSettings by the group that help shows them in."""
_COMMON = ("method", "sparsity", "pattern", "values", "pack", "dense")


def add_pruning(parser: Parser) -> None:
    """Add the options for all fields of PruneSettings that are no sections of their own."""
    from rac_engine.recipe import PruneSettings

    for title, names in GROUPS.items():
        add_fields(parser, title, PruneSettings, names, _COMMON)
