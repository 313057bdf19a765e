"""Every command on checkpoints as the hub has them, held against what their layouts say and against transformers."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DeepseekV3Config

from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.stream import Stream
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.cli.app import main
from rac_engine.models.model import Model
from rac_engine.traces.calibration import Calibration, TokenSequence
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Request, Sampling
from rac_engine.traces.template import render
from tests.hub.published import LAYOUTS, Published, publish

RECIPE = """\
model: {model}
trace: {{prompts: p.jsonl, tokens: 90, samples: 2, max_new_tokens: 6}}
evaluate: {{problems: p.jsonl, max_new_tokens: 3}}
"""
COMMANDS = (
    "plan {model}",
    "trace {model} --prompts p.jsonl --tokens 90 --max-new-tokens 6 --out traces",
    "prune {model} pruned --calibration traces --method sparsegpt --sparsity 0.6",
    "eval pruned --problems p.jsonl --max-new-tokens 3 --out answers.json",
    "verify pruned --source {model}",
    "run recipe.yaml all",
    "verify all --source {model}",
)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """The checkpoint of a layout, not to be written to."""
    return functools.cache(lambda name: publish(name, tmp_path_factory.mktemp("hub")))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_command(name, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = published(name)
    Path("p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    Path("recipe.yaml").write_text(RECIPE.format(model=given.path))
    for words in COMMANDS:
        assert main(words.format(model=given.path).split()) == 0, (words, capsys.readouterr().err)
    transformers_says = loaded(given.plain)[1]
    assert not transformers_says["missing_keys"] and not transformers_says["mismatched_keys"]
    for out, sparsity in (("pruned", 0.6), ("all", 0.5)):
        check_weights(given, weights(Path(out)), sparsity)
        check_files(given, Path(out))
        assert loaded(Path(out))[1] == transformers_says


def check_weights(given: Published, after: dict[str, Tensor], sparsity: float) -> None:
    """Every tensor is there, pruned as asked if the layout says that it is one of those, else as it was."""
    assert after.keys() == given.tensors.keys()
    for name, before in given.tensors.items():
        tensor = after[name]
        assert (tensor.dtype, tensor.shape) == (before.dtype, before.shape), name
        if name in given.pruned:
            zero = tensor == 0
            assert float(zero.float().mean()) == pytest.approx(sparsity, abs=0.02), name
            assert not tensor.signbit()[zero].any(), name
        else:
            assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)), name


def check_files(given: Published, out: Path) -> None:
    """Everything beside the weights is as it was, but that config.json says nothing of quantized weights."""
    for name, data in given.beside.items():
        if name == "config.json" and given.plain != given.path:
            config = given.config
            config.pop("quantization_config")
            assert list(json.loads((out / name).read_text()).items()) == list(config.items())
        else:
            assert (out / name).read_bytes() == data, name


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """What transformers makes of a folder, in fp32, and what it says of the tensors."""
    config = json.loads((folder / "config.json").read_text())
    # A name that transformers knows by the checkpoint's own code alone.
    renamed = {**config, "model_type": "deepseek_v3"} if config["model_type"] == "kimi_k2" else None
    conditional = config["architectures"][0].endswith("ForConditionalGeneration")
    pair: Any = (AutoModelForImageTextToText if conditional else AutoModelForCausalLM).from_pretrained(
        folder,
        config=renamed and DeepseekV3Config.from_dict(renamed),
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    return pair


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_streamed_hidden_states_are_those_of_transformers(name, published):
    given = published(name)
    check_streamed(given.path, loaded(given.plain)[0])


def check_streamed(path: Path, causal: Any) -> None:
    """The hidden states behind the last layer are those of transformers' model."""
    draw = np.random.default_rng(0)
    size = len(Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab())
    sequences = [TokenSequence(draw.integers(0, size, length), 0, None) for length in (50, 23, 1)]
    model = Model.open(Checkpoint.open(path))
    stream = Stream(model, Packing.of(Calibration("random", "sequences", "all", sequences), 32), torch.float32)
    for layer in range(model.layers):
        tensors = {key: model.checkpoint.read(key) for key in model.tensor_names(layer)}
        for block in model.build_layer(layer, tensors, torch.float32, "cpu"):
            stream.advance(block)
    whole = causal.base_model
    whole = getattr(whole, "language_model", whole)
    norm = next(getattr(whole, part) for part in (model.family.norm.split(".")[-2], "norm") if hasattr(whole, part))
    ends = list(itertools.accumulate((len(sequence.token_ids) for sequence in sequences), initial=0))
    for sequence, (start, stop) in zip(sequences, itertools.pairwise(ends), strict=True):
        truth = whole(torch.as_tensor(sequence.token_ids)[None]).last_hidden_state[0]
        found = norm(stream.hidden.read(start, stop))
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_are_the_tokens_of_tokenizer_json(name, published):
    given = published(name)
    decoder = Decoder(given.path)
    template = decoder.tokenizer.chat_template
    ids = render(decoder.tokenizer, [{"role": "user", "content": "What is 1 + 21?\n"}], name)
    text = decoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 21?\n"}], add_generation_prompt=True, tokenize=False
    )
    assert template and "What is 1 + 21?" in text
    backend = Tokenizer.from_file(str(given.path / "tokenizer.json"))
    assert ids == backend.encode(text, add_special_tokens=False).ids
    generation, tokens = (
        json.loads((given.path / f"{name}_config.json").read_text()) for name in ("generation", "tokenizer")
    )
    parts = (generation, given.config, given.config.get("text_config", {}))
    said = [part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None]
    end = tokens["eos_token"] if isinstance(tokens["eos_token"], str) else tokens["eos_token"]["content"]
    own = {int(number) for number, token in tokens["added_tokens_decoder"].items() if token["content"] == end}
    assert decoder.stops == own.union(*(each if isinstance(each, list) else [each] for each in said))
    assert decoder.stops >= {*(generation["eos_token_id"] if isinstance(generation["eos_token_id"], list) else [])}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_what_is_sampled_is_what_transformers_would_say(name, published):
    given = published(name)
    decoder, whole = Decoder(given.path, dtype=torch.float32), loaded(given.plain)[0]
    ids = render(decoder.tokenizer, [{"role": "user", "content": "What is 1 + 21?"}], name)
    (said,) = decoder.decode([Request(ids, 0)], Sampling(4, temperature=0), 1)
    for token in said.token_ids:
        assert token == int(whole(torch.as_tensor(ids)[None]).logits[0, -1, : decoder.vocabulary].argmax())
        ids.append(token)
    assert len(said.token_ids) == 4 or said.token_ids[-1] in decoder.stops


