"""Layouts of strangers' records: what is asked, what the right answer is, and what calibrates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rac_engine.base.errors import BadInput
from rac_engine.evaluation.problems import load_problems
from rac_engine.traces.calibration import Calibration, load_calibration
from rac_engine.traces.layouts import exchange_of
from rac_engine.traces.prompts import load_prompts, notes_on
from rac_engine.traces.questions import COLUMNS, answer_of, question_of
from rac_engine.traces.tokenizer import load_tokenizer

ABACUS = Path(__file__).parents[3] / "examples/abacus"
TEMPLATES = Path(__file__).parents[2] / "hub/templates"
ASKED = "Multiply 261 by 43."
THOUGHT = "261*40=10440\n261*3=783\n"
SAID = "\\boxed{11223}"
WHOLE = f"<think>\n{THOUGHT}</think>\n{SAID}"
PROMPT = f"<|user|>{ASKED}<|assistant|><think>\n"
USER = {"role": "user", "content": ASKED}
ANSWER = {"role": "assistant", "content": WHOLE}
APART = {"role": "assistant", "content": SAID, "reasoning_content": THOUGHT}
TRACE = (PROMPT, f"{THOUGHT}</think>\n{SAID}")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ABACUS)


def calibration(records: list[dict[str, Any]], folder: Path, tokenizer: Any, **options: Any) -> Calibration:
    (folder / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_calibration(str(folder / "c.jsonl"), tokenizer=tokenizer, **options)


def texts(found: Calibration, tokenizer: Any) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(s.token_ids[: s.prompt_length]), tokenizer.decode(s.token_ids[s.prompt_length :]))
        for s in found.sequences
    ]


def openai(message: dict[str, Any], **reply: Any) -> dict[str, Any]:
    body = {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}], **reply}
    return {"custom_id": "1", "response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}


REQUEST = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": [USER]},
}


@pytest.mark.parametrize(
    ("record", "traces"),
    [
        pytest.param({"messages": [USER, APART]}, [TRACE], id="reasoning_content"),
        pytest.param(
            {"messages": [USER, {"role": "assistant", "content": SAID, "thinking": THOUGHT}]}, [TRACE], id="thinking"
        ),
        pytest.param(
            {"messages": [USER, {"role": "assistant", "content": SAID, "reasoning": THOUGHT}]}, [TRACE], id="reasoning"
        ),
        pytest.param(
            {"messages": [USER, {"role": "assistant", "content": None, "reasoning_content": THOUGHT}]},
            [(PROMPT, THOUGHT)],
            id="cut-off-while-thinking",
        ),
        pytest.param(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": ASKED}]},
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": SAID}],
                    },
                ]
            },
            [TRACE],
            id="parts",
        ),
        pytest.param(
            {"question": ASKED, "reasoning": THOUGHT, "response": SAID}, [TRACE], id="thought-beside-response"
        ),
        pytest.param(
            {"problem": ASKED, "answer": "11223", "generations": [WHOLE, "2"]}, [TRACE, (PROMPT, "2")], id="openr1"
        ),
        pytest.param(
            {"problem": ASKED, "generations": [WHOLE, "2"], "messages": [USER, ANSWER], "correctness_llama": None},
            [TRACE, (PROMPT, "2")],
            id="openr1-with-messages",
        ),
        pytest.param({"id": "1/A", "prompt": ASKED, "generation": WHOLE}, [TRACE], id="codeforces-cots"),
        pytest.param({"prompt": ASKED, "response": {"role": "assistant", **APART}}, [TRACE], id="response-as-message"),
        pytest.param(
            {"prompt": [USER], "responses": [WHOLE], "reward_model": {"ground_truth": "1"}}, [TRACE], id="verl"
        ),
        pytest.param({"prompt": [USER], "completion": WHOLE}, [TRACE], id="conversation-and-text"),
        pytest.param({"instruction": ASKED, "input": "", "output": WHOLE}, [TRACE], id="alpaca"),
        pytest.param(
            {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": WHOLE}]},
            [TRACE],
            id="sharegpt",
        ),
        pytest.param({"prompt": json.dumps([USER]), "response": WHOLE}, [TRACE], id="conversation-as-json"),
        pytest.param({"prompt": str([USER]), "response": WHOLE}, [TRACE], id="conversation-as-python"),
        pytest.param({**REQUEST, **openai(APART)}, [TRACE], id="openai"),
        pytest.param(REQUEST, [(PROMPT, "")], id="openai-request"),
        pytest.param(
            openai(ANSWER, prompt_token_ids=[2, 8]) | {"custom_id": "2"}, [("<|user|> ", WHOLE)], id="vllm-server"
        ),
        pytest.param({"prompt": ASKED, "text": WHOLE}, [(ASKED, WHOLE)], id="prompt-and-text"),
        pytest.param({"prompt": "ab", "text": "abc"}, [("ab", "c")], id="text-with-its-prompt"),
        pytest.param(
            {"doc": {"query": ASKED}, "model_response": {"text": [SAID], "reasonings": [THOUGHT], "output_tokens": []}},
            [TRACE],
            id="lighteval-words",
        ),
    ],
)
def test_words(record: dict[str, Any], traces: list[tuple[str, str]], tmp_path: Path, tokenizer: Any) -> None:
    """A thought, an answer or a prompt that a record has is never lost."""
    assert texts(calibration([record], tmp_path, tokenizer), tokenizer) == traces


@pytest.mark.parametrize(
    ("record", "prompt", "completions"),
    [
        pytest.param({"input_ids": [0, 0, 0, 5, 6], "attention_mask": [0, 0, 0, 1, 1]}, [], [[5, 6]], id="padded-left"),
        pytest.param({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, [], [[5, 6]], id="padded-right"),
        pytest.param(
            {"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, -100, 7]},
            [5, 6],
            [[7]],
            id="labels",
        ),
        pytest.param({"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}, [], [[5, 6]], id="one-row"),
        pytest.param({"input_ids": [5, 6], "num_prompt_tokens": 1, "text": "other"}, [5], [[6]], id="sglang-training"),
        pytest.param({"input_ids": [5, 6], "output_ids": [7], "text": "x"}, [5, 6], [[7]], id="sglang-ids"),
        pytest.param(
            {
                "request_id": "0",
                "prompt": ASKED,
                "prompt_token_ids": [5, 6],
                "outputs": [{"index": 0, "text": WHOLE, "token_ids": [7, 8]}, {"text": "", "token_ids": [9]}],
            },
            [5, 6],
            [[7, 8], [9]],
            id="vllm",
        ),
        pytest.param(
            {"prompt_token_ids": [5], "choices": [{"text": "x", "token_ids": [7]}], "object": "text_completion"},
            [5],
            [[7]],
            id="vllm-server",
        ),
        pytest.param({"prompt_ids": [5], "completion_ids": [6], "completion": "x"}, [5], [[6]], id="trl"),
        pytest.param(
            {
                "doc": {"query": ASKED},
                "model_response": {"input_tokens": [5], "output_tokens": [[6], [7]], "text": [""]},
            },
            [5],
            [[6], [7]],
            id="lighteval",
        ),
        pytest.param(
            {
                "example": ASKED,
                "full_prompt": "x",
                "predictions": "['a']",
                "input_tokens": "[5]",
                "cont_tokens": "[[6]]",
            },
            [5],
            [[6]],
            id="lighteval-before-0.10",
        ),
    ],
)
def test_token_ids(record: dict[str, Any], prompt: list[int], completions: list[list[int]]) -> None:
    """Token ids are the truth, pads are none, and what is labelled -100 was asked."""
    found = exchange_of(record, "here")
    assert found is not None and found.prompt == prompt and found.completions == completions


def test_the_prompt_of_sglangs_dump_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": ASKED, "text": WHOLE, "output_ids": [11, 12, 13], "meta_info": {"completion_tokens": 3}}
    found = calibration([record], tmp_path, tokenizer)
    (sequence,) = found.sequences
    assert list(sequence.token_ids) == [*tokenizer(ASKED)["input_ids"], 11, 12, 13]
    assert "no special token" in found.remarks[0]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, "`tool_calls` of a message is not read"),
        ({"messages": [USER, {**ANSWER, "chain_of_thought": "x"}]}, "`chain_of_thought` of a message"),
        ({"problem": ASKED, "thinking_trajectories": ["x"]}, "`thinking_trajectories` is not read here"),
        ({"problem": ASKED, "reasoning": THOUGHT, "answer": "1"}, "`reasoning` would be lost"),
        ({"prompt": "a", "completion": "b", "generation": "c"}, "`generation` is not read here"),
        ({"problem": ASKED, "text": WHOLE}, "`text` does not hold 'Multiply 261 by 43.'"),
        ({"prompt": ASKED, "text": f"<|user|>{ASKED}"}, "`text` holds the `prompt` within it"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "holds image beside text"),
        ({"conversations": [{"from": "moon", "value": "x"}]}, "`from` 'moon'"),
        ({"prompt": "[{'role': 'user', 'content': 'x'} {'role': 'x'}]"}, "written down as text, and not as JSON"),
        ({"input_ids": [5], "attention_mask": [1, 1]}, "`attention_mask` should hold"),
        ({"input_ids": [5], "labels": [1, 1]}, "2 `labels` for 1"),
        ({"prompt_token_ids": [5], "completion_token_ids": None}, "completion_token_ids: token ids should"),
        (openai(ANSWER), "an answer without its prompt"),
        ({"frage": ASKED, "Antwort": 1}, r"it has `frage`, `Antwort`: name the column with --column problem="),
    ],
)
def test_what_would_be_lost_is_named(record: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=f"here: .*{said}"):
        exchange_of(record, "here")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ANSWER, "tool_calls": [], "refusal": None, "function_call": None}]},
        {"problem": ASKED, "generations": [WHOLE], "finish_reasons": ["stop"], "is_reasoning_complete": [True]},
        {"problem": ASKED, "response": WHOLE, "generation": WHOLE, "reasoning": "on"},
    ],
)
def test_what_loses_nothing_is_taken(record: dict[str, Any]) -> None:
    found = exchange_of(record, "here")
    assert found is not None and len(found.completions) == 1


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("deepseek-r1", f"{THOUGHT}</think>\n{SAID}"),
        ("deepseek-v3.1", f"\n{THOUGHT}</think>\n{SAID}"),
        ("exaone-deep", f"{THOUGHT}</thought>\n{SAID}"),
        ("exaone-4", f"{THOUGHT}</think>\n{SAID}"),
        ("glm-z1", f"\n{THOUGHT}</think>\n{SAID}"),
        ("qwq", f"{THOUGHT}</think>\n{SAID}"),
        ("qwen3", f"<think>\n{THOUGHT}</think>\n{SAID}"),
        ("granite-3.3", f"<think>\n{THOUGHT}</think>\n{SAID}"),
    ],
)
def test_a_thought_goes_where_the_template_opens_it(
    template: str, completion: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates that strip earlier thoughts, that open one, and that have thinking switched off by default."""
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / f"{template}.jinja").read_text())
    (found,) = calibration([{"messages": [USER, APART]}], tmp_path, tokenizer).sequences
    assert tokenizer.decode(found.token_ids[found.prompt_length :]) == completion


