"""RAC's kernels: each operation with a torch reference, a native CPU path and a Triton path behind one function.

Functions and the modules they live in share names (``rac_kernels.sweep`` is the function), so everything public is
imported here, once.
"""

from __future__ import annotations

from rac_kernels import native, roofline
from rac_kernels.adam import MaskedAdam
from rac_kernels.admm import admm, admm_short_
from rac_kernels.column_norm import column_norm_accumulate_
from rac_kernels.cross import cross_accumulate_
from rac_kernels.factor import Factor, FactorError, factor_, factor_batch_, refactor_
from rac_kernels.hessian import hessian_accumulate_
from rac_kernels.inverse import inverse_
from rac_kernels.matching import matched_target, output_cross
from rac_kernels.mirror import symmetrize_
from rac_kernels.objective import objective, reconstruction_error
from rac_kernels.profile import ScoreProfile, count_above, score_profile
from rac_kernels.refine import RefineResult, refine
from rac_kernels.select import kth_smallest, mask_by_score
from rac_kernels.spread import spread_columns
from rac_kernels.sweep import sweep

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
    "reconstruction_error",
    "refactor_",
    "refine",
    "roofline",
    "score_profile",
    "spread_columns",
    "sweep",
    "symmetrize_",
]
