"""The report: self-contained, escaped, and true to the figures that it was made from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import percent
from rac_engine.engine.card import model_card
from rac_engine.engine.metrics import Metrics, load_metrics
from rac_engine.recipe.settings import Recipe
from rac_engine.report.comparison import comparison, table
from rac_engine.report.figures import _colour, _nice
from rac_engine.report.page import write_report
from tests.engine.outputs import evaluation, metrics_lines, write_lines, write_run

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def _recipe(**changes: object) -> Recipe:
    sections = {
        "model": "/models/abacus",
        "name": "traces-50",
        "trace": {"prompts": "p.jsonl", "tokens": "50k"},
        "evaluate": {"problems": "q.jsonl", "max_new_tokens": 330},
        "compare": [
            {"name": "text-50", "calibration": {"source": "text:english.txt"}},
            {"name": "prompt-50", "calibration": {"part": "prompt"}},
            {"name": "traces-60", "prune": {"sparsity": 0.6}},
        ],
        **changes,
    }
    return Recipe.model_validate(sections)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_run(tmp_path / "out", _recipe())


class _Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def _write(out: Path) -> _Page:
    return _Page(write_report(out).read_text())


def test_the_page_needs_nothing_from_outside_and_runs_no_script(out):
    page = _write(out)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]
    style = re.search(r"<style>(.*?)</style>", write_report(out).read_text(), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_says_the_figures(out):
    page = _write(out)
    rows = {row.name: row for row in comparison(out)}
    assert list(rows) == ["dense", "traces-50", "text-50", "prompt-50", "traces-60"]
    for row in rows.values():
        assert row.name in page.text and row.label in page.text
        assert percent(row.accuracy, strip=False) in page.text
    assert rows["traces-60"].sparsity == pytest.approx(0.6, abs=1e-3)
    assert [row.label for row in rows.values()] == [
        "",
        "traces · sparsegpt",
        "text · sparsegpt",
        "prompt · sparsegpt",
        "traces · sparsegpt",
    ]
    assert "200 problems" in page.text and "49,152 tokens" in page.text
    assert "no fallback was taken" in page.text


def test_heatmaps_have_every_matrix_with_its_value(out):
    page = _write(out)
    titles = [attrs["title"] or "" for tag, attrs in page.tags if tag == "td" and "title" in attrs]
    assert len(titles) == 2 * 6 * 7
    assert "layer 5, mlp.down_proj (192 × 512): sparsity 0.5" in titles
    error = metrics_lines(layers=6)[1]["relative_error"]
    assert f"layer 0, self_attn.q_proj (192 × 192): relative error {error:.6g}" in titles


def test_what_was_held_out_has_heatmaps_of_its_own(out):
    metrics = out / "rac" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines[1:-1]:
        line["held_out_error"] = 2 * line["relative_error"]
    behind = {"type": "block", "layer": 0, "block": 1, "module": "mlp", "relative_error": 0.02, "held_out_error": 0.05}
    layer = {"type": "layer", "layer": 0, "relative_error": 0.02, "held_out_error": 0.05}
    write_lines(metrics, [*lines[:-1], behind, layer, lines[-1]])
    page = _write(out)
    titles = [attrs["title"] or "" for tag, attrs in page.tags if tag == "td" and "title" in attrs]
    assert len(titles) == 4 * 6 * 7 + 2
    error = lines[1]["held_out_error"]
    assert f"layer 0, self_attn.q_proj (192 × 192): held-out error {error:.6g}" in titles
    assert "layer 0, self_attn.q_proj (192 × 192): gap 2" in titles
    assert {"layer 0, behind mlp: 0.02", "layer 0, behind mlp held out: 0.05"} <= {*titles}
    assert load_metrics(out / "rac").gap == pytest.approx(2)


def test_histograms_count_every_answer_and_say_so_in_words(out):
    page = _write(out)
    labels = [attrs["aria-label"] or "" for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labels) == 5
    assert any(label.startswith("text-50: mean") and label.endswith("cut off") for label in labels)
    bars = re.findall(r"tokens: ([<0-9.]+)%</title>", write_report(out).read_text())
    assert sum(float(bar) for bar in bars) > 100  # shares of five models' answers that ended


def test_notes_and_skipped_modules_are_told_with_their_places(out):
    metrics = out / "rac" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[1]["notes"] = lines[2]["notes"] = ["damping raised to 0.1"]
    lines[3].update(skipped="left dense by 'x'", relative_error=None, damping=None, objective=None)
    lines[-1]["notes"] = [f"{lines[1]['name']}: damping raised to 0.1", "the native extension is missing"]
    write_lines(metrics, lines)
    text = _write(out).text
    assert "the native extension is missing" in text
    assert "layer 0 self_attn.q_proj, layer 0 self_attn.k_proj" in text
    assert text.count("damping raised to 0.1") == 1
    assert "left dense by 'x'" in text


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A finished run in which every text that comes from outside is a script."""
    out = write_run(tmp_path / HOSTILE.replace("/", "")[:60], _recipe(), layers=2)
    lines = metrics_lines(layers=2, description=HOSTILE, model={"path": f"/models/{HOSTILE.replace('/', '')}"})
    for line in lines[1:3]:
        line.update(module=HOSTILE, notes=[HOSTILE])
    lines[-1]["notes"] = [HOSTILE]
    write_lines(out / "rac" / "metrics.jsonl", lines)
    result = evaluation(0.5, 100, 0.1)
    for row in result["rows"]:
        row.update(id=HOSTILE, kind=row["kind"] + HOSTILE, answer=HOSTILE, predicted=HOSTILE)
    (out / "rac" / "eval" / "pruned.json").write_text(json.dumps(result))
    (out / "rac" / "eval" / "zz.json").write_text(json.dumps(result))
    write_lines(out / "rac" / "variants" / "zz" / "metrics.jsonl", lines)
    (out / "rac" / "traces").mkdir()
    trace = {"id": [HOSTILE], "text": [HOSTILE], "finish_reason": [HOSTILE], "completion_token_ids": [[1, 2]]}
    pyarrow.parquet.write_table(pyarrow.table(trace), out / "rac" / "traces" / "traces.parquet")
    return out


