"""The command line: help, exit codes, and bad input as one line with nothing left behind."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rac_engine
from rac_engine import engine
from rac_engine.base import faults
from rac_engine.base.console import Console
from rac_engine.base.errors import Interrupted, one_line
from rac_engine.cli import app
from rac_engine.cli.app import main
from rac_engine.cli.options import has_option
from rac_engine.recipe.settings import PruneSettings
from tests.tiny import save_tokenizer

ABACUS = Path(__file__).parents[3] / "examples" / "abacus"
COMMANDS = ("run", "trace", "prune", "eval", "report", "plan", "verify", "doctor", "completion")


LONG = ("trace", "prune", "eval", "plan")
"""Commands with more options than the short page shows."""


def actions(command: str, *words: str) -> list[argparse.Action]:
    """What argparse knows of a command's options."""
    parser = app._parser([command, *words])
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(commands.choices[command]._actions)


@dataclass
class Outcome:
    """What a command said and returned, and what it left in its working folder."""

    code: int
    out: str
    err: str


@pytest.fixture
def rac(capsys, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def assert_one_line(outcome: Outcome, *said: str) -> None:
    assert outcome.code == 2, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rac: error: ")
    for text in said:
        assert text in lines[0]
    assert outcome.out == ""


@pytest.fixture
def text(tmp_path) -> str:
    file = tmp_path / "english.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 50)
    return f"text:{file}"


def test_help_is_instant_and_imports_nothing_heavy():
    program = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "from rac_engine.cli import app, main\n"
        "main(['--help'])\n"
        "took = time.process_time() - began\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'yaml', 'numpy'} & set(sys.modules)\n"
        "print(took, heavy, file=sys.stderr); sys.exit(bool(heavy) or took > 0.3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)


def test_help_on_commands_names_the_methods_and_imports_no_torch():
    program = (
        "import sys\n"
        "from rac_engine.cli import main\n"
        f"for command in {COMMANDS}: main([command, '--help'])\n"
        "main(['prune', '--help-all'])\n"
        "heavy = {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "admm, alps, magnitude, sparsegpt, wanda" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command, rac):
    page = rac(command, "--help-all" if command in LONG else "--help").out
    assert "examples:" in page and "%(" not in page
    for action in actions(command, "--help-all"):
        assert action.help and len(action.help) > 8, action.dest
        assert all(name in page for name in action.option_strings) and action.help != argparse.SUPPRESS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_page_shows_what_people_use_and_names_the_full_one(command, rac):
    every = {name for action in actions(command, "--help-all") for name in action.option_strings}
    page = rac(command, "--help")
    words = set(re.findall(r"--[a-z-]+", page.out))
    assert page.code == 0 and "examples:" in page.out
    hidden = {name for name in every if name.startswith("--")} - words
    assert bool(hidden) == (command in LONG)
    if hidden:
        assert f"`rac {command} --help-all` shows {len(hidden)} more options" in page.out
        assert words >= {"--help-all", "--restart", "--device"} or command == "plan"
    else:
        assert "--help-all" not in every
    assert len(words) <= 20


def test_the_short_page_of_prune_has_the_dozen_and_not_the_rest(rac):
    page = rac("prune", "--help").out
    for name in ("calibration", "sparsity", "pattern", "method", "tokens", "part", "device", "device-memory"):
        assert f"  --{name} " in page
    for name in ("host-memory", "dense", "recipe", "dry-run", "restart"):
        assert f"  --{name} " in page
    for name in ("damping", "allocation", "tune", "weight-column", "chunk-tokens"):
        assert f"--{name}" not in page


def test_every_setting_of_a_pruning_that_is_no_section_is_an_option():
    from rac_engine.cli.commands.pruning_options import GROUPS

    fields = [name for name in PruneSettings.model_fields if has_option(PruneSettings, name)]
    assert sorted(fields) == sorted(name for names in GROUPS.values() for name in names)
    for command in ("prune", "plan"):
        assert set(fields) <= {action.dest for action in actions(command)}


def test_an_option_that_only_the_full_page_shows_is_taken(rac, checkpoint):
    words = ("--method", "magnitude", "--block-size", "0x")
    assert_one_line(rac("prune", "m", "o", *words), "--block-size", "0x")
    outcome = rac("prune", checkpoint(), "o", "--method", "magnitude", "--block-size", "32", "--dry-run")
    assert outcome.code == 0 and "block_size: 32" in outcome.out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pr"], {"prune"}),
        (["prune", "--spars"], {"--sparsity"}),
        (["prune", "--block"], {"--block-size"}),  # that only the full page shows
        (["plan", "--allocation", ""], {"uniform", "error"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["run", "rec"], {"recipe.yaml"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_bash_completes_commands_options_values_and_files(rac, tmp_path, words, offered):
    (tmp_path / "rac.bash").write_text(rac("completion", "bash").out)
    (tmp_path / "recipe.yaml").touch()
    typed = " ".join(["rac", *(word or "''" for word in words)])
    program = f"source ./rac.bash; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_rac; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize(("shell", "head"), [("zsh", "#compdef rac"), ("fish", "complete -c rac")])
def test_other_shells_have_their_scripts(rac, shell, head):
    script = rac("completion", shell).out
    assert head in script and "block-size" in script and "%(" not in script


def test_the_version(rac):
    outcome = rac("--version")
    assert outcome.code == 0
    assert re.fullmatch(r"rac \d+\.\d+\.\d+\n", outcome.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["prnue"], "invalid choice: 'prnue'"),
        (["prune"], "MODEL, OUT"),
        (["prune", "m", "o", "--sparsity", "1.5"], "--sparsity: should be less than 1, got 1.5"),
        (["prune", "m", "o", "--sparsity", "half"], "--sparsity"),
        (["prune", "m", "o", "--damping", "5"], "--damping: should be less than or equal to 1, got 5"),
        (["prune", "m", "o", "--sparsity", "nan"], "--sparsity"),
        (["prune", "m", "o", "--pattern", "5:4"], "--pattern: pattern 5:4"),
        (["prune", "m", "o", "--pattern", "2:4", "--sparsity", "0.7"], "pattern 2:4 means sparsity 0.5, not 0.7"),
        (["prune", "m", "o", "--block-size", "0"], "--block-size: should be greater than 0"),
        (["prune", "m", "o", "--tokens", "many"], "'many' is not a size"),
        (["prune", "m", "o", "--method", "guess"], "--method: 'guess' is not known; known are admm, alps, "),
        (["prune", "m", "o", "--method", "wnada"], "--method: 'wnada' is not known; did you mean 'wanda'?"),
        (
            ["prune", "m", "o", "--method", "rac"],
            "--method: 'rac' is called admm now (rac is the calibration on the model's own traces)",
        ),
        (["plan", "m", "--method", "rac"], "--method: 'rac' is called admm now"),
        (["prune", "m", "o", "--dense", "("], "not a valid regular expression"),
        (["prune", "m", "o", "--spars", "0.5"], "--spars"),
        (["prune", "m", "o", "--device", "tpu", "--method", "magnitude"], "--device tpu"),
        (["prune", "m", "o"], "--calibration is missing"),
        (["prune", "m", "o", "--recipe", "none.yaml"], "none.yaml: No such file"),
        (["plan", "m", "--tokens", "0"], "--tokens"),
        (["run", "none.yaml", "o"], "none.yaml: No such file"),
        (["trace", "m", "--out", "t"], "--prompts"),
        (["trace", "m", "--prompts", "p", "--out", "t", "--temperature", "-1"], "--temperature"),
        (["eval", "m", "--out", "r"], "--problems"),
        (["report", "."], "output folder of"),
        (["verify", "."], "output folder of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_line(rac, tmp_path, words, said):
    assert_one_line(rac(*words), said)
    assert list(tmp_path.iterdir()) == []


def test_what_a_stranger_calls_things_does_not_command_the_terminal(rac, tmp_path, checkpoint):
    shutil.copytree(checkpoint(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "\x1b[2J\x07\u202egpt"}))
    result = rac("plan", tmp_path / "model")
    assert_one_line(result, "gpt")
    assert one_line("a\x1b[2J\n\u202eb\ud800") == "a\\x1b[2J \\u202eb\\ud800"
    assert not {"\x1b", "\x07", "\u202e"} & set(result.err)


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "trace"])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no such folder"),
        ("", "config.json"),
        ("{", "not valid JSON"),
        ('{"model_type": "gpt9"}', "gpt9"),
    ],
    ids=["missing", "no config", "broken config", "unknown family"],
)
def test_a_model_that_cannot_be_pruned_is_one_line(rac, tmp_path, checkpoint, text, command, config, said):
    model = tmp_path / "model"
    if config is not None:
        shutil.copytree(checkpoint(), model)
        (model / "config.json").unlink() if config == "" else (model / "config.json").write_text(config)
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    words = {
        "prune": ["prune", model, "out", "--calibration", text],
        "plan": ["plan", model],
        "eval": ["eval", model, "--problems", "p.jsonl", "--out", "out"],
        "trace": ["trace", model, "--prompts", "p.jsonl", "--out", "out"],
    }[command]
    before = sorted(tmp_path.rglob("*"))
    assert_one_line(rac(*words), said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["prune", ABACUS, "out", "--calibration", "p.jsonl"],
        ["prune", ABACUS, "out", "--calibration", "p.jsonl", "--dry-run"],
        ["trace", ABACUS, "--out", "out", "--prompts", "p.jsonl"],
        ["eval", ABACUS, "--out", "out", "--problems", "p.jsonl"],
    ],
    ids=lambda words: f"{words[0]}{' --dry-run' if '--dry-run' in words else ''}",
)
@pytest.mark.parametrize("line", ['{"problem": ', "[1]", "{}", '{"problem": 3, "answer": "2"}'])
def test_a_broken_line_is_named_by_its_number(rac, tmp_path, words, line):
    (tmp_path / "p.jsonl").write_text(f'{{"problem": "1+1", "answer": "2"}}\n\n{line}\n')
    assert_one_line(rac(*words), "p.jsonl:3:")
    assert list(tmp_path.iterdir()) == [tmp_path / "p.jsonl"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none", "none: not found"),
        ("text:none", "text:"),
        ("empty.jsonl", "holds no tokens"),
        (".", "no .parquet file"),
    ],
)
def test_a_calibration_that_is_missing_or_empty_is_named(rac, tmp_path, source, said):
    (tmp_path / "empty.jsonl").write_text("")
    assert_one_line(rac("prune", ABACUS, "out", "--calibration", source), said)
    assert list(tmp_path.iterdir()) == [tmp_path / "empty.jsonl"]


