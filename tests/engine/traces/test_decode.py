from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rac_engine.base.errors import BadInput, Damaged
from rac_engine.jobs.journal import Journal
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Completion, Progress, Request, Sampling, choose, request_key, uniforms
from rac_kernels import decode_attention
from tests import tiny

LENGTHS = (5, 1, 17, 9, 9, 30, 2)
GREEDY = Sampling(max_new_tokens=24, temperature=0)
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def save(folder: Path, family: str = "qwen2", end: int | list[int] | None = None, **changes: Any) -> Path:
    tiny.save(folder, family, **changes)
    GenerationConfig(eos_token_id=end).save_pretrained(folder)
    return tiny.save_tokenizer(folder)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(4, tiny.VOCABULARY, length).tolist() for length in lengths]


def requests(seed: int = 0) -> list[Request]:
    return [Request(prompt, request_key(seed, str(number), 0)) for number, prompt in enumerate(prompts())]


def generated(folder: Path, tokens: int) -> list[list[int]]:
    """Tokens of transformers' own generate, one prompt at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [
            model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens)[0, len(prompt) :].tolist()
            for prompt in prompts()
        ]


@pytest.mark.parametrize(
    "family, changes",
    [*((family, {}) for family in tiny.FAMILIES), ("qwen2", WINDOW)],
    ids=[*tiny.FAMILIES, "qwen2-window"],
)
def test_greedy_tokens_are_those_of_generate(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    decoder = Decoder(save(tmp_path, family, **changes), dtype=torch.float32)
    expected = generated(tmp_path, GREEDY.max_new_tokens)
    # Two tokens of which one stands in some of these answers, but not in all: some of them stop and some do not.
    pairs = (frozenset({a, b}) for a in expected[0][6:] for b in expected[3][11:])
    decoder.stops = next(pair for pair in pairs if not all(pair.intersection(tokens) for tokens in expected))
    for tokens in expected:
        del tokens[next((at for at, token in enumerate(tokens, 1) if token in decoder.stops), len(tokens)) :]
    for batch_size in (1, 3, 64):
        done = decoder.decode(requests(), GREEDY, batch_size)
        assert [completion.token_ids for completion in done] == expected
        assert [completion.finish == "stop" for completion in done] == [ids[-1] in decoder.stops for ids in expected]
        assert {completion.finish for completion in done} == {"stop", "length"}


def test_every_end_of_the_generation_config_stops(tmp_path: Path) -> None:
    assert Decoder(save(tmp_path / "one", end=9)).stops == {0, 9}  # 0 is the tokenizer's
    assert Decoder(save(tmp_path / "two", end=[9, 12])).stops == {0, 9, 12}


def test_the_tokens_of_a_seed_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    decoder = Decoder(save(tmp_path), dtype=torch.float32)
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.9)
    one, four = (decoder.decode(requests(), sampling, batch_size) for batch_size in (1, 4))
    assert one == four
    assert decoder.decode(requests(seed=1), sampling, 4) != four
    assert decoder.decode(requests()[::-1], sampling, 4) == four[::-1]


@pytest.mark.parametrize("quick", [True, False])
def test_decoding_twice_gives_the_same(tmp_path: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, and in fp32 on a processor that has no quick products of it."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: quick)
    decoder = Decoder(save(tmp_path, end=7))
    assert {p.dtype for p in decoder.model.parameters()} == {torch.bfloat16 if quick else torch.float32}
    sampling = Sampling(max_new_tokens=40, temperature=0.8, top_p=0.95)
    assert decoder.decode(requests(), sampling, 3) == decoder.decode(requests(), sampling, 3)


def test_prompts_that_do_not_fit_into_one_step_join_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(save(tmp_path), dtype=torch.float32)
    whole = decoder.decode(requests(), GREEDY, 64)
    monkeypatch.setattr("rac_engine.traces.decoder.PROMPT_TOKENS", 10)  # one prompt has 17 tokens and one 30
    assert decoder.decode(requests(), GREEDY, 64) == whole


def test_no_more_than_batch_size_are_in_flight_and_a_free_place_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(save(tmp_path), dtype=torch.float32)
    seen: list[int] = []
    extend = decoder._extend

    def watch(cache: Any, flying: list[Any], *rest: Any) -> None:
        seen.append(len(flying))
        extend(cache, flying, *rest)

    monkeypatch.setattr(decoder, "_extend", watch)
    done = decoder.decode(requests(), Sampling(max_new_tokens=8, temperature=0), 3)
    assert seen == [3] * 16 + [1] * 8
    assert sum(len(completion.token_ids) for completion in done) == sum(seen)


def test_tokens_that_the_tokenizer_lacks_are_never_sampled(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    GenerationConfig(eos_token_id=0).save_pretrained(folder)
    tiny.save_tokenizer(folder, words=20)
    decoder = Decoder(folder, dtype=torch.float32)
    ask = [Request([5, 6], key) for key in range(8)]
    done = decoder.decode(ask, Sampling(max_new_tokens=30, temperature=2.0, top_p=1.0), 8)
    assert len(decoder.tokenizer) < tiny.VOCABULARY
    assert max(max(completion.token_ids) for completion in done) < len(decoder.tokenizer)


def test_without_a_generation_config_the_tokenizers_end_stops(tmp_path: Path) -> None:
    folder = tiny.save_tokenizer(tiny.save(tmp_path))
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert Decoder(folder).stops == {0}


def test_progress_counts_up_to_what_was_sampled(tmp_path: Path) -> None:
    told: list[Progress] = []
    done = Decoder(save(tmp_path)).decode(requests(), Sampling(max_new_tokens=5), 4, told.append)
    assert told[-1].finished == told[-1].requests == len(LENGTHS)
    assert told[-1].tokens == sum(len(completion.token_ids) for completion in done)
    assert str(told[-1]).startswith("7 of 7 done · ")


def test_nothing_to_do(tmp_path: Path) -> None:
    assert Decoder(save(tmp_path)).decode([], GREEDY, 4) == []


def test_weights_that_are_broken_are_not_sampled_from(tmp_path: Path) -> None:
    decoder = Decoder(save(tmp_path))
    with torch.no_grad():
        decoder.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        decoder.decode(requests(), Sampling(max_new_tokens=3), 4)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_bit_that_transformers_reads_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The disk gives other bytes to it than to the checksum before."""
    folder = save(tmp_path, family)
    load: Any = AutoModelForCausalLM.from_pretrained
    Decoder(folder)

    def flipped(*args: Any, **options: Any) -> Any:
        model, found = load(*args, **options)
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.view(torch.int16)[3, 5] ^= 1
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", flipped)
    with pytest.raises(Damaged, match=r"layers\.1\.self_attn\.k_proj\.weight' was read twice"):
        Decoder(folder)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        # It knows experts on disk by the name of the config's kind, and goes on with random ones where it does not.
        ({"model_type": "another"}, r"'model\.layers\.0\.mlp\.experts\.down_proj', one of 4 such"),
        ({"vocab_size": 65}, r"'lm_head\.weight', one of 2 such"),
    ],
    ids=["missing", "other shape"],
)
def test_weights_that_transformers_does_not_find_are_not_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], lost: str
) -> None:
    folder = save(tmp_path, "qwen3_moe")
    config = AutoConfig.from_pretrained(folder)
    for key, value in change.items():
        setattr(config, key, value)
    monkeypatch.setattr("rac_engine.traces.loading.loading_config", lambda _: config)
    with pytest.raises(BadInput, match=f"finds no weights that fit {lost}"):
        Decoder(folder)


