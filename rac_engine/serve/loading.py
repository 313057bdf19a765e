"""A packed folder, or a dense one, as model and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(model: str | Path, *, device: str = "cpu", **settings: Any) -> tuple[Any, Any]:
    """Load model and tokenizer of a checkpoint, packed or dense, for transformers' `generate`.

    model: a folder, or `org/name[@revision]` on the hub. device: where the model is put. settings: others of
    `AutoModelForCausalLM.from_pretrained`; the dtype is the checkpoint's unless it is among them.

    Raises BadInput where there is no such checkpoint or tokenizer, and ValueError for damaged packed matrices.
    """
    from transformers import AutoModelForCausalLM

    import rac_engine.serve.quantizer  # noqa: F401, it tells transformers
    from rac_engine.checkpoint import local_folder
    from rac_engine.traces import load_tokenizer

    folder = local_folder(model)
    tokenizer = load_tokenizer(folder)
    chosen = {"dtype": "auto", "trust_remote_code": False, **settings}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **chosen)
    return loaded.to(device), tokenizer
