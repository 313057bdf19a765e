"""Recipes: what is accepted, what the defaults are, and that every mistake is one line that says where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_engine.base.errors import BadInput
from rac_engine.recipe.fields import names_matrix, pruning_pattern
from rac_engine.recipe.files import build, dump, load_recipe
from rac_engine.recipe.settings import EvalSettings, PruneSettings, Recipe, TraceSettings

FULL = """\
model: model
name: traces-50
trace:
  prompts: prompts.jsonl
  tokens: 50k
calibration:
  part: completion
prune:
  pattern: 2:4
  damping: 1e-2
  dense: [lm_head, 'model\\.layers\\.0\\..*']
evaluate:
  problems: /data/problems.jsonl
  max_new_tokens: 8k
compare:
- name: text
  calibration: {source: text:english.txt}
- name: more
  prune: {sparsity: 0.6}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_a_recipe_resolves_sizes_defaults_and_paths_relative_to_itself(write, tmp_path):
    recipe = load_recipe(write(FULL))
    assert recipe.model == tmp_path / "model"
    assert recipe.trace == TraceSettings(prompts=tmp_path / "prompts.jsonl", tokens=50_000)
    assert recipe.trace.max_new_tokens == 8192 and recipe.trace.temperature == 0.6
    assert recipe.prune.pattern == "2:4" and recipe.prune.damping == 0.01  # YAML 1.1 would read 124 and text
    assert recipe.evaluate and recipe.evaluate.problems == Path("/data/problems.jsonl")
    assert recipe.evaluate.max_new_tokens == 8000
    assert recipe.compare[0].calibration and recipe.compare[0].calibration.source == f"text:{tmp_path}/english.txt"


def test_the_dump_of_a_recipe_loads_as_the_same_recipe_anywhere(write, tmp_path):
    recipe = load_recipe(write(FULL))
    elsewhere = tmp_path / "elsewhere" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(dump(recipe))
    assert load_recipe(elsewhere) == recipe
    assert "block_size: 128" in dump(recipe)


def test_a_variant_changes_only_what_it_names(write):
    recipe = load_recipe(write(FULL))
    text, more = recipe.compare
    assert text.settings(recipe.prune) == recipe.prune
    changed = more.settings(recipe.prune)
    assert (changed.sparsity, changed.pattern) == (0.6, None)
    assert changed.dense == recipe.prune.dense
    assert load_recipe(write(dump(recipe))).compare[1].settings(recipe.prune) == changed


@pytest.mark.parametrize("pattern", ["1:4", "1:3", "4:8"])
def test_a_pattern_sets_the_sparsity(pattern):
    n, m = pruning_pattern(pattern)
    assert PruneSettings(pattern=pattern).sparsity == 1 - n / m


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("model: m\nprune:\n  sparsity: 1.5\n", "3:13", "prune.sparsity: should be less than 1, got 1.5"),
        ("model: m\nprune:\n  sparsity: .nan\n", "3:13", "should be a number"),
        ("model: m\nprune:\n  patern: 2:4\n", "3:3", "did you mean 'pattern'?"),
        (
            "model: m\nprune: {method: rac}\n",
            "2:17",
            "prune.method: 'rac' is called admm now (rac is the",
        ),
        ("model: m\nprune: {method: spargpt}\n", "2:17", "'spargpt' is not known; did you mean 'sparsegpt'?"),
        ("model: m\nprune:\n  pattern: 5:4\n", "3:12", "0 < N < M"),
        ("model: m\nprune:\n  pattern: 4:4\n", "3:12", "0 < N < M"),
        ("model: m\nprune:\n  pattern: 0:4\n", "3:12", "0 < N < M"),
        ("model: m\nprune:\n  pattern: '2:4 '\n", "3:12", "not N:M"),
        ("model: m\nprune:\n  pattern: 1:4\n  sparsity: 0.5\n", "3:3", "pattern 1:4 means sparsity 0.75"),
        ("model: m\nprune: {dense: ['(']}\n", "2:17", "regular expression"),
        ("model: m\nprune: {block_size: 8x}\n", "2:21", "is not a size"),
        ("model: m\nprune: {block_size: true}\n", "2:21", "integer"),
        ("model: m\nprune: 3\n", "2:8", "mapping"),
        ("prune: {}\n", "1:1", "model: is missing"),
        ("model: m\nmodel: n\n", "2:1", "given twice (first on line 1)"),
        ("model: [m\n", "2:1", "not valid YAML"),
        ("model: m\nx: !!python/object/apply:os.system [ls]\n", "2:4", "not valid YAML"),
        ("model: m\n? [a]\n: b\n", "2:3", "plain text"),
        ("model: m\ncompare:\n- {name: dense}\n", "1:1", "'dense' is taken"),
        ("model: m\ncompare:\n- {name: ../x}\n", "3:10", "compare.0.name"),
        ("- a\n", "1:1", "a recipe is a mapping"),
        ("", "1:1", "a recipe is a mapping"),
        ("model: m\ncalibration: {source: 'text:'}\n", "2:23", "text:FILE"),
        ("model: ''\n", "1:8", "path"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(write, text, place, said):
    path = write(text)
    with pytest.raises(BadInput) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{place}: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe\x00", b"[" * 100_000, b"a: &a [*a]", b"a: " + b"9" * 5000, b" " * (2 << 20)]
)
def test_no_file_is_too_strange_for_one_line(write, raw):
    with pytest.raises(BadInput) as caught:
        load_recipe(write(raw))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(BadInput, match=str(path)):
            load_recipe(path)


def test_options_of_a_command_line_are_named_as_the_caller_says():
    with pytest.raises(BadInput, match=r"^--block-size: should be greater than 0, got 0$"):
        build(PruneSettings, {"block_size": 0}, lambda field: "--" + field.replace("_", "-"))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_recipe_or_a_one_line_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_bytes(raw)
    try:
        assert isinstance(load_recipe(path), Recipe)
    except BadInput as error:
        assert "\n" not in str(error)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*Recipe.model_fields, *PruneSettings.model_fields]), inner, max_size=4)
        ),
    )
)
def test_any_structure_is_a_recipe_or_a_one_line_error(tmp_path_factory, value):
    import yaml

    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(yaml.safe_dump(value))
    try:
        assert isinstance(load_recipe(path), Recipe)
    except BadInput as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"modules": "mlp.*"}, "give a sparsity, a pattern or a damping"),
        ({"modules": "mlp.*", "sparsity": 0.3, "pattern": "2:4"}, "a pattern sets the sparsity"),
        ({"modules": "(", "sparsity": 0.3}, "not a valid regular expression"),
        ({"modules": [], "sparsity": 0.3}, "at least 1"),
        ({"modules": "mlp.*", "sparsity": 1.0}, "less than 1"),
        ({"modules": "mlp.*", "sparsety": 0.3}, "did you mean 'sparsity'"),
    ],
)
def test_an_override_that_means_nothing_is_one_line(override, said):
    with pytest.raises(BadInput, match=said) as caught:
        build(PruneSettings, {"overrides": [override]})
    assert str(caught.value).startswith("overrides.0")


