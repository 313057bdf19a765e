"""Targets of a model's matrices by the settings, and the ones that stay as they are."""

from __future__ import annotations

from rac_engine.base.errors import BadInput
from rac_engine.models import Matrix, Model
from rac_engine.recipe import PruneSettings, names_matrix, pruning_pattern
from rac_engine.solve import DAMPING, Reason, ReasonCode, Target


def skipped_matrices(model: Model, settings: PruneSettings) -> dict[str, Reason]:
    """On-disk names of the matrices that are not to be pruned, and why.

    Raises `BadInput` where a pattern does not fit a matrix, or an entry of `dense` names none.
    """
    if settings.order == "layer" and any(model.is_mixture(layer) for layer in range(model.layers)):
        raise BadInput("order: layer is for dense models; a mixture of experts is pruned with order: staged")
    unused, skipped = set(settings.dense), dict[str, Reason]()
    unfit = list(settings.overrides)

    def naming(*names: str) -> list[str]:
        found = [entry for entry in settings.dense if names_matrix(entry, *names)]
        unused.difference_update(found)
        return found

    for name in (model.family.embedding, model.family.head):
        naming(name.removesuffix(".weight"))  # known, whether or not they would be pruned
    for matrix in model.prunable(settings.also):
        own = settings.of(matrix.path, matrix.module)
        unfit = [override for override in unfit if not override.names(matrix.path, matrix.module)]
        if found := naming(matrix.path, matrix.module):
            skipped[matrix.name] = Reason(ReasonCode.ASKED_DENSE, f"left dense by {found[0]!r}")
        elif own.pattern is None and own.sparsity == 0 and own.values == "same":
            skipped[matrix.name] = Reason(ReasonCode.SPARSITY_ZERO, "sparsity 0")
        elif own.pattern is not None and matrix.columns % pruning_pattern(own.pattern)[1]:
            raise BadInput(
                f"{matrix.path}: its {matrix.columns} columns are no whole groups for pattern {own.pattern}; "
                "choose another pattern, or name the matrix under `dense`"
            )
    if unused:
        raise BadInput(f"dense: {min(unused)!r} names no matrix of this model; `rac plan` lists their names")
    if unfit:
        number = settings.overrides.index(unfit[0])
        raise BadInput(
            f"overrides.{number}: {', '.join(map(repr, unfit[0].modules))} names no matrix of this model; "
            "`rac plan` lists their names"
        )
    return skipped


def target_of(settings: PruneSettings, matrix: Matrix) -> Target:
    """The target of a matrix by the settings, overrides included."""
    own = settings.of(matrix.path, matrix.module)
    damping = DAMPING if own.damping is None else own.damping
    return Target(own.sparsity, own.pattern, damping, own.block_size, values=own.values, chooses=own.damping is None)


def not_finite(model: Model, settings: PruneSettings) -> dict[str, Reason]:
    """Tensors and matrices that hold NaN or Inf, to be left as they are: the reason, by on-disk name.

    Raises `BadInput` unless the settings leave such matrices dense.
    """
    names = model.checkpoint.nonfinite()
    if names and settings.nonfinite == "refuse":
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise BadInput(
            f"{model.checkpoint.path}: tensor {names[0]!r}{more} holds NaN or Inf; the model is damaged "
            "(nonfinite: dense leaves such a matrix as it is)"
        )
    matrices = model.prunable(settings.also) if names else ()
    stacked = [matrix.name for matrix in matrices if matrix.tensor in names]
    return dict.fromkeys([*names, *stacked], Reason(ReasonCode.NOT_FINITE, "holds NaN or Inf"))
