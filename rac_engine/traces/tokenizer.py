"""Loading a model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import read_json_object
from rac_engine.checkpoint import read_config
from rac_engine.models import loading_config

_MAX_TEMPLATE_FILE = 4 << 20  # bytes


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a local folder. Raises `BadInput` if there is none that transformers can load."""
    try:
        file = Path(path) / "config.json"
        config = loading_config(read_config(file)) if file.exists() else None
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers has no one exception for this
        if "contains custom code" in str(error):
            raise BadInput(
                f"{path}: its tokenizer is code that was published with it, which is never run; put a tokenizer in its "
                "place that transformers loads without (a tokenizer.json), or import traces of another engine"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: no tokenizer that transformers can load ({reason})") from None
    # Where its files are missing, transformers makes up a tokenizer that knows special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BadInput(f"{path}: no tokenizer; copy the model's tokenizer files into the folder")
    # Models that also take images may have the template there, where transformers' processors look for it alone.
    file = Path(path) / "chat_template.json"
    if not tokenizer.chat_template and file.exists():
        found = read_json_object(file, _MAX_TEMPLATE_FILE, "give the checkpoint's folder", "fetch the checkpoint again")
        if isinstance(template := found.get("chat_template"), str):
            tokenizer.chat_template = template
    return tokenizer