KNOWS = """\
{%- for m in messages -%}
{{- '<|' + m.role + '|>' -}}
{%- if m.reasoning_content -%}{{- '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' -}}{%- endif -%}
{{- m.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
CHANNELS = """\
{%- for m in messages -%}
{{- '<|' + m.role + '|>' -}}
{%- if m['thinking'] -%}{{- '[analysis]' + m['thinking'] + '<|end|><|' + m.role + '|>[final]' -}}{%- endif -%}
{{- m.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        (KNOWS, f"<think>\n{THOUGHT}</think>\n\n{SAID}"),
        (CHANNELS, f"[analysis]{THOUGHT}<|end|><|assistant|>[final]{SAID}"),
    ],
)
def test_a_template_that_knows_thoughts_places_them(
    template: str, completion: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    earlier = [USER, {**APART, "reasoning_content": "x"}]
    found = calibration([{"messages": [*earlier, USER, APART]}], tmp_path, tokenizer)
    ((prompt, said),) = texts(found, tokenizer)
    assert said == completion and prompt.endswith("<|assistant|>")
    assert (
        "<think>\nx\n</think>" in prompt or "[analysis]x<|end|>" in prompt
    )  # the earlier thought is the template's to keep


SWITCHED = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' + ('' if thinking else '<think></think>') -}}{%- endif -%}"""


def test_the_template_is_told_what_the_calibration_says(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", SWITCHED)
    records = [{"problem": ASKED}, {"problem": ASKED, "response": SAID}]
    for thinking, ends in ((True, "<|assistant|>"), (False, "<think></think>")):
        found = calibration(records, tmp_path, tokenizer, template_arguments={"thinking": thinking})
        assert all(prompt.endswith(ends) for prompt, _ in texts(found, tokenizer))
    thought = {"messages": [USER, APART]}  # thinking is switched on for it, unless that was decided
    assert calibration([thought], tmp_path, tokenizer).tokens
    with pytest.raises(BadInput, match="a thought has no place behind it"):
        calibration([thought], tmp_path, tokenizer, template_arguments={"thinking": False})
    with pytest.raises(BadInput, match="has no argument 'effort'"):
        calibration(records, tmp_path, tokenizer, template_arguments={"effort": "high"})


def test_a_calibration_without_completions_says_so(tmp_path: Path, tokenizer: Any) -> None:
    found = calibration([{"problem": "a"}, {"problem": "b"}], tmp_path, tokenizer)
    assert found.label == "prompt" and "no record of the calibration has a completion" in found.remarks[0]
    assert not calibration([{"problem": "a"}], tmp_path, tokenizer, part="prompt").remarks
    failed = openai({}) | {"response": {"status_code": 500, "body": {}}, "error": {"code": "x"}}
    some = calibration([{"problem": "a", "response": "b"}, {"problem": "b"}, failed], tmp_path, tokenizer)
    assert "1 of 2 records" in some.remarks[0] and "1 records are requests that failed" in some.remarks[1]


def test_the_models_that_traces_are_of_are_known(tmp_path: Path, tokenizer: Any) -> None:
    ids = {"prompt_token_ids": [5], "completion_token_ids": [6]}
    found = calibration([{**ids, "model_sha256": "a"}, {**ids, "model_sha256": "b"}], tmp_path, tokenizer)
    assert found.models == {"a", "b"}


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        pytest.param({"question": "q", "answer": "2+1=<<2+1=3>>3\n#### 3"}, "3", id="gsm8k"),
        pytest.param(
            {"problem": "q", "answer": "\\frac12", "unique_id": "test/algebra/1.json"}, "\\frac12", id="math-500"
        ),
        pytest.param({"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 204}, "204", id="aime"),
        pytest.param({"question": "q", "final_answer": ["11223"]}, "11223", id="olympiad"),
        pytest.param({"question": "q", "final_answer": ["1", "2"]}, "1, 2", id="several"),
        pytest.param(
            {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "3"}}, "3", id="verl"
        ),
        pytest.param({"problem": "q", "answer": None, "expected_answer": "3"}, "3", id="null-is-absent"),
        pytest.param(
            {"doc": {"query": "q", "choices": ["3"], "gold_index": 0}, "model_response": {}}, "3", id="lighteval"
        ),
        pytest.param({"full_prompt": "q", "example": "q", "gold": "['3']"}, "3", id="lighteval-before-0.10"),
        pytest.param({"problem": "q", "solution": "so it is \\boxed{3}."}, "3", id="boxed-in-the-solution"),
    ],
)
def test_right_answers(record: dict[str, Any], answer: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    (problem,) = load_problems(tmp_path / "q.jsonl")
    assert problem.answer == answer and problem.messages == [{"role": "user", "content": "q"}]
    assert problem.id == record.get("unique_id", record.get("ID", "0"))


@pytest.mark.parametrize("answer", ["NaN", '""', "true", "{}", "[]", "[null]"])
def test_answers_that_are_none(answer: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"problem": "a", "answer": {answer}}}\n')
    with pytest.raises(BadInput, match=r"q\.jsonl:1: needs `answer`, as text or a number"):
        load_problems(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("record", "choices", "answer"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, "A. x\nB. y", "B"),
        ({"question": "q", "options": ["x", "y"], "answer": "A", "answer_index": 0}, "A. x\nB. y", "A"),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"}, "A. x\nB. y", "B"),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, "1. x\n2. y", "2"),
        ({"question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"}, "A. w\nB. x\nC. y\nD. z", "C"),
    ],
    ids=["mmlu", "mmlu-pro", "letters", "arc", "csv"],
)
def test_multiple_choice(record: dict[str, Any], choices: str, answer: str) -> None:
    (message,) = question_of(record, "here")
    assert message["content"].startswith(f"q\n\n{choices}\n\n") and answer_of(record, "here") == answer
    assert question_of({**record, "question": message["content"]}, "here")[0] == message  # they are there already


