"""Perplexity, found a layer at a time, is what transformers' own loss says of the same tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.cli.app import main
from rac_engine.evaluation.job import EvalResult, evaluate
from rac_engine.evaluation.perplexity import perplexity
from rac_engine.evaluation.statistics import mean_of
from rac_engine.models.model import Model
from rac_engine.pack.packing import pack
from rac_engine.plan.forward import plan_forward
from rac_engine.plan.phases import Machine, Tokens
from rac_engine.recipe.settings import EvalSettings
from tests import tiny

WORDS = [4, 9, 17, 33, 5, 6, 60, 41, 22, 8, 7, 13]
EXCHANGES: list[tuple[list[int], list[int]]] = [
    (WORDS[:3], WORDS[3:]),
    (WORDS[5:], [7]),
    (WORDS, [*WORDS[::-1], *WORDS] * 2),
    ([11], [12, 13, 14, 15]),
]


def exchanges(folder: Path, pairs: Sequence[tuple[list[int], list[int]]] = EXCHANGES) -> Path:
    """A file of prompts and completions as token ids."""
    lines = [json.dumps({"prompt_token_ids": ask, "completion_token_ids": said}) for ask, said in pairs]
    (folder / "traces.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "traces.jsonl"


def model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    return tiny.save_tokenizer(tiny.save(folder / "model", family, dtype=torch.float32, **changes))


@torch.inference_mode()
def own_losses(folder: Path, pairs: Sequence[tuple[list[int], list[int]]] = EXCHANGES) -> list[float]:
    """The sum of losses on each completion by transformers' own forward pass."""
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    found = []
    for ask, said in pairs:
        labels = torch.tensor([[-100] * len(ask) + said])
        loss = whole(torch.tensor([ask + said]), labels=labels).loss
        found.append(float(loss) * len(said))
    return found


def measured(folder: Path, *sources: str | Path, **more: Any) -> EvalResult:
    out = folder / f"{len(list(folder.glob('*.json')))}.json"
    settings = EvalSettings(perplexity=[*map(str, sources)], **more.pop("settings", {}))
    return evaluate(more.pop("model", folder / "model"), settings, out, **more)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "gemma2", "granite", "cohere2", "qwen3_5_text", "nemotron_h", "mixtral", "gpt_oss", "phimoe"],
)
def test_it_is_the_loss_of_transformers(family: str, tmp_path: Path) -> None:
    model(tmp_path, family)
    (row,) = measured(tmp_path, exchanges(tmp_path)).perplexity
    wanted, tokens = own_losses(tmp_path / "model"), sum(len(said) for _, said in EXCHANGES)
    assert [each["loss"] for each in row["by_sequence"]] == pytest.approx(wanted, rel=2e-5)
    assert (row["tokens"], row["sequences"]) == (tokens, len(EXCHANGES))
    assert row["mean_loss"] == pytest.approx(sum(wanted) / tokens, rel=2e-5)
    assert row["perplexity"] == pytest.approx(math.exp(sum(wanted) / tokens), rel=1e-4)


def test_text_counts_from_its_second_token_on_and_files_stay_apart(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in WORDS))
    text, traces = f"text:{tmp_path / 'text.txt'}", exchanges(tmp_path)
    both = measured(tmp_path, text, traces).perplexity
    (loss,) = own_losses(tmp_path / "model", [(WORDS[:1], WORDS[1:])])
    assert (both[0]["tokens"], both[0]["standard_error"]) == (len(WORDS) - 1, None)
    assert both[0]["mean_loss"] == pytest.approx(loss / (len(WORDS) - 1), rel=2e-5)
    (alone,) = measured(tmp_path, traces).perplexity
    assert both[1]["mean_loss"] == pytest.approx(alone["mean_loss"], rel=1e-6)
    (short,) = measured(tmp_path, traces, settings={"perplexity_tokens": 11}).perplexity
    assert [each["tokens"] for each in short["by_sequence"]] == [9, 1, 1]


def test_within_a_limit_long_sequences_go_in_parts_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path, "qwen3_5_text", max_position_embeddings=2048)
    long = exchanges(tmp_path, [(WORDS, WORDS * 60), (WORDS[:2], WORDS[2:])])
    (free,) = measured(tmp_path, long).perplexity
    planned = plan_forward(Model.open(Checkpoint.open(tmp_path / "model")), Tokens(744, 732), Machine())
    parts = "rac_engine.evaluation.perplexity.plan_forward"
    choice = type(planned.choice)(256, "disk", 0, False, None)
    monkeypatch.setattr(parts, lambda *_: type(planned)(False, choice, planned.phases, None, 1 << 40, 0))
    limited = measured(tmp_path, long, host_memory=1 << 40)
    assert limited.perplexity[0]["mean_loss"] == pytest.approx(free["mean_loss"], rel=1e-5)
    assert "within --host-memory 1 TiB, with activations on disk" in limited.notes[-1]


