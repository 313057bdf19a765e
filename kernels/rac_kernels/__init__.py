"""RAC's kernels: each operation with a torch reference, a native CPU path and a Triton path behind one function.

Import this before anything that would load an OpenMP runtime of its own; torch comes first here.
"""

from __future__ import annotations

import torch  # noqa: F401  (its OpenMP runtime must be loaded before the extension's calls are resolved)

from rac_kernels import native

__all__ = ["native"]
