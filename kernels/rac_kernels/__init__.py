"""RAC's kernels: each operation with a torch reference, a native CPU path and a Triton path behind one function.

Functions and the modules they live in share names (``rac_kernels.sweep`` is the function), so everything public is
imported here, once.
"""

from __future__ import annotations

from rac_kernels.backends import native
from rac_kernels.measure import roofline
from rac_kernels.ops.column_norm import column_norm_accumulate_
from rac_kernels.ops.cross import cross_accumulate_
from rac_kernels.ops.factor import Factor, FactorError, factor_, factor_batch_, refactor_
from rac_kernels.ops.hessian import hessian_accumulate_
from rac_kernels.ops.inverse import inverse_
from rac_kernels.ops.mirror import symmetrize_
from rac_kernels.ops.objective import objective, reconstruction_error
from rac_kernels.ops.profile import ScoreProfile, count_above, score_profile
from rac_kernels.ops.select import kth_smallest, mask_by_score
from rac_kernels.ops.spread import pattern_order, spread_columns
from rac_kernels.ops.sweep import sweep
from rac_kernels.ops.zeros import count_zeros
from rac_kernels.solvers.adam import MaskedAdam
from rac_kernels.solvers.admm import admm_short_
from rac_kernels.solvers.alps import admm
from rac_kernels.solvers.matching import matched_target, output_cross
from rac_kernels.solvers.refine import RefineResult, refine

__all__ = [
    "Factor",
    "FactorError",
    "MaskedAdam",
    "RefineResult",
    "ScoreProfile",
    "admm",
    "admm_short_",
    "column_norm_accumulate_",
    "count_above",
    "count_zeros",
    "cross_accumulate_",
    "factor_",
    "factor_batch_",
    "hessian_accumulate_",
    "inverse_",
    "kth_smallest",
    "mask_by_score",
    "matched_target",
    "native",
    "objective",
    "output_cross",
    "pattern_order",
    "reconstruction_error",
    "refactor_",
    "refine",
    "roofline",
    "score_profile",
    "spread_columns",
    "sweep",
    "symmetrize_",
]
