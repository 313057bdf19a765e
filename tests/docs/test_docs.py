"""What README.md and docs/ show works: commands, Python, recipes, links, and the page that is generated."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rac_kernels
from rac_engine.cli.app import main
from rac_engine.models.families import known_families
from rac_engine.solve.methods import method_names
from tests.docs.pages import FENCE, PAGES, ROOT, Snippet, check_words, commands, deepseek_r1, smaller, snippets
from tests.test_layout import HOUSES

LINKED = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "examples/abacus/README.md")


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What failed, by page; a page that is not in it was not gone through. All run in one process of their own."""
    work = tmp_path_factory.mktemp("docs")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.pages", str(work)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        page, failure = json.loads(line)
        found.setdefault(page, []).extend([] if failure is None else [failure])
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_works(failed: dict[str, list[str]], page: str) -> None:
    assert not failed[page], "\n\n".join(failed[page])


def test_a_page_is_read_whole() -> None:
    text = (
        "Say `rac plan\nMODEL`.\n\n```bash\nrac trace MODEL \\\n  --out T  # why\nmake test\n```\n\n"
        "```console\n$ rac doctor\nfine\n```\n\n```bash\n# not run by the tests: too slow\nrac run R OUT\n```\n"
    )
    found = snippets("page.md", text)
    assert [(snippet.kind, snippet.line) for snippet in found] == [
        ("inline", 1), ("bash", 4), ("console", 10), ("bash", 15)
    ]  # fmt: skip
    said = [commands(snippet) for snippet in found]
    assert said[0] == [["rac", "plan", "MODEL"]]
    assert said[1] == [["rac", "trace", "MODEL", "--out", "T"], ["make", "test"]]
    assert said[2] == [["rac", "doctor"]] and said[3] == [["rac", "run", "R", "OUT"]]
    assert [snippet.is_run for snippet in found] == [True, True, True, False]
    assert smaller(["rac", "trace", "M", "--tokens", "1M"])[4:] == ["300", "--max-new-tokens", "8"]


@pytest.mark.parametrize(
    "wrong",
    ["rac prune M OUT --no-such-option", "rac plan M --sparsities 1", "make nothing", "python benchmarks/none.py"],
)
def test_what_is_not_there_is_found(wrong: str) -> None:
    (words,) = commands(Snippet("page.md", 1, "bash", wrong))
    with pytest.raises(AssertionError):
        check_words(words)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "benchmarks/README.md", "examples/abacus/README.md"])
def test_commands_that_take_long_exist(page: str) -> None:
    """These pages are not run: what they show are tests, benchmarks and training."""
    for snippet in snippets(page, (ROOT / page).read_text()):
        for words in commands(snippet) if snippet.kind in ("bash", "console") else []:
            check_words([word for word in words if "=" not in word or word.startswith("-")])


def test_the_recipes_page_is_what_the_models_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))["page"]()
    assert (ROOT / "docs" / "recipes.md").read_text() == made, "run python docs/make_recipes.py"


def test_the_plan_of_deepseek_r1_is_what_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    section = page.partition("### DeepSeek-R1")[2].partition("\n## ")[0]
    words = next(commands(s)[0] for s in snippets("families.md", section) if s.kind == "bash")
    shown = next(s.text for s in snippets("families.md", section) if s.kind == "text")
    deepseek_r1(tmp_path / "DeepSeek-R1")
    words[words.index("DeepSeek-R1")] = str(tmp_path / "DeepSeek-R1")
    plans = []
    for changes in ((), ("--device-memory", "48GiB"), ("--method", "admm")):
        assert main([*words[1:], *changes]) == 0
        plans.append([" ".join(line.split()) for line in capsys.readouterr().out.splitlines()])
    for line in shown.splitlines():
        assert " ".join(line.split()) in plans[0]
    said = " ".join(section.split())
    for plan, passes in zip(plans, ("all: 2 passes", "128 at once: 6 passes", "32 at once: 18 passes"), strict=True):
        assert any(passes in line for line in plan), passes
    for number in (0, 2):
        (time,) = (line for line in plans[number] if line.startswith("Time: "))
        if not torch.cuda.is_available():  # whose peaks would count
            assert time.removeprefix("Time: ").partition(",")[0] in said, time
    assert "63.4 GiB at the peak" in said and "peak 63.4 GiB of 80 GiB" in plans[2]


def test_every_key_is_described() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    assert [key for key, said in rows if not said.partition("see [")[0].strip()] == []


def test_pictures_are_small() -> None:
    for file in (ROOT / "docs").glob("*.png"):
        assert file.stat().st_size <= 300 << 10, file.name


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    text = FENCE.sub("", text)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\s*\n\s*", " ", text)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


def test_every_public_kernel_is_described() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    missing = [name for name in rac_kernels.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_every_family_and_method_has_its_row() -> None:
    families, methods = ((ROOT / "docs" / page).read_text() for page in ("families.md", "methods.md"))
    assert [name for name in known_families() if f"| `{name}` |" not in families] == []
    assert [name for name in method_names() if not re.search(rf"^\| `{name}`", methods, re.MULTILINE)] == []


def test_every_room_is_on_the_plan_in_its_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for rooms in HOUSES.values():
        rows = [room for room in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) if room in rooms]
        assert rows == list(rooms)