def test_the_plan_needs_a_layer_not_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 8):
        opened = Model.open(Checkpoint.open(model(tmp_path / str(layers), "llama", num_hidden_layers=layers)))
        peaks.append(plan_forward(opened, Tokens(4000, 1000), Machine()).host_peak)
        with pytest.raises(BadInput, match=r"--host-memory 1 MiB: at least .* is needed \([a-z ]*\)$"):
            plan_forward(opened, Tokens(4000, 1000), Machine(host_limit=1 << 20))
    assert peaks[0] == peaks[1]


def test_a_packed_model_is_judged_as_its_dense_one(tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path / "random", "llama"))
    for name, weight in made.named_parameters():
        if ".mlp." in name:
            weight.data[:, ::2] = 0
    made.save_pretrained(tmp_path / "model")
    tiny.save_tokenizer(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed")
    traces = exchanges(tmp_path)
    dense, packed = (measured(tmp_path, traces, model=tmp_path / name) for name in ("model", "packed"))
    assert packed.perplexity == dense.perplexity


def test_a_baseline_is_compared_sequence_by_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path)
    other = tiny.save_tokenizer(tiny.save(tmp_path / "other", "llama", seed=1, dtype=torch.float32))
    monkeypatch.chdir(tmp_path)
    exchanges(tmp_path)
    words = ["--perplexity", "traces.jsonl", "--device", "cpu"]
    assert main(["eval", "model", *words, "--out", "a.json"]) == 0
    assert main(["eval", str(other), *words, "--out", "b.json", "--baseline", "a.json"]) == 0
    before, after = own_losses(tmp_path / "model"), own_losses(other)
    row = json.loads((tmp_path / "b.json").read_text())["perplexity"][0]
    pairs = [(new - old, len(said)) for new, old, (_, said) in zip(after, before, EXCHANGES, strict=True)]
    mean, error = mean_of(pairs)
    assert error is not None
    assert row["against"]["loss_difference"] == pytest.approx(mean, rel=1e-4)
    assert row["against"]["standard_error"] == pytest.approx(error, rel=1e-4)
    shown = capsys.readouterr().out
    assert "nats/token" in shown and f"{mean:+.4f} ± {error:.4f}" in shown
    assert main(["eval", "model", *words, "--perplexity-tokens", "5", "--out", "c.json", "--baseline", "a.json"]) == 2
    assert "a.json: has no perplexity on these tokens of" in capsys.readouterr().err


def test_beside_answers_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "w7 w8", "answer": "2"}\n')
    asked = EvalSettings(problems=tmp_path / "p.jsonl", max_new_tokens=2, perplexity=[str(exchanges(tmp_path))])

    def stop(said: Any) -> None:
        if "layer 2" in str(said):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        evaluate(tmp_path / "model", asked, tmp_path / "r.json", progress=stop)
    said = list[str]()
    found = evaluate(tmp_path / "model", asked, tmp_path / "r.json", progress=lambda each: said.append(str(each)))
    assert said[0].startswith("perplexity: layer 1 of")  # the answer was there
    assert (len(found.rows), found.perplexity[0]["sequences"]) == (1, 4)
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["rows"], written["perplexity"]) == (found.rows, found.perplexity)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "holds no"),
        ("a.txt", "", "a.txt"),
        ("a.jsonl", '{"prompt_token_ids": [4, 5], "completion_token_ids": []}\n', "holds no completions"),
        ("a.jsonl", '{"prompt_token_ids": [4], "completion_token_ids": [64]}\n', "token ids from 4 to 64"),
        ("a.txt", "w7", "no token that follows another"),
        ("none", None, "not found"),
    ],
)
def test_bad_files_are_refused(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    source = ("text:" if name.endswith("txt") else "") + str(tmp_path / name)
    assert main(["eval", str(tmp_path / "model"), "--perplexity", source, "--out", str(tmp_path / "r.json")]) == 2
    said = capsys.readouterr().err
    assert message in said and "calibration" not in said
    assert not list(tmp_path.glob("r.json*"))


def test_weights_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(model(tmp_path))
    dict(made.named_parameters())["model.embed_tokens.weight"].data[7] = math.nan
    made.save_pretrained(tmp_path / "broken")
    tiny.save_tokenizer(tmp_path / "broken")
    with pytest.raises(BadInput, match="loss that is no number"):
        measured(tmp_path, exchanges(tmp_path), model=tmp_path / "broken")


def test_the_error_of_a_mean() -> None:
    mean, error = mean_of([(2.0, 1), (4.0, 1), (6.0, 1)])
    assert mean == 4 and error == pytest.approx(2 / math.sqrt(3))
    assert mean_of([(3.0, 2), (0.0, 0)]) == (1.5, None)
    assert perplexity(0) == 1 and math.isfinite(perplexity(1e6))
