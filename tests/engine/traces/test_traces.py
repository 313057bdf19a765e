"""Traces of the example model: the budget, resuming to the same traces, and every layout that is read."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.base.process import peak_memory
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.jobs.layout import TRACES_SUMMARY
from rac_engine.recipe import load_recipe
from rac_engine.recipe.settings import TraceSettings
from rac_engine.traces import tables
from rac_engine.traces.calibration import Weighting, load_calibration
from rac_engine.traces.conversation import instructed
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.generation import generate
from rac_engine.traces.prompts import load_prompts, prompts_of
from rac_engine.traces.template import render
from rac_engine.traces.tokenizer import load_tokenizer

ABACUS = Path(__file__).parents[3] / "examples/abacus"
PROMPTS = ABACUS.parent / "problems/calibration.jsonl"


def settings(prompts: Path, **changes: Any) -> TraceSettings:
    return TraceSettings(
        **{"prompts": prompts, "tokens": 600, "samples": 2, "max_new_tokens": 12, "batch_size": 4, **changes}
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:12]))
    return file


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ABACUS)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_the_budget_is_met_exactly_and_ids_are_the_models_own(prompts: Path, tmp_path: Path, tokenizer: Any) -> None:
    report = generate(ABACUS, settings(prompts), tmp_path / "t")
    found = rows(tmp_path / "t")
    assert report.tokens == 600 == sum(len(r["prompt_token_ids"]) + len(r["completion_token_ids"]) for r in found)
    assert [r["finish_reason"] for r in found].count("budget") == 1 and found[-1]["finish_reason"] == "budget"
    assert json.loads((tmp_path / "t" / TRACES_SUMMARY).read_text())["tokens"] == 600
    first = found[0]
    rendered = tokenizer.apply_chat_template(load_prompts(prompts)[0].messages, add_generation_prompt=True)["input_ids"]
    assert first["prompt_token_ids"] == rendered
    assert tokenizer.decode(first["prompt_token_ids"] + first["completion_token_ids"]) == first["text"]
    assert load_calibration(str(tmp_path / "t"), tokenizer=tokenizer).tokens == 600


def test_an_instruction_stands_below_the_prompt_and_is_recorded(prompts: Path, tmp_path: Path, tokenizer: Any) -> None:
    wanted = settings(prompts, tokens=60, max_new_tokens=2, instruction=r"Answer within \boxed{}.")
    generate(ABACUS, wanted, tmp_path / "t")
    question = load_prompts(prompts)[0].messages[0]["content"]
    asked = [{"role": "user", "content": question + "\nAnswer within \\boxed{}."}]
    assert rows(tmp_path / "t")[0]["prompt_token_ids"] == render(tokenizer, asked, "here")
    kept = json.loads((tmp_path / "t" / TRACES_SUMMARY).read_text())
    assert kept["settings"]["instruction"] == wanted.instruction


def test_an_instruction_goes_around_the_last_question() -> None:
    talk = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"))]
    found = instructed([*talk, {"role": "user", "content": "{prompt}"}], "Q: {prompt}\nA:", "here")
    assert found == [*talk, {"role": "user", "content": "Q: {prompt}\nA:"}]
    assert instructed(talk, "", "here") is talk
    assert [each["content"] for each in instructed(talk, "Say {}", "here")] == ["s", "a\nSay {}", "b"]
    with pytest.raises(BadInput, match="here: no message is the user's"):
        instructed(talk[:1], "Say so", "here")


def test_several_files_are_asked_in_proportion(prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "q.jsonl"
    questions = [json.loads(line)["problem"] for line in PROMPTS.read_text().splitlines()[20:24]]
    other.write_text("".join(json.dumps({"Frage": text, "id": f"q{at}"}) + "\n" for at, text in enumerate(questions)))
    given: Any = [{"file": str(prompts), "share": 0.75}, {"file": str(other), "column": {"problem": "Frage"}}]
    wanted = settings(given, tokens=300, samples=1, max_new_tokens=4)
    asked = prompts_of(wanted)
    assert len(asked) == 16 and sorted({each.source for each in asked}) == sorted({str(prompts), str(other)})
    for many in (4, 8, 12, 16):
        assert [each.source for each in asked[:many]].count(str(other)) == many // 4
    assert next(each.id for each in asked if each.source == str(other)) == "q.jsonl:q0"
    report = generate(ABACUS, wanted, tmp_path / "t")
    found = rows(tmp_path / "t")
    assert report.traces == len(found) and {row["source"] for row in found} == {str(prompts), str(other)}
    # Alone, a file's prompts keep their ids, and with them their random numbers.
    assert [each.id for each in prompts_of(settings(prompts))] == [each.id for each in load_prompts(prompts)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["P:0.5", "Q:0.2"], "prompts: the shares 0.5 and 0.2 sum to 0.7; they should sum to 1"),
        (["P", "P"], "is given twice"),
        ([{"file": "P", "part": 1}], "part: Extra inputs"),
        ([], "should be a file, or a list"),
        ([3], "a source: should be a mapping of fields"),
    ],
)
def test_wrong_lists_of_prompts_are_one_line(given: list[Any], said: str, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "P").write_text(prompts.read_text())
    (tmp_path / "Q").write_text(prompts.read_text())
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"model": str(ABACUS), "trace": {"prompts": given}}))
    with pytest.raises(BadInput) as error:
        loaded = load_recipe(recipe)
        assert loaded.trace is not None
        prompts_of(loaded.trace)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_prompts_that_run_out_are_said(prompts: Path, tmp_path: Path) -> None:
    report = generate(ABACUS, settings(prompts, tokens=10_000, max_new_tokens=3), tmp_path / "t")
    assert report.traces == 24 and report.tokens < 10_000
    assert "fewer than the 10,000" in report.describe()


def test_little_is_sampled_beyond_the_budget_and_progress_moves(prompts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    wanted = settings(prompts, max_new_tokens=400, batch_size=128, temperature=0)
    asked: list[tuple[int, int]] = []
    decode = Decoder.decode

    def counted(self: Decoder, requests: Any, sampling: Any, *rest: Any) -> Any:
        found = decode(self, requests, sampling, *rest)
        asked.append(
            (len(requests), sum(len(x.prompt) + len(y.token_ids) for x, y in zip(requests, found, strict=True)))
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "decode", counted)
        report = generate(ABACUS, wanted, tmp_path / "t", progress=lambda what: said.append(str(what)))
    sampled = sum(tokens for _, tokens in asked)
    assert report.tokens == 600 <= sampled < 900, asked
    shown = [int(line.partition(" of 600 tokens · ")[0]) for line in said]
    assert len(set(shown)) > 50 and max(shown) <= 600


def test_a_seed_gives_the_same_traces_and_an_interruption_changes_nothing(prompts: Path, tmp_path: Path) -> None:
    generate(ABACUS, settings(prompts), tmp_path / "whole")
    calls = 0

    def interrupt(_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        generate(ABACUS, settings(prompts), tmp_path / "stopped", progress=interrupt)
    assert rows(tmp_path / "stopped.partial") and not (tmp_path / "stopped").exists()
    with pytest.raises(BadInput, match=r"another settings\.seed: 0, now 1"):
        generate(ABACUS, settings(prompts, seed=1), tmp_path / "stopped")
    generate(ABACUS, settings(prompts), tmp_path / "stopped")
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    generate(ABACUS, settings(prompts, seed=1), tmp_path / "other")
    assert rows(tmp_path / "other") != rows(tmp_path / "whole")
    with pytest.raises(BadInput, match="finished traces"):
        generate(ABACUS, settings(prompts), tmp_path / "whole")


def test_parts_and_budgets_of_a_calibration(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "c.jsonl"
    lines = [{"prompt_token_ids": [2, 9, 3], "completion_token_ids": [4, 10, 11, 1]}] * 3
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load(**wanted: Any) -> Any:
        return load_calibration(str(file), tokenizer=tokenizer, **wanted)

    assert load().tokens == 21 and load(tokens=10).tokens == 10
    assert [list(s.token_ids) for s in load(part="prompt").sequences] == [[2, 9, 3]] * 3
    completion = load(part="completion", tokens=6)
    assert completion.tokens == 6
    assert list(completion.sequences[0].token_ids) == [2, 9, 3, 4, 10, 11, 1]  # run whole, counted in part
    assert list(completion.sequences[0].weights) == [0, 0, 0, 1, 1, 1, 1]
    assert list(completion.sequences[1].weights) == [0, 0, 0, 1, 1]
    assert len({load(part=part).sha256 for part in ("all", "prompt", "completion")}) == 3


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        pytest.param({"prompt": "ab", "completion": "c"}, "ab", "c", id="deepspeed"),
        pytest.param({"input_ids": [2, 8, 9], "num_prompt_tokens": 1}, [2], [8, 9], id="sglang"),
        pytest.param({"text": "abc"}, "", "abc", id="text"),
        pytest.param({"problem": "ab"}, "<|user|>ab<|assistant|><think>\n", "", id="problem"),
        pytest.param(
            {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
            "<|user|>ab<|assistant|><think>\n",
            "c",
            id="messages",
        ),
        pytest.param(
            {"prompt": [{"role": "user", "content": "ab"}], "completion": [{"role": "assistant", "content": "c"}]},
            "<|user|>ab<|assistant|><think>\n",
            "c",
            id="trl",
        ),
    ],
)
def test_layouts(record: dict[str, Any], prompt: Any, completion: Any, tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (sequence,) = load_calibration(str(file), tokenizer=tokenizer).sequences
    prompt, completion = (tokenizer(x)["input_ids"] if isinstance(x, str) else x for x in (prompt, completion))
    assert list(sequence.token_ids) == [*prompt, *completion]
    assert sequence.prompt_length == len(prompt)


def test_text_is_cut_into_sequences(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.txt").write_text("abcdefg" * 3)
    found = load_calibration(f"text:{tmp_path / 't.txt'}", tokenizer=tokenizer, sequence_length=8, tokens=18)
    assert [len(sequence.token_ids) for sequence in found.sequences] == [8, 8, 2]
    assert tokenizer.decode(np.concatenate([s.token_ids for s in found.sequences])) == ("abcdefg" * 3)[:18]


@pytest.mark.parametrize(
    "record",
    [
        {"problem": "ab", "answer": "c"},
        {"prompt": "ab"},
        {"problem": "ab", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}]},
        {"problem": None, "prompt": [{"role": "user", "content": "ab"}]},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
    ],
    ids=lambda record: "+".join(record),
)
def test_a_prompt_never_shows_its_answer(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    assert load_prompts(tmp_path / "p.jsonl")[0].messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [{"role": "assistant", "content": "c"}]}\n', r"p\.jsonl:1: .*asks nothing"),
        ('{"problem": "a"}\n{"problem": \n', r"p\.jsonl:2:12: not valid JSON"),
        ('{"problem": "a"}\n[1]\n', r"p\.jsonl:2: should be a JSON object"),
        ('{"foo": "a"}\n', r"p\.jsonl:1: needs `problem`.*it has `foo`: name the column with --column problem="),
        ('{"messages": [{"role": "user"}]}\n', r"p\.jsonl:1: a message"),
        ('{"problem": "a", "id": 1}\n{"problem": "b", "id": 1}\n', r"p\.jsonl:2: id '1' is there twice"),
        ("\n", "holds no prompt"),
    ],
)
def test_broken_prompts_are_named_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [2, 103]}, "the model has 103"),
        ({"input_ids": [2, -1]}, "from -1"),
        ({"input_ids": [2, 3.5]}, "list of integers"),
        ({"input_ids": [2, 3], "num_prompt_tokens": 3}, "num_prompt_tokens"),
        ({"text": 5}, "should be text"),
        ({"text": ""}, "holds no tokens"),
    ],
)
def test_bad_calibration_is_refused(record: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(BadInput, match=message):
        load_calibration(str(tmp_path / "c.jsonl"), tokenizer=tokenizer)


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt_token_ids": [2], "completion_token_ids": [3]}] * 300
    for bad, said in ((None, "row 301: completion_token_ids: token ids should"), ([103], "row 301: token ids")):
        table = pa.Table.from_pylist([*rows, {"prompt_token_ids": [2], "completion_token_ids": bad}])
        pq.write_table(table, tmp_path / "c.parquet")
        with pytest.raises(BadInput, match=rf"c\.parquet: {said}"):
            load_calibration(str(tmp_path / "c.parquet"), tokenizer=tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 3000000000 }}",
        "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ],
)
def test_a_template_that_would_fill_the_memory_is_refused(template: str, tokenizer: Any) -> None:
    class Hostile:
        chat_template = template

        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            return tokenizer.apply_chat_template(messages, chat_template=template, **options)

    before = peak_memory(reset=True)
    with pytest.raises(BadInput, match="takes more than 1 GiB"):
        render(Hostile(), [{"role": "user", "content": "a"}], "p.jsonl:1")
    assert peak_memory() - before < 1.2 * 2**30
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(("text", "found"), [('{"chat_template": "{{ 1 }}"}', "{{ 1 }}"), ("{}", None)])
def test_a_template_may_lie_in_a_file_of_its_own(text: str, found: str | None, tmp_path: Path) -> None:
    """Models that also take images have it in chat_template.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ABACUS / name, tmp_path / name)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(text)
    assert load_tokenizer(tmp_path).chat_template == found
    shutil.copy(ABACUS / "chat_template.jinja", tmp_path)
    assert load_tokenizer(tmp_path).chat_template == (ABACUS / "chat_template.jinja").read_text()


