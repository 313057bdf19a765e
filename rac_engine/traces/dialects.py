"""How the engines that serve models are asked for tokens by token ids, each by its documented fields.

- vLLM: `POST /v1/completions`; `return_token_ids` gives the ids back.
- SGLang: `POST /generate`, with `input_ids` in and `output_ids` out.
- llama.cpp: `POST /completion`; `return_tokens` gives the ids back.

Every field that decides the tokens is sent: a server fills in others from the model's generation_config or from options
of its own. All of them are told to sample as `rac_engine.traces.sampling` does: temperature first, then the nucleus.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rac_engine.base.errors import BadInput

PROBE = 'Let n = 1234567: solve\n\t"x² ≤ 3" for x ∈ ℝ — naïve café, 你好, 🙂.'
"""Text that tokenizers split in different ways."""


class Misbehaved(Exception):
    """A reply that cannot be used, and would be no better the next time."""


class Unlucky(Exception):
    """A request that failed for a reason that may pass. `after` are the seconds that the server asked to wait."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


@dataclass(frozen=True)
class Served:
    """A server's own account of the model that it runs."""

    model: str
    """The name to ask for."""
    root: str | None = None
    """Folder or name that the weights came from."""
    context: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request: token ids to go on from, until one of `stops` or `most` tokens."""

    prompt: Sequence[int]
    most: int
    temperature: float
    top_p: float
    seed: int
    """Below 2^63."""
    stops: Sequence[int]


@dataclass(frozen=True)
class Reply:
    """Token ids that a server sampled, the one that stopped it included, and whether one did."""

    token_ids: list[int]
    stopped: bool


class Dialect(ABC):
    """The fields of one engine."""

    name: ClassVar[str]
    path: ClassVar[str]
    owner: ClassVar[str]
    """What `/v1/models` says in `owned_by`."""
    described: ClassVar[str]
    """The path that tells more of the server."""
    promise: ClassVar[str]
    """What it says of the same request asked twice."""

    @abstractmethod
    def served(self, card: Mapping[str, Any], described: Mapping[str, Any]) -> Served:
        """The model, from its entry in `/v1/models` and what stands at `described` (empty if nothing does)."""

    @abstractmethod
    def body(self, served: Served, asked: Asked) -> dict[str, Any]:
        """The body of a request."""

    @abstractmethod
    def reply(self, said: Mapping[str, Any], asked: Asked) -> Reply:
        """The tokens in a reply. Raises `Misbehaved` and `Unlucky`."""

    @abstractmethod
    def probe(self, served: Served) -> dict[str, Any]:
        """The body by which `/tokenize` is asked for the tokens of `PROBE`."""


class VLLM(Dialect):
    name, path, owner, described = "vLLM", "/v1/completions", "vllm", "/version"
    promise = "a request has a seed of its own, by which vLLM repeats it on the same machine as a rule, not by promise"

    def served(self, card: Mapping[str, Any], described: Mapping[str, Any]) -> Served:
        return Served(card["id"], _text(card, "root"), _count(card, "max_model_len"), _text(described, "version"))

    def body(self, served: Served, asked: Asked) -> dict[str, Any]:
        return {
            "model": served.model,
            "prompt": list(asked.prompt),
            "max_tokens": asked.most,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "seed": asked.seed,
            "n": 1,
            "stop": [],
            "stop_token_ids": list(asked.stops),
            "ignore_eos": False,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "return_token_ids": True,
            "stream": False,
        }

    def reply(self, said: Mapping[str, Any], asked: Asked) -> Reply:
        choices = said.get("choices")
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        if not isinstance(choice, Mapping):
            raise Misbehaved("its reply has no one choice")
        reason, given = choice.get("finish_reason"), choice.get("prompt_token_ids")
        if reason not in ("stop", "length"):
            raise Unlucky(f"a request ended by {str(reason)[:40]!r}")
        if choice.get("token_ids") is None:
            raise Misbehaved("it answers with text only; a vLLM that knows return_token_ids is needed")
        if given is not None and given != list(asked.prompt):
            raise Misbehaved("it changed the token ids of a prompt")
        return Reply(_ids(choice["token_ids"]), reason == "stop")

    def probe(self, served: Served) -> dict[str, Any]:
        return {"model": served.model, "prompt": PROBE, "add_special_tokens": False}


class SGLang(Dialect):
    name, path, owner, described = "SGLang", "/generate", "sglang", "/get_server_info"
    promise = "SGLang repeats a request only where it was started with --enable-deterministic-inference"

    def served(self, card: Mapping[str, Any], described: Mapping[str, Any]) -> Served:
        root = _text(described, "model_path") or _text(card, "root")
        return Served(card["id"], root, _count(card, "max_model_len"), _text(described, "version"))

    def body(self, served: Served, asked: Asked) -> dict[str, Any]:
        sampling = {
            "max_new_tokens": asked.most,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_new_tokens": 0,
            "sampling_seed": asked.seed,
            "n": 1,
            "stop_token_ids": list(asked.stops),
            "ignore_eos": False,
            "skip_special_tokens": False,
        }
        return {"input_ids": list(asked.prompt), "sampling_params": sampling, "stream": False}

    def reply(self, said: Mapping[str, Any], asked: Asked) -> Reply:
        about = said.get("meta_info")
        reason = about.get("finish_reason") if isinstance(about, Mapping) else None
        if not isinstance(about, Mapping) or not isinstance(reason, Mapping):
            raise Misbehaved("its reply says nothing of why it ended")
        if reason.get("type") not in ("stop", "length"):
            raise Unlucky(f"a request ended by {str(reason.get('type'))[:40]!r}")
        if said.get("output_ids") is None:
            raise Misbehaved("it answers with text only; an SGLang whose /generate gives output_ids is needed")
        if about.get("prompt_tokens", len(asked.prompt)) != len(asked.prompt):
            raise Misbehaved("it changed the token ids of a prompt")
        ids, matched = _ids(said["output_ids"]), reason.get("matched")
        if type(matched) is int and (not ids or ids[-1] != matched):
            ids.append(matched)
        return Reply(ids, reason["type"] == "stop")

    def probe(self, served: Served) -> dict[str, Any]:
        return {"model": served.model, "prompt": PROBE, "add_special_tokens": False}


class LlamaCpp(Dialect):
    name, path, owner, described = "llama.cpp", "/completion", "llamacpp", "/props"
    promise = "llama.cpp repeats a request as a rule, not by promise: other requests at the same time may change it"

    def served(self, card: Mapping[str, Any], described: Mapping[str, Any]) -> Served:
        defaults = described.get("default_generation_settings")
        context = _count(defaults, "n_ctx") if isinstance(defaults, Mapping) else None
        return Served(card["id"], _text(described, "model_path"), context, _text(described, "build_info"))

    def body(self, served: Served, asked: Asked) -> dict[str, Any]:
        return {
            "prompt": list(asked.prompt),
            "n_predict": asked.most,
            "samplers": ["temperature", "top_p"],
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "mirostat": 0,
            "seed": asked.seed % (1 << 32),
            "stop": [],
            "ignore_eos": False,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": False,
        }

    def reply(self, said: Mapping[str, Any], asked: Asked) -> Reply:
        reason = said.get("stop_type")
        if reason not in ("eos", "limit"):
            raise Unlucky(f"a request ended by {str(reason)[:40]!r}")
        if not said.get("tokens") and said.get("tokens_predicted"):
            raise Misbehaved("it answers with text only; a llama.cpp that knows return_tokens is needed")
        if said.get("truncated") or said.get("tokens_evaluated", len(asked.prompt)) != len(asked.prompt):
            raise Misbehaved("it changed the token ids of a prompt, or cut it off")
        return Reply(_ids(said.get("tokens")), reason == "eos")

    def probe(self, served: Served) -> dict[str, Any]:
        return {"content": PROBE, "add_special": False, "parse_special": False}


DIALECTS: tuple[Dialect, ...] = (VLLM(), SGLang(), LlamaCpp())


def find_dialect(models: Mapping[str, Any], where: str) -> tuple[Dialect, Mapping[str, Any]]:
    """The engine that gave this list of models, and the entry of its only model that is no adapter.

    Raises `BadInput` for an engine that is not known to give token ids.
    """
    cards = models.get("data")
    cards = [card for card in cards if isinstance(card, Mapping)] if isinstance(cards, list) else []
    cards = [card for card in cards if card.get("parent") is None and isinstance(card.get("id"), str)]
    owners = {str(card.get("owned_by"))[:40] for card in cards}
    for dialect in DIALECTS:
        if owners == {dialect.owner}:
            if len(cards) > 1:
                raise BadInput(f"{where}: serves {len(cards)} models; start one that serves this model alone")
            return dialect, cards[0]
    known = ", ".join(dialect.name for dialect in DIALECTS)
    said = f"its models are owned by {', '.join(sorted(owners))}" if owners else "it names no model"
    raise BadInput(f"{where}: is none of {known}, which take and give token ids ({said})")


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise Misbehaved("its token ids are no list of numbers")
    return list(value)


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    return value[:200] if isinstance(value, str) and value else None


def _count(record: Mapping[str, Any], name: str) -> int | None:
    value = record.get(name)
    return value if type(value) is int and value > 0 else None
