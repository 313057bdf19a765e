"""Every path in OUT stands in one list, and nowhere else in the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rac_engine
from rac_engine.jobs import layout

HOME = Path(rac_engine.__file__).parent
NAMES = {
    part
    for name, value in vars(layout).items()
    if name.isupper() and name != "NOT_IN_MANIFEST"
    for part in (value, *value.split("/"))
}
"""All names and paths in the list, and the ending of OUT.partial."""
FILES = {name for name in NAMES if "." in name}
"""Those that mean nothing but a file of OUT, wherever they are written."""


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that name a file of OUT (not those of messages and docstrings, which have spaces), or join any name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            for side in (node.left, node.right):
                if isinstance(side, ast.Constant) and side.value in NAMES:
                    yield side.lineno, str(side.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Path", "PurePath"):
            yield from ((a.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant) and a.value in NAMES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if not any(c.isspace() for c in text) and (text.startswith("rac/") or any(name in text for name in FILES)):
                yield node.lineno, text


# A template of the report, and a source that is shown.
ALLOWED = {("report/page.py", "report.html.j2")}


def test_the_list_has_what_it_should() -> None:
    assert {"README.md", "rac", "metrics.jsonl", "eval", "variants", ".partial", "rac/steps.jsonl"} <= NAMES
    assert layout.partial_of(Path("a/b.json")) == Path("a/b.json.partial")
    assert layout.results_of(Path("out"), "dense") == Path("out/rac/eval/dense.json")


@pytest.mark.parametrize("text", ["out / 'eval'", "Path('rac')", "x + '.partial'", "f'{x}.partial'", "f('rac/y')"])
def test_a_path_written_out_is_found(text: str) -> None:
    assert list(literals(ast.parse(text)))


def test_no_path_in_out_is_written_anywhere_else() -> None:
    found = [
        f"{file.relative_to(HOME)}:{line}: {text!r}"
        for file in sorted(HOME.rglob("*.py"))
        if file.name != "layout.py"
        for line, text in literals(ast.parse(file.read_text()))
        if (str(file.relative_to(HOME)), text) not in ALLOWED
    ]
    assert not found, "\n".join(found)