def test_a_model_without_a_tokenizer_is_one_line(rac, tmp_path, checkpoint, text):
    assert_one_line(rac("prune", checkpoint(), "out", "--calibration", text), "tokenizer")
    assert not (tmp_path / "out.partial").exists()


def test_traces_and_answers_from_the_command_line(rac, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n' * 2)
    outcome = rac("trace", ABACUS, "--prompts", "p.jsonl", "--tokens", "60", "--max-new-tokens", "8", "--out", "traces")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("traces: 3 traces, 60 tokens (")
    asked = ["eval", ABACUS, "--problems", "p.jsonl", "--max-new-tokens", "6"]
    assert rac(*asked, "--out", "a.json").code == 0
    outcome = rac(*asked, "--out", "b.json", "--baseline", "a.json")
    assert outcome.code == 0, outcome.err
    first, against, why, results = outcome.out.splitlines()
    assert "0% of 2 right [0%, 65.8%]" in first and "100% cut off" in first
    assert why.startswith("note     all 2 answers were cut off")
    assert against.startswith("against a.json: 0 lost, 0 gained (McNemar p = 1), 1.00 × as long")
    assert results == "results  b.json" and (tmp_path / "b.json").is_file()


def test_an_output_that_exists_is_not_touched(rac, tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    outcome = rac("prune", checkpoint(), "out", "--method", "magnitude")
    assert_one_line(outcome, "out: exists")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_an_output_in_no_folder_is_refused(rac, tmp_path, checkpoint):
    assert_one_line(rac("prune", checkpoint(), "a/b/out", "--method", "magnitude"), "no such folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(rac, tmp_path, checkpoint, monkeypatch, code):
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(faults, "reserve", full)
    outcome = rac("-q", "prune", checkpoint(), "out", "--method", "magnitude")
    assert_one_line(outcome, os.strerror(code), "free some space")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize("command", ["prune", "trace", "eval", "run"])
def test_a_disk_that_is_full_from_the_first_write_leaves_nothing(
    rac, tmp_path, tmp_path_factory, monkeypatch, command, allowed
):
    given = tmp_path_factory.mktemp("given")
    (given / "p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    sections = "prune: {method: magnitude}\ntrace: {prompts: p.jsonl, tokens: 20, max_new_tokens: 4}"
    (given / "r.yaml").write_text(f"model: {ABACUS}\n{sections}\n")
    words: dict[str, list[object]] = {
        "prune": [ABACUS, "out", "--method", "magnitude"],
        "trace": [ABACUS, "--out", "out", "--prompts", given / "p.jsonl", "--max-new-tokens", "4"],
        "eval": [ABACUS, "--out", "out", "--problems", given / "p.jsonl", "--max-new-tokens", "4"],
        "run": [given / "r.yaml", "out"],
    }
    done, real = 0, faults.pwrite

    def full(*write: Any) -> int:
        nonlocal done
        done += 1
        if done > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*write)

    monkeypatch.setattr(faults, "pwrite", full)
    assert_one_line(rac("-q", command, *words[command]), "free some space")
    assert done > allowed
    assert list(tmp_path.iterdir()) == []


def test_traces_of_a_model_without_a_chat_template_leave_nothing(rac, tmp_path, tmp_path_factory):
    model = shutil.copytree(ABACUS, tmp_path_factory.mktemp("given") / "m")
    (model / "chat_template.jinja").unlink()
    outcome = rac("-q", "trace", model, "--out", "t", "--prompts", ABACUS.parent / "problems" / "calibration.jsonl")
    assert_one_line(outcome, "has no chat template")
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_refuses_the_file_is_one_line_and_leaves_nothing(rac, tmp_path, checkpoint):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        outcome = rac("-q", "prune", checkpoint(), "out", "--method", "magnitude")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(outcome, "File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_pruned_checkpoint_comes_with_its_report_and_verifies(rac, tmp_path, checkpoint):
    outcome = rac("prune", checkpoint(), "out", "--method", "magnitude", "--pattern", "2:4", "--dense", "mlp.up_proj")
    assert outcome.code == 0, outcome.err
    assert "50% zeros in 18 matrices" in outcome.out
    assert (tmp_path / "out" / "rac" / "report.html").is_file()
    assert "layer 3/3" in outcome.err or outcome.err == ""
    outcome = rac("verify", "out", "--source", checkpoint())
    assert outcome.code == 0 and "out: whole" in outcome.out
    shard = next((tmp_path / "out").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    outcome = rac("verify", "out")
    assert outcome.code == 1 and "SHA-256" in outcome.out


def test_a_recipe_is_taken_and_options_win(rac, tmp_path, checkpoint, text):
    (tmp_path / "r.yaml").write_text(
        f"model: elsewhere\ncalibration: {{source: '{text}', tokens: 500}}\nprune: {{method: wanda, pattern: 1:4}}\n"
    )
    outcome = rac("prune", checkpoint(), "out", "--recipe", "r.yaml", "--sparsity", "0.25", "--method", "magnitude")
    assert outcome.code == 0, outcome.err
    recipe = (tmp_path / "out" / "rac" / "recipe.yaml").read_text()
    assert "sparsity: 0.25" in recipe and "pattern: null" in recipe and "method: magnitude" in recipe
    assert f"model: {checkpoint()}" in recipe and "tokens: 500" in recipe


def test_the_recipe_left_behind_means_the_same_from_another_folder(rac, tmp_path, checkpoint, monkeypatch):
    shutil.copytree(checkpoint(), tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    (tmp_path / "t.jsonl").write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    options = ("--method", "sparsegpt", "--sparsity", "0.25")
    assert rac("-q", "prune", "m", "out", "--calibration", "t.jsonl", *options).code == 0
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    saved = tmp_path / "out" / "rac" / "recipe.yaml"
    assert main(["-q", "prune", "../m", "../again", "--recipe", str(saved)]) == 0
    assert main(["-q", "run", str(saved), "../run"]) == 0
    for name in ("again", "run"):
        for file in (tmp_path / "out").glob("*.safetensors"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


def test_a_calibration_with_fewer_tokens_than_asked_for_is_noted(rac, tmp_path, checkpoint):
    model = save_tokenizer(shutil.copytree(checkpoint(), tmp_path / "m"))
    (tmp_path / "t.jsonl").write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    out = rac("-q", "prune", model, "out", "--calibration", "t.jsonl", "--tokens", "1k", "--method", "wanda").out
    said = "the calibration holds 40 tokens, fewer than the 1,000 asked for"
    assert f"note    {said}" in out and said in (tmp_path / "out" / "rac" / "report.html").read_text()


def test_prompts_alone_and_traces_of_another_model_are_noted_at_the_start_and_in_the_report(rac, tmp_path, checkpoint):
    model = save_tokenizer(shutil.copytree(checkpoint(), tmp_path / "m"))
    trace = {"prompt_token_ids": list(range(40)), "model_sha256": "f" * 64}
    (tmp_path / "t.jsonl").write_text(json.dumps(trace) + "\n")
    words = ["prune", model, "out", "--calibration", "t.jsonl", "--method", "wanda"]
    outcome = rac(*words, "--dry-run")
    assert "note    no record of the calibration has a completion" in outcome.out
    outcome = rac(*words)
    report = (tmp_path / "out" / "rac" / "report.html").read_text()
    for said in (
        "no record of the calibration has a completion",
        "the traces are of another model (SHA-256 ffffffffffff",
    ):
        assert f"note: {said}" in outcome.err and f"note    {said}" in outcome.out and said in report


def test_pruning_from_python_leaves_the_report_too(tmp_path, checkpoint):
    rac_engine.prune(checkpoint(), tmp_path / "out", PruneSettings(method="magnitude"))
    assert "magnitude pruning" in (tmp_path / "out" / "rac" / "report.html").read_text()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(rac, tmp_path, checkpoint):
    outcome = rac("prune", checkpoint(), "out", "--method", "magnitude", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "method: magnitude" in outcome.out and "21 matrices to prune" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_plan_and_doctor_print_text_and_json(rac, checkpoint):
    assert "Matrices of a layer that share an input" in rac("plan", checkpoint()).out
    assert json.loads(rac("plan", checkpoint(), "--json", "--tokens", "8k").out)["tokens"] == 8000
    assert "native extension" in rac("doctor").out
    assert {"what", "status"} <= set(json.loads(rac("doctor", "--json").out)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped with 2 of 3 layers done")])
def test_a_stopped_job_exits_75_with_the_command_that_goes_on(rac, checkpoint, monkeypatch, error):
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(engine, "prune", stop)
    outcome = rac("prune", checkpoint(), "my out", "--method", "magnitude", "--restart")
    assert outcome.code == 75
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith(f": rac prune {checkpoint()} 'my out' --method magnitude\n")


def test_sigterm_stops_a_job_cleanly_and_the_same_command_ends_it(rac, tmp_path, checkpoint):
    model = checkpoint(num_hidden_layers=24)
    journal = tmp_path / "out.partial" / "rac" / "journal.jsonl"

    def stop_after_two_layers() -> None:
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_after_two_layers, daemon=True)
    stopper.start()
    outcome = rac("prune", model, "out", "--method", "magnitude")
    stopper.join()
    assert outcome.code == 75, outcome.err
    assert outcome.err.endswith(f"rac prune {model} out --method magnitude\n")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    assert rac("prune", model, "out", "--method", "magnitude").code == 0
    assert rac("verify", "out", "--source", model).code == 0
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def interruptible():
    """As at a terminal: a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_in_a_finalizer_is_not_lost(number: signal.Signals) -> None:
    finalized = []

    class Late:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            for _ in range(100):
                finalized.append(str(number))

    with pytest.raises(KeyboardInterrupt), app._terminable():
        del (made := [Late()])[0]
        for _ in range(1000):
            time.sleep(0.001)
        assert not made
    assert len(finalized) == 100
    with app._terminable():  # what has ended by then is not stopped later
        Late().__del__()
    time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_bug_shows_its_traceback_and_an_error_of_the_system_does_not(rac, checkpoint, monkeypatch):
    def fail(error: Exception) -> Outcome:
        def prune(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(engine, "prune", prune)
        return rac("prune", checkpoint(), "out", "--method", "magnitude")

    bug = fail(KeyError("layer"))
    assert bug.code == 1 and "Traceback" in bug.err and bug.err.endswith("rac: failed: KeyError: 'layer'\n")
    system = fail(OSError(errno.EIO, "Input/output error", "model.safetensors"))
    assert system.code == 1 and system.err.count("\n") == 1 and "model.safetensors" in system.err
    memory = fail(MemoryError("no room"))
    assert memory.code == 1 and memory.err.count("\n") == 1 and "out of memory" in memory.err


@pytest.mark.parametrize("words", ["--help", "report --help"])
def test_whoever_closes_our_output_hears_no_complaint(words):
    environment = {**os.environ, "PYTHONPATH": str(Path(rac_engine.__file__).parents[1])}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rac_engine", *words.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert done.stderr == ""


def test_progress_is_silent_when_asked_and_sparse_in_a_log():
    stream = io.StringIO()
    quiet = Console(quiet=True, stream=stream)
    quiet.say("a")
    quiet.progress("b")
    quiet.step(1, 2, "c")
    assert stream.getvalue() == ""
    console = Console(stream=stream)
    console.step(1, 2, "traces")
    for batch in range(1000):
        console.progress(f"batch {batch}")
    assert (
        stream.getvalue().splitlines() == ["[1/2] traces  (0.0 s so far)"] or len(stream.getvalue().splitlines()) == 1
    )


def test_progress_on_a_terminal_redraws_one_line_and_leaves_no_rest():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(stream=stream)
    console.progress("a long line of progress")
    console._shown = 0
    console.progress("short")
    console.say("done")
    assert "\n" not in stream.getvalue().removesuffix("done\n")
    shown = ""
    for part in re.split("\r", stream.getvalue()):
        shown = part + shown[len(part) :]
    assert shown.strip() == "done"
