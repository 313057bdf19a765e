"""Runs what the documentation shows: `python -m tests.docs.pages FOLDER` prints a JSON line for each thing that failed.

- Fenced `bash` and `console` blocks: their `rac` commands run, with small budgets, in a folder in which all that
  the pages name (MODEL, TRACES, P.jsonl, examples/abacus …) is there and tiny. `make` and `pip` are not run; of `make`
  the target has to exist.
- A block whose first line is `# not run by the tests: REASON` is only read: `rac` has to take its options, and scripts
  have to exist and know theirs.
- Fenced `python` blocks run, a page's in one namespace. Fenced `yaml` blocks are recipes, or sections of one.
- In the text, `rac …` between backquotes runs if it is a whole command; else its options have to exist.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
NOT_RUN = re.compile(r"# not run by the tests: \S")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(rac\s[^`]+)`")
SMALL = {"--tokens": "300", "--max-new-tokens": "8", "--limit": "3", "--sequence-length": "32"}
OUTPUTS = {"run": "out", "trace": "out", "prune": "out", "eval": "out", "mask": "out", "pack": "out", "unpack": "out"}


@dataclass(frozen=True)
class Snippet:
    """A block of a page, or a command in its text; `kind` is the fence's language, or "inline"."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def is_run(self) -> bool:
        return not NOT_RUN.match(self.text)


def snippets(page: str, text: str) -> list[Snippet]:
    """All there is to run or to read in a page, in its order."""
    found = [
        Snippet(page, text[: m.start()].count("\n") + 1, m[2], textwrap.dedent(m[3])) for m in FENCE.finditer(text)
    ]
    prose = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    for m in INLINE.finditer(prose):
        found.append(Snippet(page, prose[: m.start()].count("\n") + 1, "inline", " ".join(m[1].split())))
    return sorted(found, key=lambda snippet: snippet.line)


def commands(snippet: Snippet) -> list[list[str]]:
    """The command lines of a block, as words, without comments; in a console those behind `$ `."""
    lines = snippet.text.replace("\\\n", " ").splitlines()
    if snippet.kind == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def smaller(words: list[str]) -> list[str]:
    """A `rac` command with budgets that take no time. A plan costs nothing: its figures stay."""
    if words[1:2] == ["plan"]:
        return words
    made = [SMALL.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[1:2] in (["trace"], ["eval"]) and "--max-new-tokens" not in made and not made[-1].startswith("--help"):
        made += ["--max-new-tokens", SMALL["--max-new-tokens"]]
    return made


def options_of(command: str) -> set[str]:
    """All options of a `rac` command."""
    from rac_engine.cli.app import _parser

    parser: Any = _parser([command])
    (group,) = (action for action in parser._actions if action.choices and command in action.choices)
    return {option for action in group.choices[command]._actions for option in action.option_strings}


def check_words(words: list[str]) -> None:
    """Raise AssertionError for a command that names a subcommand, an option, a target or a script that is not there."""
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "rac":
        known = options_of(words[1]) if not words[1].startswith("-") and words[1] != "COMMAND" else options | {"--help"}
        assert options <= known, f"rac {words[1]} knows no {', '.join(sorted(options - known))}"
    elif words[0] == "make":
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in words[1:] if "=" not in word]
        assert set(wanted) <= targets, f"no such target: {wanted}"
    elif script := next((word for word in words if word.endswith(".py")), None):
        assert (ROOT / script).is_file(), f"{script} is not there"
        source = (ROOT / script).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        missing = [option for option in options if f'"{option}"' not in source]
        assert not missing, f"{script} knows no {', '.join(missing)}"


def run_rac(words: list[str]) -> None:
    """Run a `rac` command in this process; raise AssertionError unless it ends with 0."""
    from rac_engine.cli.app import _parser, main

    words = smaller(words)
    with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        asked = _parser(words[1:]).parse_args(words[1:])
        out = Path(getattr(asked, OUTPUTS[asked.command]))  # what an earlier command of the page has made
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = main(words[1:])
    assert code == 0, f"{shlex.join(words)}: exit code {code}\n{said.getvalue()}{complained.getvalue()}"


