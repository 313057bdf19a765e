"""Models on the hub, without one: a stand-in server and a cache that is laid out by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rac_engine.base.errors import BadInput
from rac_engine.base.hubnames import HubName, cached_name, hub_name, shown_model
from rac_engine.checkpoint.hub import local_folder
from rac_engine.cli.app import main
from rac_engine.recipe.files import absolute, dump, load_recipe
from tests import tiny
from tests.engine.checkpoint.hub import COMMIT, OLDER, Hub, lay_out, serving

NAME = "some-org/Tiny-1.5B"
REFUSED = {
    "pytorch_model.bin": b"a pickle",
    "model.gguf": b"x",
    "original/consolidated.00.pth": b"x",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
    "consolidated.safetensors": b"the same weights once more",
    ".gitattributes": b"x",
    "training/optimizer.json": b"{}",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny model in several shards."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    tiny.save_tokenizer(tiny.save(folder, "llama"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache; the hub itself cannot be reached."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    _at(nowhere, monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub({NAME: files | REFUSED})) as made:
        _at(made.url, monkeypatch)
        yield made


def _at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Qwen/Qwen3-8B", HubName("Qwen/Qwen3-8B")),
        ("Qwen/Qwen3-8B@main", HubName("Qwen/Qwen3-8B", "main")),
        ("a/b.c_d@refs/pr/1", HubName("a/b.c_d", "refs/pr/1")),
        *((text, None) for text in ("MODEL", "/a/b", "./a", "a/b/c", "a/b/", "../b", "a/..", "~/b", "a/b@", "a b/c")),
        *((text, None) for text in ("a/b--c", "a/b.git", "a-/b", "a/b@../c", "", "a/" + "b" * 96, "é/b")),
    ],
)
def test_what_can_be_a_name_on_the_hub(text: str, found: HubName | None) -> None:
    assert hub_name(text) == found
    assert found is None or str(found) == text


def test_a_local_folder_of_that_name_wins(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    assert local_folder(NAME) == Path(NAME) and local_folder(Path("no-such-folder")) == Path("no-such-folder")
    assert not hub.asked


def test_what_is_needed_is_fetched_once_and_nothing_else(hub: Hub, files: dict[str, bytes], cache: Path) -> None:
    told: list[str] = []
    folder = local_folder(NAME, told.append)
    assert folder == cache / "models--some-org--Tiny-1.5B" / "snapshots" / COMMIT
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1 and sorted(hub.asked) == [f"{name} 0" for name in shards]
    assert told[-1].startswith(f"fetching {NAME} · ") and len(set(told)) > 2
    done, total = told[-1].rpartition("· ")[2].split(" of ")
    assert done == total
    assert local_folder(f"{NAME}@{COMMIT}") == folder and len(hub.asked) == len(shards)
    assert cached_name(folder) == HubName(NAME, COMMIT) and shown_model(folder) == f"{NAME}@{COMMIT}"


def test_without_weights_none_are_fetched(hub: Hub, files: dict[str, bytes]) -> None:
    folder = local_folder(NAME, weights=False)
    assert {file.name for file in folder.iterdir()} == {name for name in files if not name.endswith(".safetensors")}
    assert main(["plan", NAME]) == 0
    assert not hub.asked


def test_a_file_that_breaks_off_goes_on_where_it_was(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
    name = next(name for name in files if name.endswith(".safetensors"))
    hub.breaks.add(name)
    folder = local_folder(NAME)
    assert (folder / name).read_bytes() == files[name]
    first, second = (int(asked.split()[1]) for asked in hub.asked if asked.startswith(name))
    assert first == 0 and len(files[name]) // 2 - 64 < second <= len(files[name]) // 2


def test_files_that_have_come_are_kept(hub: Hub, files: dict[str, bytes], cache: Path) -> None:
    others = sorted(name for name in files if name.endswith(".safetensors"))[1:]
    lay_out(cache, NAME, {name: data for name, data in files.items() if name not in others})
    local_folder(NAME)
    assert sorted(hub.asked) == [f"{name} 0" for name in others]


@pytest.mark.parametrize("offline", [False, True], ids=["no network", "HF_HUB_OFFLINE"])
def test_the_cache_is_used_where_the_hub_is_out_of_reach(
    offline: bool, cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
    with pytest.raises(BadInput, match=f"no such folder, nor is that model in the cache of the hub, and {why}; fetch"):
        local_folder(NAME)
    newest = lay_out(cache, NAME, files)
    older = lay_out(cache, NAME, files, "older", OLDER)
    told: list[str] = []
    assert local_folder(NAME, told.append) == newest and told == [f"{NAME}: from the cache, {why}"]
    assert local_folder(f"{NAME}@older") == local_folder(f"{NAME}@{OLDER}") == older
    next(newest.glob("*.safetensors")).unlink()
    with pytest.raises(BadInput, match="in the cache of the hub, but for a part of it, and"):
        local_folder(NAME)
    assert local_folder(NAME, weights=False) == newest


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (
            NAME,
            {"gated": True},
            r"is gated; accept its terms on http\S+/some-org/Tiny-1.5B and set HF_TOKEN to a token",
        ),
        (
            "some-org/none",
            {},
            "no such folder, and no model of that name on http.*; if it is a private one, set HF_TOKEN",
        ),
        (f"{NAME}@v2", {}, "that model has no such revision; give a branch, a tag or a commit of it"),
        (
            NAME,
            {"models": {NAME: {"config.json": b"{}", "pytorch_model.bin": b"x"}}},
            "no model.safetensors .* but pyt",
        ),
        (NAME, {"models": {NAME: {"README.md": b""}}}, "has no config.json on the hub"),
        (NAME, {"status": 429}, r"answers with status 429; run this again later"),
        (NAME, {"status": 503}, r"nor is that model in the cache of the hub, and http.* answers with status 503"),
        (NAME, {"status": 403}, r"answers with status 403; check HF_TOKEN"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    model: str, changes: dict[str, object], said: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in changes.items():
        setattr(hub, name, value)
    with pytest.raises(BadInput, match=f"^{model}: .*{said}") as error:
        local_folder(model)
    assert "\n" not in str(error.value)
    assert main(["verify", "out", "--source", model]) == main(["plan", model]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"rac: error: {model}: ")


def test_every_command_takes_a_name_and_records_the_commit(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"problem": "w5 w6", "answer": "7"}\n')
    recipe = f"model: {NAME}\nprune: {{method: magnitude}}\nevaluate: {{problems: p.jsonl, max_new_tokens: 2}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    for words in (
        f"prune {NAME}@main o --method magnitude --dry-run",
        f"trace {NAME} --prompts p.jsonl --tokens 20 --max-new-tokens 2 --out traces",
        f"eval {NAME} --problems p.jsonl --max-new-tokens 2 --out answers.json",
        f"prune {NAME} out --calibration traces --method wanda",
        f"verify out --source {NAME}",
        "run r.yaml all",
    ):
        assert main(words.split()) == 0, (words, capsys.readouterr().err)
    assert not (tmp_path / "o").exists()
    named = f"{NAME}@{COMMIT}"
    assert json.loads((tmp_path / "answers.json").read_text())["model"] == named
    for out in ("out", "all"):
        assert f"model: {named}" in (tmp_path / out / "rac" / "recipe.yaml").read_text()
        run = json.loads((tmp_path / out / "rac" / "metrics.jsonl").read_text().splitlines()[0])
        assert (run["model"]["name"], run["model"]["revision"]) == (NAME, COMMIT)
        assert COMMIT in (tmp_path / out / "README.md").read_text()
        assert load_recipe(tmp_path / out / "rac" / "recipe.yaml").model == Path(named)


def test_a_recipe_keeps_a_name_that_is_no_folder_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {NAME}@main\n")
    recipe = load_recipe(file)
    assert recipe.model == absolute(recipe).model == Path(f"{NAME}@main") and f"model: {NAME}@main\n" in dump(recipe)
    (tmp_path / f"{NAME}@main").mkdir(parents=True)
    assert load_recipe(file).model == tmp_path / f"{NAME}@main"


def test_the_environment_is_obeyed(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    code = "import sys; from rac_engine.checkpoint.hub import local_folder; print(local_folder(sys.argv[1]))"
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"}
    environment = os.environ | variables
    done = subprocess.run([sys.executable, "-c", code, NAME], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in Path(done.stdout.strip()).iterdir()} == files.keys()
    assert done.stdout.startswith(str(tmp_path / "other"))
