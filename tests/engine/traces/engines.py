"""Stand-ins for vLLM, SGLang and llama.cpp: HTTP servers in this process that answer by the fields of the real ones.

Field names and values are facts of the engines' own documentation. `sampled` is what they all say to a request.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 1  # the token that ends an answer of the example model
CONTEXT = 500


def sampled(seed: int, prompt: Sequence[int], most: int, temperature: float) -> list[int]:
    """Tokens that only the request decides: up to nine and the one that ends the answer."""
    drawn = hashlib.sha256(json.dumps([seed if temperature else 0, list(prompt)]).encode()).digest()
    said = [10 + byte % 80 for byte in drawn[: drawn[31] % 10]] + [END]
    return said[:most]


@dataclass
class Engine:
    """A server, what it was asked, and how it misbehaves."""

    kind: str
    tokenizer: Any
    fault: str = ""
    model: str = "abacus"
    key: str | None = None
    fails: int = 0
    """Requests that are answered by 503 first."""
    delay: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most: int = 0
    """Requests that were under way together, at most."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: int = 0


class _Answer(BaseHTTPRequestHandler):
    engine: Engine
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        engine = self.engine
        if engine.key and self.headers.get("Authorization") != f"Bearer {engine.key}":
            return self._send({"error": "no key"}, 401)
        owner = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp", "other": "somebody"}[engine.kind]
        card: dict[str, Any] = {"id": engine.model, "object": "model", "owned_by": owner}
        if engine.kind != "llama.cpp":
            card |= {"root": f"/models/{engine.model}", "max_model_len": CONTEXT, "parent": None}
        about = {
            "/v1/models": {"object": "list", "data": [card]},
            "/version": {"version": "0.32.0"} if engine.kind == "vllm" else None,
            "/get_server_info": {"version": "0.5.9", "model_path": f"/models/{engine.model}"},
            "/props": {
                "default_generation_settings": {"n_ctx": CONTEXT},
                "model_path": f"/models/{engine.model}.gguf",
                "build_info": "b8681",
            },
        }.get(self.path)
        return self._send(about or {"error": "unknown"}, 200 if about else 404)

    def do_POST(self) -> None:
        engine = self.engine
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            text = body["content"] if engine.kind == "llama.cpp" else body["prompt"]
            tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
            return self._send({"tokens": tokens[1:] if engine.fault == "tokenizer" else tokens})
        with engine.lock:
            engine.bodies.append(body)
            fails, engine.fails = engine.fails > 0, engine.fails - 1
            engine.under_way += 1
            engine.most = max(engine.most, engine.under_way)
        try:
            time.sleep(engine.delay)
            return self._misbehave(engine.fault) if engine.fault in _RAW else self._reply(body, fails)
        finally:
            with engine.lock:
                engine.under_way -= 1

    def _reply(self, body: dict[str, Any], fails: bool) -> None:
        engine = self.engine
        if fails:
            return self._send({"error": "busy"}, 503, {"Retry-After": "0"})
        if engine.fault == "bad request":
            return self._send({"error": {"message": "top_p must be in (0, 1]"}}, 400)
        paths = {"vllm": "/v1/completions", "sglang": "/generate", "llama.cpp": "/completion"}
        if self.path != paths[engine.kind]:
            return self._send({"error": "unknown"}, 404)
        return self._send(getattr(self, f"_{engine.kind.replace('.', '_')}")(body))

    def _said(self, prompt: list[int], most: int, seed: int, temperature: float) -> list[int]:
        ids = sampled(seed, prompt, most, temperature)
        match self.engine.fault:
            case "foreign token":
                return [10**6, *ids[1:]]
            case "too many":
                return [10] * (most + 5)
            case "no numbers":
                return [str(each) for each in ids]  # type: ignore[misc]
        return ids

    def _vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self._said(body["prompt"], body.get("max_tokens", 16), body["seed"], body["temperature"])
        choice = {"index": 0, "text": "…", "finish_reason": "stop" if ids[-1] == END else "length"}
        if self.engine.fault == "aborted":
            choice["finish_reason"] = "abort"
        if body.get("return_token_ids") and self.engine.fault != "text only":
            given = body["prompt"][1:] if self.engine.fault == "other prompt" else body["prompt"]
            choice |= {"token_ids": ids, "prompt_token_ids": given}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def _sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["sampling_params"]
        ids = self._said(body["input_ids"], asked["max_new_tokens"], asked["sampling_seed"], asked["temperature"])
        reason = {"type": "stop", "matched": END} if ids[-1] == END else {"type": "length", "length": len(ids)}
        about = {"id": "1", "finish_reason": reason, "prompt_tokens": len(body["input_ids"])}
        found = {"text": "…", "meta_info": about, "output_ids": [each for each in ids if each != END]}
        if self.engine.fault == "text only":
            del found["output_ids"]
        return found

    def _llama_cpp(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self._said(body["prompt"], body["n_predict"], body["seed"], body["temperature"])
        kind = "eos" if ids[-1] == END else "limit"
        tokens = ids if body.get("return_tokens") and self.engine.fault != "text only" else []
        return {
            "content": "…",
            "tokens": tokens,
            "stop": True,
            "stop_type": kind,
            "tokens_predicted": len(ids),
            "tokens_evaluated": len(body["prompt"]),
            "truncated": self.engine.fault == "other prompt",
        }

    def _misbehave(self, fault: str) -> None:
        match fault:
            case "redirect":
                self._send({}, 302, {"Location": "http://127.0.0.1:1/elsewhere"})
            case "no json":
                self._send(b'{"choices": [')
            case "cut off":
                self._send(b'{"choices"', 200, {"Content-Length": "1000"})
                self.close_connection = True
            case "endless":
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                try:
                    while True:
                        self.wfile.write(b"[" * 65536)
                except OSError:
                    return
            case "slow":
                time.sleep(3)

    def _send(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


_RAW = ("redirect", "no json", "cut off", "endless", "slow")


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    """Run a server at `engine.url`."""
    handler = type("Handler", (_Answer,), {"engine": engine})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
