"""vLLM's side: a plugin, with which vLLM serves packed folders, and dense ones with --quantization rac.

vLLM imports it as an entry point of `vllm.general_plugins` and calls `register`; nothing else may import it. Its
workers get the configuration by pickle, so the classes are found by their names here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from rac_engine.serve.sharded import PackedLinears, Unpacking
from rac_kernels.ops.packed import VERSION

METHOD = "rac"
"""The `quant_method` of packed folders."""


class PackedLinearMethod(PackedLinears, LinearMethodBase):
    """Linear layers: packed."""


class UnpackedEmbeddingMethod(Unpacking, UnquantizedEmbeddingMethod):
    """Embeddings and lm_head: dense."""


class UnpackedFusedMoEMethod(Unpacking, UnquantizedFusedMoEMethod):
    """Experts of a mixture: dense."""


class PackedConfig(QuantizationConfig):
    """`quantization_config` of a packed folder; without arguments, that of a dense one which is to be packed."""

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        if (version := config.get("version")) != VERSION:
            raise ValueError(f"packed files of version {version!r:.40}; this release knows version {VERSION}")
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return PackedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return UnpackedEmbeddingMethod()
        return UnpackedFusedMoEMethod(layer.moe_config) if isinstance(layer, RoutedExperts) else None


def register() -> None:
    """Tell vLLM of packed folders; vLLM calls it in each of its processes, perhaps more than once."""
    register_quantization_config(METHOD)(PackedConfig)