def is_whole(words: list[str]) -> bool:
    """Whether `rac` could run this."""
    from rac_engine.cli.app import _parser

    if any(word.startswith("--help") for word in words) or words[1].startswith("-"):
        return "COMMAND" not in words
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _parser(words[1:]).parse_args(words[1:])
    except Exception:
        return False
    return True


def run_recipe(text: str) -> None:
    """Load a recipe or a section of one; a whole one is left as recipe.yaml, with small budgets."""
    from rac_engine.recipe import load_recipe

    text = re.sub(r"\b(tokens|max_new_tokens|limit|sequence_length): *\w+", _small_field, text)
    whole = re.search(r"^model:", text, re.MULTILINE)
    file = Path("recipe.yaml" if whole else "section.yaml")
    file.write_text(text if whole else f"model: MODEL\n{text}")
    load_recipe(file)


def _small_field(found: re.Match[str]) -> str:
    return f"{found[1]}: {SMALL['--' + found[1].replace('_', '-')]}"


def run(snippet: Snippet, names: dict[str, Any]) -> None:
    """Run or read a snippet; `names` is the namespace of the page's python blocks."""
    if snippet.kind == "python" and snippet.is_run:
        exec(compile(snippet.text, f"{snippet.page}:{snippet.line}", "exec", dont_inherit=True), names)
    elif snippet.kind == "yaml":
        run_recipe(snippet.text)
    elif snippet.kind in ("bash", "console", "inline"):
        for words in commands(snippet):
            check_words(words) if len(words) > 1 else None
            if words[0] == "rac" and snippet.is_run and (snippet.kind != "inline" or is_whole(words)):
                run_rac(words)


def prepare(world: Path) -> None:
    """Make everything that the pages name, tiny, in the new folder `world`."""
    from tests import tiny

    model = tiny.save(world / "MODEL", "llama")  # whose tokenizer transformers takes as it is saved
    tiny.save_tokenizer(model)
    problems = world / "examples" / "problems"
    problems.mkdir(parents=True)
    shutil.copytree(model, world / "examples" / "abacus")
    asked = [{"problem": f"w{number} w{number + 1}", "answer": f"{number}"} for number in range(5, 25)]
    lines = "".join(json.dumps(each) + "\n" for each in asked)
    for file in (world / "P.jsonl", world / "Q.jsonl", problems / "calibration.jsonl", problems / "evaluation.jsonl"):
        file.write_text(lines)
    for file in (world / "TEXT", world / "README.md", problems / "english.txt"):
        file.write_text("w5 w6 w7 w8 " * 100)
    small = re.sub(
        r"\b(tokens|max_new_tokens|limit|sequence_length): *\w+",
        _small_field,
        (ROOT / "examples/demo.yaml").read_text(),
    )
    head, *variants = small.split("  - name:")
    (world / "examples" / "demo.yaml").write_text(head + "  - name:".join(["", *variants[:3]]))
    (world / "RECIPE.yaml").write_text("model: MODEL\nprune: {method: magnitude}\n")
    deepseek_r1(world / "DeepSeek-R1")
    os.chdir(world)
    run_rac(shlex.split("rac trace MODEL --prompts P.jsonl --tokens 1M --out TRACES"))
    run_rac(shlex.split("rac prune MODEL OUT --method magnitude"))
    run_rac(shlex.split("rac pack OUT PACKED"))
    shutil.copytree(model, world / "TRAINED")  # as if it had been trained on from OUT


def deepseek_r1(folder: Path) -> None:
    """The config.json of DeepSeek-R1; `rac plan` needs no more."""
    folder.mkdir()
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))


def failures(page: str, world: Path, work: Path) -> Iterator[str]:
    """What of a page does not work, in words."""
    shutil.copytree(world, work)
    os.chdir(work)
    names: dict[str, Any] = {"__name__": "documentation"}
    for snippet in snippets(page, (ROOT / page).read_text()):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run(snippet, names)
        except BaseException as error:
            where = f"{snippet.page}:{snippet.line}: {snippet.text.splitlines()[0]}"
            yield f"{where}\n{error if isinstance(error, AssertionError) else traceback.format_exc()}"


def main(folder: str) -> None:
    world = Path(folder).resolve() / "world"
    prepare(world)
    for number, page in enumerate(PAGES):
        for failure in failures(page, world, world.with_name(f"page-{number}")):
            print(json.dumps([page, failure]), flush=True)
        print(json.dumps([page, None]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
