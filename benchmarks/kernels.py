"""All ops of rac_kernels against torch's own way, the published loops and llm-compressor, in one run and one record.

    python benchmarks/kernels.py                          # the shapes of a 1.5B model (Qwen2: 1536, 8960); GPU: of a 7B
    python benchmarks/kernels.py hessian factor sweep     # the three hot steps alone
    python benchmarks/kernels.py sweep --shapes 8960x1536 --repeats 5

Each op's script, `hessian.py` and so on, does the same for itself.
"""

from __future__ import annotations

import column_norm
import common
import cross
import factor
import hessian
import packed
import refine
import selection
import sweep

OPS: dict[str, common.Run] = {
    "hessian": hessian.run,
    "column_norm": column_norm.run,
    "cross": cross.run,
    "factor": factor.run,
    "select": selection.run,
    "sweep": sweep.run,
    "refine": refine.run,
    "packed": packed.run,
}

if __name__ == "__main__":
    common.main(__doc__, OPS, choose=True)
