"""Plain text as calibration: in pieces, to the same tokens, and no more of it than is wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rac_engine.base.errors import BadInput
from rac_engine.traces import text
from rac_engine.traces.calibration import load_calibration

PAGE = Path(__file__).parents[3] / "docs/methods.md"


@pytest.fixture(scope="module", params=["byte level", "metaspace"])
def tokenizer(request: Any) -> Any:
    """Merges learnt from a page, with words cut at spaces as GPT-2 does or as sentencepiece does."""
    made = Tokenizer(models.BPE(unk_token="?"))
    spaces: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = spaces if request.param == "byte level" else pre_tokenizers.Metaspace()
    made.train_from_iterator([PAGE.read_text()], trainers.BpeTrainer(vocab_size=600, special_tokens=["?"]))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_pieces_give_the_tokens_of_the_whole(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes((PAGE.read_text() * 2 + "\r\n\n  λ ≈ ½").encode())
    whole = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    for piece, overlap in ((700, 200), (1500, 300), (1 << 20, 1 << 12)):
        monkeypatch.setattr(text, "PIECE", piece)
        monkeypatch.setattr(text, "OVERLAP", overlap)
        found = list(text.text_sequences(file, tokenizer, 100))
        assert [len(ids) for ids in found[:-1]] == [100] * (len(found) - 1)
        assert [token for ids in found for token in ids] == whole


def test_no_more_is_read_than_the_budget_takes(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(PAGE.read_bytes() * 3 + b"\xff")
    monkeypatch.setattr(text, "PIECE", 5000)
    assert load_calibration(f"text:{file}", tokenizer=tokenizer, tokens=1000).tokens == 1000
    with pytest.raises(BadInput, match=rf"not UTF-8 text \(byte {3 * PAGE.stat().st_size}\)"):
        load_calibration(f"text:{file}", tokenizer=tokenizer)


def test_devices_and_pipes_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(BadInput, match=r"no regular file|directory"):
            load_calibration(f"text:{name}", tokenizer=tokenizer, tokens=10)


def test_an_empty_file_holds_no_tokens(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(BadInput, match="holds no tokens"):
        load_calibration(f"text:{tmp_path / 'a.txt'}", tokenizer=tokenizer)
