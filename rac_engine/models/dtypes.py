"""The number formats that models are loaded and computed in."""

from __future__ import annotations

import torch

from rac_engine.checkpoint import Checkpoint
from rac_engine.models.plans import Family


def working_dtype(dtype: torch.dtype, on_gpu: bool) -> torch.dtype:
    """The dtype to compute a model of `dtype` in: fp32 where the processor has no quick products of 16-bit numbers.

    Without AVX-512 (or AMX, or Arm's) PyTorch multiplies bf16 element by element: a product of 400 × 288 × 768 was
    measured to take 7 times as long as in fp32, one of 1536³ 56 times.
    """
    known = torch.ops.mkldnn
    quick = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if on_gpu or quick is None or not hasattr(known, quick) or getattr(known, quick)():
        return dtype
    return torch.float32


def compute_dtype(checkpoint: Checkpoint, family: Family) -> torch.dtype:
    """The dtype that transformers would load the checkpoint in: the config's, else the embedding's."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return dtype
    info = checkpoint.tensors.get(family.embedding)
    return torch.float32 if info is None else info.dtype
