"""A model that a server runs: prompts are rendered here, by the checkpoint's tokenizer, and continued there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.checkpoint import Checkpoint
from rac_engine.models import Model
from rac_engine.recipe import EvalSettings, TraceSettings
from rac_engine.traces.conversation import Messages
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.dialects import PROBE, Asked, Reply
from rac_engine.traces.memory import Room, Sequences
from rac_engine.traces.sampler import Sampler
from rac_engine.traces.sampling import Completion, FinishReason, Progress, Request, Sampling, at_a_time, batch_key
from rac_engine.traces.servers import Pool, Server, open_server


def open_sampler(
    path: str | Path,
    device: str,
    serving: TraceSettings | EvalSettings,
    device_memory: int | None = None,
    host_memory: int | None = None,
    text: int = 0,
) -> Sampler:
    """The model of a local folder, run by the servers in `serving` if there are any, else here, on `device`.

    Here it keeps to `device_memory` and `host_memory`, in bytes; `text` are the bytes of the longest prompt. Raises
    `BadInput` where it cannot.
    """
    if serving.server:
        return ServedModel(path, serving)
    room = Room.here(torch.device(device), device_memory, host_memory)
    prompt = max(_PROMPT, _AROUND + (text + len(serving.instruction)) // _TOKEN)
    asked = Sequences(at_a_time(serving.batch_size), prompt + serving.max_new_tokens, prompt)
    return Decoder(path, device, room=room, asked=asked)


# Memory is planned before prompts are rendered: tokens of one at least, those of a template around it, and bytes of
# text that a token stands for at least, as a rule.
_PROMPT, _AROUND, _TOKEN = 1024, 512, 3


def text_bytes(messages: Messages) -> int:
    """Bytes of a prompt's text."""
    return len(json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace"))


class ServedModel(Sampler):
    """A causal LM that one or several servers run, with the tokenizer of the folder that it came from.

    What a server runs is held against the folder as far as it can be: the tokens of a text, and the model's name. No
    server tells a checksum of its weights. Raises `BadInput` for a server that cannot be used.
    """

    def __init__(self, path: str | Path, serving: TraceSettings | EvalSettings) -> None:
        source = Model.open(Checkpoint.open(path))
        super().__init__(source)
        self.embedded = source.checkpoint.tensors[source.family.embedding].shape[0]
        servers = [open_server(url, serving.in_flight, serving.request_seconds) for url in serving.server]
        for server in servers:
            self._hold_against(server, source.checkpoint.path)
        self.pool = Pool(servers, serving.in_flight, max(self.embedded, self.vocabulary))

    def _hold_against(self, server: Server, folder: Path) -> None:
        """Check what a server runs, and note what cannot be checked."""
        served, where = server.served, f"{server.url} ({server.dialect.name})"
        own, theirs = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"], server.tokens_of_probe()
        if theirs is None:
            self.notes.append(f"{where}: does not say how it splits text; its tokenizer was not compared")
        elif theirs != own:
            raise BadInput(f"{where}: splits text into other tokens than {folder}: it runs another model")
        names = {Path(name).name.lower() for name in (served.root, served.model) if name}
        if folder.resolve().name.lower() not in names and folder.name.lower() not in names:
            shown = served.root or served.model
            self.notes.append(f"{where}: runs {shown!r}, which is taken to be this model; no server tells a checksum")
        if served.context is not None:
            self.context = min(served.context, self.context or served.context)
        self.notes.append(f"{where}: {server.dialect.promise}")

    def identity(self) -> dict[str, Any]:
        return {"engine": self.engine}

    @property
    def engine(self) -> str:
        """The servers' programs and versions."""
        found = {f"{each.dialect.name} {each.served.version or ''}".strip() for each in self.pool.servers}
        return ", ".join(sorted(found))

    def record(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "servers": [
                {"url": each.url, "engine": each.dialect.name, "version": each.served.version}
                | {"model": each.served.model, "root": each.served.root}
                for each in self.pool.servers
            ],
        }

    def choose_threads(self, journal: Path, rows: int, restart: bool = False) -> dict[str, Any]:
        return {}

    def decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        rows: int,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        snapshots, key, began = self.snapshots, batch_key(requests, sampling, rows), time.monotonic()
        found = snapshots.read() if snapshots is not None else None
        if snapshots is not None and found is not None and found.state["batch"] == key:
            completions = {index: Completion(ids, finish) for index, ids, finish in found.state["completions"]}
            snapshots.seconds = found.state["seconds"]
            began -= snapshots.seconds
        asked = {at: self._asked(each, sampling) for at, each in enumerate(requests) if at not in completions}
        tokens = sum(len(done.token_ids) for done in completions.values())

        def keep() -> None:
            if snapshots is not None:
                kept = [[at, done.token_ids, done.finish] for at, done in completions.items()]
                snapshots.write({"batch": key, "seconds": time.monotonic() - began, "completions": kept}, [], 0)

        def take(index: int, reply: Reply) -> None:
            nonlocal tokens
            completions[index] = self._completion(asked[index], reply, sampling)
            tokens += len(completions[index].token_ids)
            if snapshots is not None and snapshots.due(lambda: 8 * tokens):
                keep()
            rate = tokens / max(time.monotonic() - began, 1e-9)
            progress(Progress(len(completions), len(requests), tokens, rate))

        try:
            self.pool.ask_all(list(asked.items()), take)
        except (Interrupted, KeyboardInterrupt):
            keep()
            raise
        lost = [f"{url}: was left out: {error}" for url, error in self.pool.lost.items()]
        self.notes += [note for note in lost if note not in self.notes]
        return [completions[index] for index in range(len(requests))]

    def _asked(self, request: Request, sampling: Sampling) -> Asked:
        room = sampling.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(request.prompt))
        seed = request.key >> 1  # engines take seeds of 63 bits
        return Asked(
            [int(token) for token in request.prompt],
            room,
            sampling.temperature,
            sampling.top_p,
            seed,
            sorted(self.stops),
        )

    def _completion(self, asked: Asked, reply: Reply, sampling: Sampling) -> Completion:
        """What a reply says, up to the first token that ends an answer."""
        ids = reply.token_ids
        end = next((at + 1 for at, token in enumerate(ids) if token in self.stops), None)
        if end is not None:
            return Completion(ids[:end], "stop")
        if reply.stopped and ids:
            return Completion(ids, "stop")
        cut: FinishReason = "length" if len(ids) >= sampling.max_new_tokens else "context"
        return Completion(ids[: asked.most], cut)
