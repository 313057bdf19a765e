"""RAC's kernels: each operation with a torch reference, a native CPU path and a Triton path behind one function.

Functions and the modules they live in share names (``rac_kernels.sweep`` is the function), so everything public is
imported here, once.
"""

from __future__ import annotations

from rac_kernels.backends import native
from rac_kernels.measure import roofline
from rac_kernels.ops.attention import Scoring, decode_attention, packed_attention
from rac_kernels.ops.blend import blend_
from rac_kernels.ops.codes import FP4_NUMBERS, INT4_NUMBERS, dequantize_codes, powers_of_two
from rac_kernels.ops.column_norm import column_norm_accumulate_
from rac_kernels.ops.cross import cross_accumulate_
from rac_kernels.ops.factor import Factor, FactorError, factor_, factor_batch_, refactor_
from rac_kernels.ops.finite import all_finite, finite_tokens
from rac_kernels.ops.fp8 import dequantize_blocks
from rac_kernels.ops.hessian import hessian_accumulate_
from rac_kernels.ops.inverse import inverse_
from rac_kernels.ops.mirror import symmetrize_
from rac_kernels.ops.objective import (
    objective,
    reconstruction_error,
    reported_objective,
    reported_objectives,
    squared_outputs,
    squared_outputs_of,
)
from rac_kernels.ops.packed import (
    Packed,
    PackedLayout,
    Values,
    join_rows,
    pack,
    packed_group,
    packed_size,
    take_rows,
    unpack,
)
from rac_kernels.ops.packed_matmul import packed_matmul
from rac_kernels.ops.profile import ScoreProfile, score_profile
from rac_kernels.ops.residual import add_residual, residual_gap
from rac_kernels.ops.routing import add_expert_, slots_by_expert
from rac_kernels.ops.select import kth_smallest, mask_by_score
from rac_kernels.ops.spread import pattern_order, spread_columns
from rac_kernels.ops.squared_norm import squared_gaps, squared_norm_accumulate_
from rac_kernels.ops.sweep import sweep
from rac_kernels.ops.zeros import count_zeros, zeroed
from rac_kernels.solvers.adam import MaskedAdam
from rac_kernels.solvers.admm import admm_
from rac_kernels.solvers.alps import alps
from rac_kernels.solvers.distillation import KEPT_BYTES, KeptWeights, divergence_, most_probable
from rac_kernels.solvers.grid import LARGEST, Grid, fit_grid, round_in_order, round_kept
from rac_kernels.solvers.matching import matched_target, output_cross
from rac_kernels.solvers.refine import RefineResult, refine
from rac_kernels.solvers.tuning import Tuning, relative_error, rounded, squared_error

__all__ = [
    "FP4_NUMBERS",
    "INT4_NUMBERS",
    "KEPT_BYTES",
    "LARGEST",
    "Factor",
    "FactorError",
    "Grid",
    "KeptWeights",
    "MaskedAdam",
    "Packed",
    "PackedLayout",
    "RefineResult",
    "ScoreProfile",
    "Scoring",
    "Tuning",
    "Values",
    "add_expert_",
    "add_residual",
    "admm_",
    "all_finite",
    "alps",
    "blend_",
    "column_norm_accumulate_",
    "count_zeros",
    "cross_accumulate_",
    "decode_attention",
    "dequantize_blocks",
    "dequantize_codes",
    "divergence_",
    "factor_",
    "factor_batch_",
    "finite_tokens",
    "fit_grid",
    "hessian_accumulate_",
    "inverse_",
    "join_rows",
    "kth_smallest",
    "mask_by_score",
    "matched_target",
    "most_probable",
    "native",
    "objective",
    "output_cross",
    "pack",
    "packed_attention",
    "packed_group",
    "packed_matmul",
    "packed_size",
    "pattern_order",
    "powers_of_two",
    "reconstruction_error",
    "refactor_",
    "refine",
    "relative_error",
    "reported_objective",
    "reported_objectives",
    "residual_gap",
    "roofline",
    "round_in_order",
    "round_kept",
    "rounded",
    "score_profile",
    "slots_by_expert",
    "spread_columns",
    "squared_error",
    "squared_gaps",
    "squared_norm_accumulate_",
    "squared_outputs",
    "squared_outputs_of",
    "sweep",
    "symmetrize_",
    "take_rows",
    "unpack",
    "zeroed",
]
