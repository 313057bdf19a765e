"""Verification finds what is wrong with an output, and nothing wrong with a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.reader import INDEX, Checkpoint
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import _fits, verify
from rac_engine.jobs.publish import write_manifest
from rac_engine.recipe.settings import Override, PruneSettings
from tests import tiny

PRUNED = "model.layers.1.mlp.up_proj.weight"
UNTOUCHED = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory) -> Path:
    settings = PruneSettings(method="magnitude", pattern="2:4", dense=["model.layers.0.mlp.down_proj"])
    return prune(checkpoint(), tmp_path_factory.mktemp("pruned") / "out", settings).out


@pytest.fixture
def out(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def _edit(out: Path, name: str, change: Callable[[torch.Tensor], object], sign: bool = True) -> None:
    """Change a tensor in its file, in a folder whose manifest is made to agree if `sign`."""
    info = Checkpoint.open(out).tensors[name]
    tensor = Checkpoint.open(out).read(name)
    change(tensor)
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    if sign:
        write_manifest(out)


def test_a_good_output_is_whole(out, checkpoint):
    result = verify(out, checkpoint())
    assert result.problems == []
    assert result.matrices == 3 * 7 - 1
    assert result.zeros == result.weights / 2
    tensors = Checkpoint.open(out).tensors
    assert (result.tensors, result.untouched) == (len(tensors), len(tensors) - result.matrices)
    assert "whole" in result.summary() and "bit-equal" in result.summary()
    assert json.loads(result.to_json())["problems"] == []


def test_progress_says_what_is_done_and_how_far_it_is(out, checkpoint):
    said: list[str] = []
    verify(out, checkpoint(), said.append)
    assert said[0].startswith("reading back: checksums of ") and "reading back: tensor 3 of 38" in said
    assert "zeros of the source: matrix 20 of 20" in said and "comparing with the source: tensor 1 of 38" in said
    assert not any(line.startswith("model.") for line in said)


def test_a_flipped_bit_is_found_by_its_checksum(out):
    _edit(out, UNTOUCHED, lambda t: t.view(torch.int16)[0].bitwise_xor_(1), sign=False)
    shard, tensor = verify(out).problems
    assert "SHA-256 is not the manifest's" in shard and shard.startswith("model-")
    assert "SHA-256 is not the journal's" in tensor and tensor.startswith(UNTOUCHED)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (UNTOUCHED, lambda t: t.fill_(torch.nan), "holds NaN or Inf"),
        (PRUNED, lambda t: t.masked_fill_(t == 0, -0.0), "−0.0 among its zeros"),
        (PRUNED, lambda t: t[0].fill_(1), "breaks the pattern 2:4"),
        (PRUNED, lambda t: t[0].fill_(1), "zeros, too few"),
        (PRUNED, lambda t: t[0].zero_(), "metrics.jsonl says"),
    ],
)
def test_a_wrong_tensor_is_found_though_the_manifest_agrees(out, name, change, said):
    _edit(out, name, change)
    assert any(name in problem and said in problem for problem in verify(out).problems)


def test_more_zeros_than_were_asked_for_are_found_though_all_files_agree(out, checkpoint):
    _edit(out, PRUNED, lambda t: t[::2].zero_())
    info = Checkpoint.open(out).read(PRUNED)

    def agree(line: dict) -> None:
        if line.get("name") == PRUNED:
            line["zeros"] = int((info == 0).sum())

    (out / "rac" / "journal.jsonl").unlink()
    _metrics(out, agree)
    (problem,) = verify(out).problems
    assert problem.startswith(f"{PRUNED}: 75") and "zeros, too many" in problem

    def excuse(line: dict) -> None:
        if line.get("name") == PRUNED:
            line["zeros_before"] = info.numel() // 2

    _metrics(out, excuse)
    assert verify(out).problems == []
    (problem,) = verify(out, checkpoint()).problems
    assert problem.startswith(f"{PRUNED}: ") and problem.endswith("zeros in the source, metrics.jsonl says 1,920")


@pytest.mark.parametrize(
    ("why", "code"),
    [
        ("it looked important", "important"),
        ("no calibration token reached it", None),
        ("sparsity 0", "sparsity_zero"),
        ("holds NaN or Inf", "not_finite"),
        ("whatever it says", "sparsity_zero"),
    ],
)
def test_only_reasons_that_there_are_leave_a_matrix_dense(out, why, code):
    def leave(line: dict) -> None:
        if line.get("name") == PRUNED:
            line |= {"skipped": why, "skipped_code": code}

    _metrics(out, leave)
    (problem,) = verify(out).problems
    assert problem == f"{PRUNED}: left dense for a reason that the recipe does not give: {why}"


@pytest.mark.parametrize("code", ["no_token", "beyond_fp32", "few_tokens"])
def test_reasons_go_by_their_codes_and_not_by_their_words(out, code):
    def leave(line: dict) -> None:
        if line.get("name") == PRUNED:
            line |= {"skipped": "in other words", "skipped_code": code}

    _metrics(out, leave)
    assert verify(out).problems == []


def test_a_matrix_that_the_recipe_names_needs_a_reason_that_there_is(out):
    def leave(line: dict) -> None:
        if line.get("skipped"):
            line["skipped_code"] = "important"

    _metrics(out, leave)
    (problem,) = verify(out).problems
    assert "left dense for a reason that the recipe does not give: left dense by" in problem


def test_a_tokenizer_that_does_not_load_is_named(out):
    (out / "tokenizer.json").write_text("{}")
    write_manifest(out)
    (problem,) = verify(out).problems
    assert problem.startswith("not loadable: ") and "tokenizer" in problem


def test_a_tensor_that_differs_from_the_source_is_found_without_the_journal_too(out, checkpoint):
    _edit(out, UNTOUCHED, lambda t: t.add_(1))
    (problem,) = verify(out).problems
    assert problem == f"{UNTOUCHED}: its SHA-256 is not the journal's: it is not what the job wrote"
    (out / "rac" / "journal.jsonl").unlink()
    write_manifest(out)
    assert verify(out).problems == []
    assert [problem.split(":")[0] for problem in verify(out, checkpoint()).problems] == [UNTOUCHED]


def test_another_source_is_refused(out, checkpoint):
    problems = verify(out, checkpoint(initializer_range=0.3)).problems
    assert any("not the checkpoint that this one was made from" in problem for problem in problems)


def test_files_that_are_missing_changed_or_stray_are_named(out, checkpoint):
    (out / "generation_config.json").unlink()
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    (out / "adapter.safetensors").write_bytes(b"")
    problems = verify(out, checkpoint()).problems
    for said in (
        "generation_config.json: missing",
        "config.json: ",
        "adapter.safetensors: not in the manifest",
        "adapter.safetensors: a stray weight file",
        "generation_config.json: differs from the source's",
    ):
        assert any(problem.startswith(said) for problem in problems), said


def test_files_that_nobody_promised_are_a_note_unless_an_engine_would_load_them(out):
    """lighteval caches answers in the model's folder, a trainer and a converter leave files there."""
    (out / "cache" / "0").mkdir(parents=True)
    for name in ("cache/0/answers.parquet", "training_args.bin", "abacus.gguf", "checkpoint-3/model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"")
    found = verify(out)
    assert found.problems == [] and "whole" in found.summary()
    (note,) = found.notes
    assert note.startswith("4 files beside what was made: abacus.gguf, cache/0/answers.parquet, ")
    assert f"note       {note}" in found.summary() and json.loads(found.to_json())["notes"] == [note]
    for name in ("adapter_model.safetensors", "adapter_config.json", "special_tokens_map.json"):
        (out / name).write_bytes(b"")
        assert f"{name}: not in the manifest, and engines would load it" in verify(out).problems


def test_what_comes_later_is_not_stray(out):
    (out / "rac" / "eval").mkdir()
    (out / "rac" / "eval" / "dense.json").write_text("{}")
    (out / "rac" / "report.html").write_text("")
    assert verify(out).problems == []


def test_a_wrong_index_and_keys_of_compression_are_named(out):
    index = json.loads((out / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (out / INDEX).write_text(json.dumps(index))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    write_manifest(out)
    problems = verify(out).problems
    assert len(problems) == 3
    assert "total_size" in problems[0] and "quantization_config" in problems[1] and "not loadable" in problems[2]


def _metrics(out: Path, change: Callable[[dict], object]) -> None:
    path = out / "rac" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if change(line) is not False]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    write_manifest(out)


def test_what_was_pruned_must_be_what_the_recipe_says(out):
    _metrics(out, lambda line: line.get("name") != PRUNED)
    (problem,) = verify(out).problems
    assert problem == f"{PRUNED}: metrics.jsonl does not say what became of it"
    recipe = out / "rac" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("layers.0.mlp.down_proj", "layers.2.mlp.down_proj"))
    write_manifest(out)
    problems = verify(out).problems
    assert any(problem.startswith("recipe.yaml: dense is") for problem in problems)
    assert "model.layers.2.mlp.down_proj.weight: pruned, though the recipe leaves it dense" in problems
    assert "model.layers.0.mlp.down_proj.weight: left dense, though the recipe does not name it" in problems


def test_a_checkpoint_that_does_not_load_is_named(out):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    write_manifest(out)
    (problem,) = verify(out).problems
    assert problem.startswith("not loadable: ") and "shape" in problem


@pytest.mark.parametrize(
    "manifest", ["", "[]", '{"files": {"x": 1}}', '{"files": {"../x": {"sha256": "", "size": 0}}}']
)
def test_a_manifest_that_is_none_is_a_problem(out, manifest):
    (out / "rac" / "manifest.json").write_text(manifest)
    assert "manifest" in verify(out).problems[0]


def test_a_checkpoint_that_cannot_be_read_is_a_problem(out):
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    problems = verify(out).problems
    assert any("the manifest says" in problem for problem in problems)
    assert any("fetch it again" in problem for problem in problems)


def test_a_folder_that_is_no_output_is_bad_input(checkpoint):
    with pytest.raises(BadInput, match="output folder of"):
        verify(checkpoint())


@pytest.mark.parametrize(
    "settings",
    [
        PruneSettings(sparsity=0.37, block_size=32),
        PruneSettings(method="wanda", sparsity=0.77),
        PruneSettings(method="wanda", pattern="4:8"),
        PruneSettings(method="magnitude", sparsity=0.05),
        PruneSettings(sparsity=0.0),
        PruneSettings(
            overrides=[Override(modules=["mlp.*"], pattern="1:4"), Override(modules=[".*up_proj"], sparsity=0.1)]
        ),
    ],
    ids=lambda settings: f"{settings.method}-{settings.pattern or settings.sparsity}",
)
def test_what_every_method_makes_passes(checkpoint, tmp_path, settings):
    made = prune(checkpoint(), tmp_path / "out", settings, tiny.calibration([40, 30, 20])).out
    assert verify(made, checkpoint()).problems == []


def test_a_target_that_the_recipe_does_not_ask_for_is_named(out):
    def change(line):
        if line.get("name") == "model.layers.0.mlp.up_proj.weight":
            line["target"]["pattern"] = "3:4"

    _metrics(out, change)
    assert any("pruned to 3:4, the recipe says 2:4" in problem for problem in verify(out).problems)


@pytest.mark.parametrize(
    ("row", "fits"), [([1, 0, 0, 2, 0, 3], True), ([1, 0, 3, 2, 0, 3], False), ([0, 0, 0, 0, 5, 6], True)]
)
def test_patterns_hold_in_a_last_group_that_is_not_whole_too(row, fits):
    assert _fits(torch.tensor([row]), 2, 4) is fits