def test_gpqas_choices_have_an_order_that_does_not_give_the_answer_away() -> None:
    wrong = {f"Incorrect Answer {number}": f"w{number}" for number in (1, 2, 3)}
    letters = set()
    for number in range(20):
        record = {"Question": "q", "Correct Answer": f"right {number}", **wrong, "Record ID": "r"}
        letter = answer_of(record, "here")
        assert f"{letter}. right {number}\n" in question_of(record, "here")[0]["content"]
        letters.add(letter)
    assert letters == set("ABCD")


def test_ids(tmp_path: Path) -> None:
    """Null is absent; an answer a row repeats its question, which is asked once; other names need not be unique."""
    file = tmp_path / "p.jsonl"
    records: list[dict[str, Any]] = [{"id": None, "problem": "a"}, {"id": float("nan"), "problem": "b"}]
    records += [{"uuid": "u", "problem": "c"}, {"uuid": "u", "problem": "d"}, {"id": "x", "problem": "e"}]
    records += [{"id": "x", "problem": "e"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = load_prompts(file)
    assert [prompt.id for prompt in found] == ["0", "1", "u", "u#3", "x"]
    assert [prompt.rows for prompt in found] == [1, 1, 1, 1, 2]
    assert notes_on(found)[0].startswith("1 records repeat") and not notes_on(found[:4])


def test_columns_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"Frage": "a", "Antwort": "b", "problem": "other", "question": "x"}) + "\n")
    (problem,) = load_problems(file, {"problem": "Frage", "answer": "Antwort"})
    assert (problem.messages[0]["content"], problem.answer) == ("a", "b")
    with pytest.raises(BadInput, match=r"q\.jsonl:1: has no column 'F' \(column: problem\); it has `Frage`, `Antwort`"):
        load_prompts(file, {"problem": "F"})


def test_every_name_that_is_read_is_among_the_columns() -> None:
    """What is read of a table must hold what is looked up in a record."""
    import ast

    from rac_engine.traces import choices, layouts, questions

    looked = set()
    for module in (choices, layouts, questions):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "all"):
                owner = ast.unparse(node.func.value)
                if owner in ("fields", "values", "fields.values"):
                    looked |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    assert len(looked) > 20 and looked - {"message"} <= COLUMNS  # which is in an object