def test_the_columns_of_a_trace(prompts: Path, tmp_path: Path) -> None:
    generate(ABACUS, settings(prompts, tokens=100, max_new_tokens=20), tmp_path / "t")
    file = next((tmp_path / "t").glob("*.parquet"))
    assert pq.read_schema(file).names == [
        "id",
        "prompt_token_ids",
        "completion_token_ids",
        "text",
        "finish_reason",
        "seed",
        "sampling",
        "model",
        "model_sha256",
        "template_sha256",
        "source",
    ]
    (first, *_) = rows(tmp_path / "t")
    assert first["model_sha256"] == Checkpoint.open(ABACUS).sha256() and first["seed"] == 0
    assert json.loads(first["sampling"])["temperature"] == 0.6 and first["model"] == str(ABACUS)


def test_sources_that_are_no_traces(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    for source in (str(tmp_path / "none"), str(tmp_path), f"text:{tmp_path / 'none'}"):
        with pytest.raises(BadInput):
            load_calibration(source, tokenizer=tokenizer)
    with pytest.raises(BadInput, match="no completion"):
        load_calibration(f"text:{PROMPTS}", tokenizer=tokenizer, part="completion")


def test_weights_of_tokens(tmp_path: Path, tokenizer: Any) -> None:
    """By completion and by the traces' own; the budget counts tokens all the same."""
    file = tmp_path / "c.jsonl"
    base = {"prompt_token_ids": [2, 9], "completion_token_ids": [4, 10, 11]}
    file.write_text("".join(json.dumps({**base, "w": own}) + "\n" for own in (1, [1, 0.5, 0, 1, 2])))

    def load(**wanted: Any) -> Any:
        options = {key: wanted.pop(key) for key in ("part", "tokens") if key in wanted}
        return load_calibration(str(file), tokenizer=tokenizer, weighting=Weighting(**wanted), **options)

    plain, heavy = load(), load(completion=2.0)
    assert plain.sequences[0].weights is None and plain.sha256 != heavy.sha256
    assert heavy.sequences[0].weights.tolist() == [1, 1, 2, 2, 2]
    assert heavy.describe().endswith(", weighted completions × 2")
    own = load(column="w")
    assert own.sequences[0].weights is None and own.sequences[1].weights.tolist() == [1, 0.5, 0, 1, 2]
    both = load(column="w", completion=2.0, part="completion", tokens=5)
    assert [s.weights.tolist() for s in both.sequences] == [[0, 0, 2, 2, 2], [0, 0, 0, 2]]
    with pytest.raises(BadInput, match="has no field 'v'"):
        load(column="v")
    with pytest.raises(BadInput, match="every token has weight 0"):
        load(completion=0.0, part="completion")
    for bad, said in (
        ([1, 2], "2 weights for 5 tokens"),
        (-1, "from 0 to 1e6"),
        (float("nan"), "from 0"),
        ("a", "from 0"),
    ):
        file.write_text(json.dumps({**base, "w": bad}) + "\n")
        with pytest.raises(BadInput, match=said):
            load(column="w")
    text = tmp_path / "t.txt"
    text.write_text("a b c")
    with pytest.raises(BadInput, match="no completions to weight"):
        load_calibration(f"text:{text}", tokenizer=tokenizer, weighting=Weighting(2.0))


@pytest.mark.parametrize(("limit", "said"), [("_GROUP", "a row group larger than"), ("_BATCH", "rows of more than")])
def test_a_small_file_of_many_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, said: str
) -> None:
    """A token repeated over and over: kilobytes that would become gigabytes."""
    table = pa.table({"prompt_token_ids": [[1]], "completion_token_ids": [[7] * 1_000_000]})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    assert load_calibration(str(tmp_path / "t.parquet"), tokenizer=range(8)).tokens == 1_000_001
    monkeypatch.setattr(tables, limit, 100)
    with pytest.raises(BadInput, match=said):
        load_calibration(str(tmp_path / "t.parquet"), tokenizer=range(8))


def test_a_key_given_twice_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "a"}\n{"problem": "b", "id": 1, "problem": "c"}\n')
    with pytest.raises(BadInput, match=r"p\.jsonl:2: not valid JSON \(the key 'problem' is given twice\)"):
        load_prompts(file)