def test_of_several_overrides_the_last_wins():
    settings = build(
        PruneSettings,
        {
            "pattern": "2:4",
            "overrides": [
                {"modules": "a.*", "sparsity": 0.3, "damping": 0.5},
                {"modules": ["x", "ab"], "pattern": "1:4"},
            ],
        },
    )
    assert (settings.of("b").pattern, settings.of("b").sparsity) == ("2:4", 0.5)
    assert (settings.of("a").pattern, settings.of("a").sparsity) == (None, 0.3)
    assert (settings.of("ab").pattern, settings.of("ab").sparsity, settings.of("ab").damping) == ("1:4", 0.75, 0.5)


def test_arguments_of_a_template_are_a_mapping_or_name_and_value():
    told = {"thinking": False, "effort": "high", "budget": 512, "share": 0.5}
    words = ["thinking=false", "effort=high", "budget=512", "share=0.5"]
    for said in (told, words):
        built = build(TraceSettings, {"prompts": "p", "template_arguments": said}, str)
        assert built.template_arguments == told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": [1]}, "x should be true or false"),
        ({"x": None}, "x should be true or false"),
        (["x=NaN"], "x should be true or false"),
        ({"x": float("inf")}, "x should be true or false"),
        ({"a b": 1}, "'a b' is no name"),
        ({"": 1}, "'' is no name"),
        (["x"], "'x' is not NAME=VALUE"),
        (3, "should be"),
    ],
)
def test_arguments_that_no_template_takes_are_one_line(arguments, said):
    with pytest.raises(BadInput, match=said) as caught:
        build(TraceSettings, {"prompts": "p", "template_arguments": arguments}, str)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "fits"),
    [
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("model.layers.1.mlp.down_proj", True),
        ("*.down_proj", True),
        ("*down*", True),
        ("mlp.*", True),
        ("model.layers.*.mlp.*", True),
        ("model.layers.[01].*", True),
        ("down_*", True),
        (r"model\.layers\.1\..*", True),
        ("(gate|down)_proj", True),
        ("down", False),
        ("proj", False),
        ("*.down", False),
        ("model.layers.[23].*", False),
        ("layers.1.mlp.down_proj", False),
        ("self_attn.*", False),
    ],
)
def test_a_matrix_is_named_as_it_is_printed_by_a_glob_or_by_an_expression(entry, fits):
    settings = build(PruneSettings, {"dense": [entry], "overrides": [{"modules": entry, "sparsity": 0.1}]})
    names = ("model.layers.1.mlp.down_proj", "mlp.down_proj")
    assert names_matrix(settings.dense[0], *names) is fits
    assert settings.overridden(*names) is fits


@pytest.mark.parametrize("field", ["problems", "model"])
def test_a_path_that_is_no_text_is_refused(field):
    with pytest.raises(BadInput, match="not UTF-8"):
        if field == "problems":
            build(EvalSettings, {"problems": Path("p\udcff")}, str)
        else:
            build(Recipe, {"model": "p\udcff"}, str)