def test_whatever_comes_from_a_checkpoint_or_trace_is_escaped(hostile):
    page = _write(hostile)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.text.count("<script>") >= 8


@pytest.fixture
def title(tmp_path: Path) -> Callable[..., str]:
    """The title that a page has once headless Chromium has shown it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        assert not os.environ.get("CI"), "no chromium, which .ci/run was to install"
        pytest.skip("no chromium on this machine; Debian has it as `chromium`, and .ci/run installs it")

    def shown(page: Path, *options: str) -> str:
        options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", *options)
        command = [chromium, *options, "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return re.findall("<title>(.*?)</title>", done.stdout)[0]

    return shown


def test_a_script_in_a_trace_does_not_run_in_a_browser(hostile, title, tmp_path):
    """Headless Chromium shows the page with its own title; the same text unescaped changes it, so it would show."""
    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><title>mine</title><p>{HOSTILE}</p>")
    assert title(control) == "owned"
    assert title(write_report(hostile)).endswith("pruned · RAC Engine")


FRAMES = """<!doctype html><title></title>
<iframe style="width:390px;height:6000px"></iframe><iframe style="width:1100px;height:6000px"></iframe>
<script>
const found = [...document.querySelectorAll("iframe")].map(frame => new Promise(done => {
  const look = frames => {
    const page = frame.contentDocument, box = x => x.getBoundingClientRect();
    const seen = x => x.checkVisibility({contentVisibilityAuto: true});
    const all = name => [...page.querySelectorAll(name)].filter(seen);
    const figures = all(".maps figure");
    const hidden = all(".scroll").filter(x => x.scrollWidth > x.clientWidth);
    const found = {
      beyond: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      heat: hidden.filter(x => x.querySelector(".heat")).length,
      under: figures.filter(x => box(x.querySelector("figcaption")).bottom > box(x.querySelector("table")).top).length,
      wide: all(".times th, .times td").filter(x => x.scrollWidth > x.clientWidth).length,
      out: all(".cut span").filter(x => box(x).right > box(page.querySelector("main")).right).length,
      unshaded: hidden.filter(x => frame.contentWindow.getComputedStyle(x, "::after").opacity !== "1").length,
      shaded: all(".scroll").filter(x => !hidden.includes(x))
        .filter(x => frame.contentWindow.getComputedStyle(x, "::after").opacity !== "0").length,
      scrolling: hidden.length > 0,
    };
    // Shades follow scroll timelines, which on a busy machine have no value yet at the load.
    if (frames && found.unshaded + found.shaded) setTimeout(look, 20, frames - 1);
    else done(found);
  };
  frame.onload = () => look(30);
  frame.src = "PAGE";
}));
Promise.all(found).then(all => { document.title = JSON.stringify(all); });
</script>"""


def test_nothing_is_cut_on_a_telephone_and_what_scrolls_shows_it(out, title, tmp_path):
    metrics = out / "rac" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1]["memory"] = {"baseline": 1, "host_planned": 3 << 30, "host_measured": 5 << 30}  # the longest label
    lines[-1]["plan"] = {"host_limit": None}
    write_lines(metrics, lines)
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES.replace("PAGE", write_report(out).as_uri()))
    size = ("--window-size=1600,1000", "--virtual-time-budget=4000", "--allow-file-access-from-files")
    narrow, wide = json.loads(title(frames, *size))
    fine = {"beyond": 0, "heat": 0, "under": 0, "wide": 0, "out": 0, "unshaded": 0, "shaded": 0}
    assert narrow == {**fine, "scrolling": True}
    assert wide == {**fine, "scrolling": False}


def test_a_job_without_evaluation_still_has_its_page(tmp_path):
    lines = metrics_lines(calibration=None)
    for line in lines[1:-1]:
        line.update(objective=None, relative_error=None, damping=None, tokens=None)
    write_lines(tmp_path / "rac" / "metrics.jsonl", lines)
    text = _write(tmp_path).text
    assert "without calibration" in text and "How it compares" not in text


def test_memory_and_the_timeline_are_shown(tmp_path):
    lines = metrics_lines()
    lines[-1]["memory"] = {"baseline": 1, "host_planned": 3 << 30, "host_measured": 5 << 29}
    lines[-1]["timeline"] = [
        {"lane": "read", "layer": 0, "start": 0.0, "end": 1.0, "busy": 1.0},
        {"lane": "compute", "layer": 0, "start": 1.0, "end": 4.0, "busy": 3.0},
        {"lane": "read", "layer": 1, "start": 1.0, "end": 2.0, "busy": 1.0},
    ]
    write_lines(tmp_path / "rac" / "metrics.jsonl", lines)
    page = _write(tmp_path)
    assert "planned 3 GiB" in page.text and "measured 2.5 GiB" in page.text
    assert "without a limit" not in page.text
    assert "From top to bottom: read, compute" in page.text
    own = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("height") == "4"]
    spans = [[float(attrs[key] or 0) for key in ("y", "x", "width")] for attrs in own]
    assert [1, 0, 25] in spans and [1, 25, 25] in spans and [7, 25, 75] in spans
    lines[-1]["memory"]["host_planned"] = 1 << 30  # fewer than were measured
    for limit, said in ((None, True), (4 << 30, False)):
        lines[-1]["plan"] = {"host_limit": limit}
        write_lines(tmp_path / "rac" / "metrics.jsonl", lines)
        assert ("without a limit the heap keeps what was freed" in _write(tmp_path).text) == said
    for nonsense in ("x", [1], [{"lane": "read"}], None):
        lines[-1].update(timeline=nonsense, memory=nonsense, plan=nonsense)
        write_lines(tmp_path / "rac" / "metrics.jsonl", lines)
        assert "From top to bottom" not in _write(tmp_path).text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1"),
        ("metrics.jsonl", "nonsense", "metrics.jsonl:1"),
        ("metrics.jsonl", '{"type": "run", "type": "end"}\n', "metrics.jsonl:1.*twice"),
        ("metrics.jsonl", '{"type": "end"}\n', "nothing of the run"),
        ("metrics.jsonl", '{"type": "run", "model": "x"}\n', "metrics.jsonl:1.*model"),
        ("metrics.jsonl", '{"type": "run", "settings": []}\n', "metrics.jsonl:1.*settings"),
        ("metrics.jsonl", '{"type": "run", "settings": {"pattern": 5}}\n', "metrics.jsonl:1.*pattern"),
        ("metrics.jsonl", '{"type": "matrix", "layer": 0, "module": "m", "columns": 4}\n', "metrics.jsonl:1.*name"),
        (
            "metrics.jsonl",
            '{"type": "matrix", "layer": 0, "module": "m", "name": "n", "rows": "x", "columns": 4}\n',
            "metrics.jsonl:1.*rows",
        ),
        ("eval/dense.json", '{"summary": {}}', "not a result of `rac eval`"),
        ("traces/a.parquet", "PAR1 not really PAR1", "a.parquet: not a file of traces"),
        ("eval/dense.json", "{", "not valid JSON"),
        ("eval/dense.json", '{"summary": {}, "rows": []}', "not a result of `rac eval`"),
    ],
)
def test_a_broken_output_is_named(out, file, content, said):
    (out / "rac" / "traces").mkdir()
    (out / "rac" / file).write_text(content)
    with pytest.raises(BadInput, match=said):
        write_report(out)
    assert not (out / "rac" / "report.html").exists()


def test_traces_are_shown_only_where_they_calibrated_the_model(hostile):
    assert "What it was calibrated on" in _write(hostile).text
    for calibration in (None, metrics_lines()[0]["calibration"] | {"source": "text:english.txt"}):
        write_lines(hostile / "rac" / "metrics.jsonl", metrics_lines(layers=2, calibration=calibration))
        assert "What it was calibrated on" not in _write(hostile).text


def test_a_folder_that_is_no_output_is_refused(tmp_path):
    with pytest.raises(BadInput, match="output folder of"):
        write_report(tmp_path)


def test_the_table_is_aligned(out):
    lines = table(comparison(out)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == [
        "name",
        "calibration",
        "·",
        "method",
        "sparsity",
        "accuracy",
        "[95%",
        "interval]",
        "mean",
        "decode",
        "p95",
        "decode",
        "cut",
        "off",
    ]


@pytest.mark.parametrize("share", [i / 50 for i in range(51)])
@pytest.mark.parametrize("scale", [("#eef4fa", "#5fa1cd", "#08365c"), ("#fdf5e8", "#e59a3f", "#5e2708")])
def test_ink_reads_on_every_colour(scale, share):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(luminance(colour) for colour in _colour(scale, share))
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize(("step", "nice"), [(0.3, 1), (1, 1), (1.2, 2), (3, 5), (7, 10), (42, 50), (680, 1000)])
def test_steps_are_round_numbers(step, nice):
    assert _nice(step) == nice


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (0, "0%"), (1, "100%"), (0.5, "50%"), (0.1234, "12.3%"), (1e-6, "<0.1%"), (0.99999, ">99.9%")],
)
def test_shares_are_never_rounded_to_nothing_or_all(share, text):
    assert percent(share) == text


def test_the_card_has_the_figures_and_survives_odd_names(out):
    lines = metrics_lines(model={"path": "/models/a|b `c`\nd", "parameters": 2_300_000})
    metrics = Metrics(lines[0], lines[1:-1])
    rows = [row.__dict__ for row in comparison(out)]
    card = model_card({**metrics.run, "matrices": metrics.matrices, "end": {"notes": ["x|y"]}, "evaluation": rows})
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| traces-50 | traces | sparsegpt | 50% | " in card and "| text-50 | text | sparsegpt | 50% | " in card
    assert f"{metrics.zeros / 2_300_000:.1%}" in card
    assert "# a|b `c` d, pruned (50% unstructured)" in card