def test_a_folder_without_tokenizer_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tokenizer"):
        Decoder(tiny.save(tmp_path))


def test_uniforms_are_those_of_splitmix64() -> None:
    # The first outputs of the generator seeded with 1234567, as published with it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = uniforms([1234567] * 4, [0, 1, 2, 3])
    assert drawn.dtype == np.float32
    assert drawn.tolist() == [(value >> 40) / 2**24 for value in published]


def test_uniforms_are_uniform_over_keys_and_over_positions() -> None:
    keys = [request_key(0, str(number), 0) for number in range(2000)]
    for drawn in (uniforms(keys, [5] * 2000), uniforms([keys[0]] * 2000, range(2000))):
        assert drawn.min() >= 0 and drawn.max() < 1
        counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 50  # chi-squared of 19 degrees: p = 0.0001


def test_request_keys_differ_by_seed_name_and_sample() -> None:
    asked = [(0, "1", 0), (1, "1", 0), (0, "2", 0), (0, "1", 1), (0, "1/0", 0), (1, "0/1", 0)]
    assert len({request_key(*each) for each in asked}) == len(asked)


def shares(logits: list[float], temperature: float, top_p: float, draws: int = 4000) -> dict[int, float]:
    """How often each token is chosen over evenly spread random numbers."""
    u = (torch.arange(draws, dtype=torch.float32) + 0.5) / draws
    chosen = choose(torch.tensor(logits).expand(draws, -1), u, temperature, top_p)
    return {int(token): float((chosen == token).float().mean()) for token in chosen.unique()}