@pytest.mark.parametrize(
    ("name", "argument", "with_it", "without"),
    [
        ("Qwen3-8B", "enable_thinking=false", "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        ("DeepSeek-V3.1", "thinking=true", "<｜Assistant｜><think>", "<｜Assistant｜></think>"),
        ("granite-3.3-8b-instruct", "thinking=true", "<think></think>", "<|start_of_role|>assistant<|end_of_role|>"),
        ("gpt-oss-20b-BF16", "reasoning_effort=high", "Reasoning: high", "Reasoning: medium"),
    ],
)
def test_thinking_is_switched_by_what_the_template_is_told(
    name, argument, with_it, without, published, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    command = f"trace {published(name).path} --prompts p.jsonl --samples 1 --max-new-tokens 1 --out"
    assert main([*command.split(), "plain"]) == 0
    assert main([*command.split(), "told", "--template-arguments", argument]) == 0
    plain, told = (
        parquet.read_table(f"{out}/part-00000.parquet").column("text")[0].as_py() for out in ("plain", "told")
    )
    assert without in plain and with_it not in plain
    assert with_it in told
    for wrong, said in (("enable_thinkng=false", "no argument 'enable_thinkng'"), ("thinking", "is not NAME=VALUE")):
        assert main([*command.split(), "other", "--template-arguments", wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_head_that_is_stored_though_it_is_tied_stays_a_copy_of_the_embeddings(published, tmp_path, capsys):
    """transformers would untie them if they differed."""
    given, out = published("Qwen3-0.6B"), tmp_path / "out"
    (tmp_path / "p.jsonl").write_text('{"problem": "Add 2 and 2."}\n')
    words = f"prune {given.path} {out} --calibration {tmp_path / 'p.jsonl'} --method sparsegpt --also embeddings"
    assert main(words.split()) == 0, capsys.readouterr().err
    after = weights(out)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert float((after["lm_head.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    model = loaded(out)[0]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert main(["verify", str(out), "--source", str(given.path)]) == 0, capsys.readouterr().out
    file = next(file for file in out.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": given.tensors["lm_head.weight"]}, file, metadata={"format": "pt"})
    assert main(["verify", str(out), "--source", str(given.path)]) != 0
    assert "is a copy of the embeddings in the source" in capsys.readouterr().out
    assert main(["verify", str(out)]) != 0
    assert "lm_head.weight: is not the table of embeddings, though" in capsys.readouterr().out


def test_a_head_that_differs_from_the_embeddings_in_its_last_row_alone_is_a_matrix_of_its_own(
    published, tmp_path, capsys
):
    """transformers does not tie them then, so that pruning the one leaves the other."""
    given, source, out = published("Qwen3-0.6B"), tmp_path / "source", tmp_path / "out"
    shutil.copytree(given.path, source)
    file = next(file for file in source.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    head = given.tensors["lm_head.weight"].clone()
    head[-1] += 1
    save_file(load_file(file) | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    words = f"prune {source} {out} --method magnitude --also embeddings"
    assert main(words.split()) == 0, capsys.readouterr().err
    assert torch.equal(weights(out)["lm_head.weight"], head)
    assert main(["verify", str(out), "--source", str(source)]) == 0, capsys.readouterr().out
    notes = (out / "rac" / "metrics.jsonl").read_text()
    assert "lm_head.weight is not the table of embeddings" in notes and "tied: " not in notes


def test_a_head_that_is_tied_by_default_but_stored_for_itself_is_a_matrix_of_its_own(published, tmp_path, capsys):
    """transformers does not tie them then: Mistral 3's config says nothing, and its default is to tie them."""
    given, out = published("Magistral-Small-2509"), tmp_path / "out"
    (tmp_path / "p.jsonl").write_text('{"problem": "Add 2 and 2."}\n')
    words = f"prune {given.path} {out} --calibration {tmp_path / 'p.jsonl'} --method sparsegpt --also lm_head"
    assert main(words.split()) == 0, capsys.readouterr().err
    head, before = weights(out)["language_model.lm_head.weight"], given.tensors["language_model.lm_head.weight"]
    assert float((head == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(head, before)
    assert torch.equal(loaded(out)[0].lm_head.weight, head.float())
    assert main(["verify", str(out), "--source", str(given.path)]) == 0, capsys.readouterr().out
    assert "not the table of embeddings" in (out / "rac" / "metrics.jsonl").read_text()
