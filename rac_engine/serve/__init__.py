"""Packed folders where models are run: in transformers and in vLLM, by their own registries.

`load` reads one in a line. Importing `rac_engine.serve.quantizer` tells transformers of packed folders; `import
rac_engine` sees to that. vLLM finds `rac_engine.serve.vllm` as a plugin. transformers is imported when it is needed.
"""

from __future__ import annotations

from rac_engine.serve.loading import load

__all__ = ["load"]
