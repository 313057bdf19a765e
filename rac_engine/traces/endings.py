"""The tokens that end an answer, and why answers may not end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import read_json_object
from rac_engine.traces.template import render

_MAX_CONFIG = 4 << 20  # bytes

_FILES = ("generation_config.json", "config.json")

_ANSWER = "Four"

_TALK = [("user", "Two and two?"), ("assistant", _ANSWER), ("user", "Why?")]

_SHOWN = 6  # tokens in a note


def stop_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: all that generation_config.json, config.json or the tokenizer name.

    These often differ, and a model may end with any of them. Only what the files say counts: some classes of
    transformers have a token by default, which may be another one in this model. Raises `BadInput` for a file that is
    not a JSON object.
    """
    found = {tokenizer.eos_token_id}
    for file in (folder / name for name in _FILES):
        said = read_json_object(file, _MAX_CONFIG, "", "mend it, or remove it") if file.exists() else {}
        for part in (said, said.get("text_config")):
            ends = part.get("eos_token_id") if isinstance(part, Mapping) else None
            found.update(ends if isinstance(ends, list) else [ends])
    return frozenset(token for token in found if type(token) is int)


def cut_off_notes(tokenizer: Any, stops: frozenset[int], reasons: Mapping[str, int], limit: int) -> list[str]:
    """A note on why that may be, where most answers were cut off.

    `reasons` counts answers by the reason why they ended, `limit` are the tokens that one may have.
    """
    counted = {reason: count for reason, count in reasons.items() if reason != "budget"}
    count, cut = sum(counted.values()), sum(counted.values()) - counted.get("stop", 0)
    if 2 * cut <= count:
        return []
    some = f"{cut:,} of {count:,} answers were" if cut < count else f"all {count:,} answers were"
    begin = f"{'the only answer was' if count == 1 else some} cut off, at {limit:,} tokens or before"
    if not stops:
        return [f"{begin}: no file of the model names a token that ends one (eos_token_id)"]
    ends = ", ".join(_shown(tokenizer, token) for token in sorted(stops)[:_SHOWN])
    behind = _behind_an_answer(tokenizer)
    if behind is not None and behind not in stops:
        return [
            f"{begin}: its chat template puts {_shown(tokenizer, behind)} behind an answer, but what ends one by its "
            f"files is {ends}; name that token too, in eos_token_id of generation_config.json"
        ]
    return [
        f"{begin}: either they need more (max_new_tokens), or the model rambles, as one does that lost too much; what "
        f"ends an answer by its files is {ends}"
    ]


def _shown(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"


def _behind_an_answer(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer; None if there is none."""
    try:
        ids = render(tokenizer, [{"role": role, "content": text} for role, text in _TALK], "")
    except BadInput:
        return None
    _, answer, rest = tokenizer.decode(ids, skip_special_tokens=False).rpartition(_ANSWER)
    first = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"][:1] if answer else []
    return first[0] if first and first[0] in tokenizer.added_tokens_decoder else None
