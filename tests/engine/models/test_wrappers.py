"""Language models within a model that also takes images: pruned in place, all else passed through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.model import Model
from rac_engine.recipe.settings import PruneSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Request, Sampling
from tests import tiny

TEXT: dict[str, dict[str, Any]] = {
    "mistral3": {"model_type": "mistral", "sliding_window": None},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 9},
    "qwen3_vl": {
        "model_type": "qwen3_vl_text",
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "qwen3_5": {"model_type": "qwen3_5_text", **tiny.FAMILIES["qwen3_5_text"], "num_hidden_layers": 3},
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
VISION: dict[str, dict[str, Any]] = {
    "mistral3": {"model_type": "pixtral", "head_dim": 8},
    "gemma3": {"model_type": "siglip_vision_model"},
    "qwen3_vl": {"model_type": "qwen3_vl", **QWEN_VISION, "deepstack_visual_indexes": [0]},
    "qwen3_5": {"model_type": "qwen3_5", **QWEN_VISION},
}
LAYERS = {"mistral3": "language_model.model.layers.", "gemma3": "language_model.model.layers."}
"""Names of the decoder layers where they are not `model.language_model.layers.`."""


def save(folder: Path, kind: str) -> Path:
    """A random model of transformers, in the names that the hub has."""
    text: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, **TEXT[kind]}
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sees |= {"image_size": 28, "patch_size": 14, "num_position_embeddings": 4, **VISION[kind]}
    made: Any = CONFIG_MAPPING[kind]
    config = made(text_config=text, vision_config=sees, tie_word_embeddings=kind in LAYERS)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    GenerationConfig().save_pretrained(folder)
    return tiny.save_tokenizer(folder)


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", TEXT)
def test_the_language_model_is_pruned_in_place(tmp_path: Path, kind: str) -> None:
    source, same, out = save(tmp_path / "model", kind), tmp_path / "same", tmp_path / "out"
    layers = LAYERS.get(kind, "model.language_model.layers.")
    prune(source, same, PruneSettings(sparsity=0), tiny.calibration((20, 9)))
    for file in source.glob("*.safetensors"):
        assert (same / file.name).read_bytes() == file.read_bytes()
    report = prune(source, out, PruneSettings(method="sparsegpt", chunk_tokens=16), tiny.calibration((20, 9)))
    pruned = {row["name"] for row in report.matrices}
    before, after = load(source), load(out)
    assert pruned and all(name.startswith(layers) for name in pruned)
    assert (
        len({name.split(".layers.")[1].split(".")[0] for name in pruned}) == Model.open(Checkpoint.open(source)).layers
    )
    for name, tensor in after.items():
        if name in pruned:
            assert float((tensor == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
        else:
            assert torch.equal(tensor, before[name]), name
    assert verify(out, source).problems == []
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()

    model: Any = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    prompts = [torch.arange(10, 10 + length) for length in (9, 3)]
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    wanted = [model.generate(prompt[None], **options)[0, len(prompt) :].tolist() for prompt in prompts]
    decoder = Decoder(out, dtype=torch.float32)
    decoder.stops = frozenset()
    done = decoder.decode([Request(prompt.tolist(), 0) for prompt in prompts], Sampling(6, temperature=0), 2)
    assert [completion.token_ids for completion in done] == wanted


def test_a_language_model_of_no_known_family_is_refused_by_name(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "mistral3")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["model_type"] = "mllama_text_model"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="'mllama_text_model' is not known"):
        Model.open(Checkpoint.open(source))