def test_choose_follows_the_probabilities_within_the_nucleus() -> None:
    probabilities = [0.05, 0.5, 0.15, 0.3]
    logits = np.log(probabilities).tolist()
    assert shares(logits, 1.0, 1.0) == pytest.approx(dict(enumerate(probabilities)), abs=1e-3)
    # 0.5 + 0.3 do not reach 0.9, with 0.15 they do.
    assert shares(logits, 1.0, 0.9) == pytest.approx({1: 0.5 / 0.95, 3: 0.3 / 0.95, 2: 0.15 / 0.95}, abs=1e-3)
    assert shares(logits, 1.0, 0.5001) == pytest.approx({1: 5 / 8, 3: 3 / 8}, abs=1e-3)
    assert shares(logits, 1.0, 1e-6) == {1: 1.0}
    assert shares(logits, 0.0, 1.0) == {1: 1.0}


def test_temperature_sharpens() -> None:
    logits = np.log([0.2, 0.8]).tolist()
    assert shares(logits, 0.5, 1.0) == pytest.approx({0: 0.04 / 0.68, 1: 0.64 / 0.68}, abs=1e-3)


@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_a_nucleus_wider_than_the_candidates_is_found_all_the_same(
    top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(50, 300) * torch.linspace(0.1, 5, 50)[:, None], torch.rand(50)
    chosen: Callable[[], torch.Tensor] = lambda: choose(logits, draws, 1.0, top_p)  # noqa: E731
    monkeypatch.setattr("rac_engine.traces.sampling._CANDIDATES", 300)
    everything = chosen()
    monkeypatch.setattr("rac_engine.traces.sampling._CANDIDATES", 16)
    assert torch.equal(chosen(), everything)


def test_completions_compare_by_what_they_hold() -> None:
    assert Completion([1, 2], "stop") == Completion([1, 2], "stop") != Completion([1, 2], "length")


def test_threads_are_chosen_by_measurement_and_kept_by_a_job_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rac_engine.traces.decoder._SMALL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    decoder = Decoder(save(tmp_path / "m"))
    seconds = {1: 1.0, 8: 0.91}
    monkeypatch.setattr(decoder, "_step_seconds", lambda rows, count: seconds[count])
    assert decoder.threads == 8
    assert decoder.choose_threads(tmp_path / "j", 3) == {"threads": 1}  # 8 are not worth it
    assert decoder.notes == ["sampled with 1 of 8 threads, which a measurement found the quickest"]
    seconds[8] = 0.5
    assert decoder.choose_threads(tmp_path / "j", 3) == {"threads": 8}
    Journal(tmp_path / "j").identify({}, {"threads": 1})
    assert decoder.choose_threads(tmp_path / "j", 3) == {"threads": 1} and decoder.threads == 1
    assert decoder.choose_threads(tmp_path / "j", 3, restart=True) == {"threads": 8}


def test_steps_are_timed_and_leave_nothing_behind(tmp_path: Path) -> None:
    decoder = Decoder(save(tmp_path))
    before = decoder.decode(requests(), GREEDY, 3)
    assert 0 < decoder._step_seconds(3, 1) < 5
    assert decoder.decode(requests(), GREEDY, 3) == before


def test_the_number_of_threads_changes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, whose sums depend on it, has all threads, whatever the rest has."""
    monkeypatch.setattr("rac_engine.traces.decoder._SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder, seen = Decoder(save(tmp_path / "m")), set[int]()

        def watch(*given: Any) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return decode_attention(*given)

        monkeypatch.setattr("rac_engine.traces.decoder.decode_attention", watch)
        found = []
        for decoder.threads in (1, 2):
            found.append(decoder.decode(requests(), Sampling(max_new_tokens=24, temperature=1.0), 4))
        assert found[0] == found[1] and seen == {2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
