"""Servers that sample: requests over HTTP, a bounded number at a time to each, tried again where that may help."""

from __future__ import annotations

import json
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import httpx2

from rac_engine.base.errors import BadInput, Interrupted, one_line
from rac_engine.traces.dialects import Asked, Dialect, Misbehaved, Reply, Served, Unlucky, find_dialect

API_KEY = "RAC_API_KEY"
"""Variable of the environment with a key for servers that ask for one; it is never written anywhere."""

TRIES = 6

LONGEST_WAIT = 60.0  # seconds between two tries

_CONNECT_SECONDS = 10.0

_ASIDE = 64 << 10  # bytes of a reply beside what its tokens take

_PER_TOKEN = 64  # bytes of a reply: its number and its text

_PASSING = (408, 425, 429, 500, 502, 503, 504, 529)


@dataclass(frozen=True)
class Server:
    """A server that was asked what it is."""

    url: str
    client: httpx2.Client
    dialect: Dialect
    served: Served

    def ask(self, asked: Asked) -> Reply:
        """One request. Raises `Misbehaved`, `Unlucky` and `BadInput`."""
        most = _ASIDE + _PER_TOKEN * (asked.most + 2 * len(asked.prompt))
        body = self.dialect.body(self.served, asked)
        reply = self.dialect.reply(_call(self.client, self.url, "POST", self.dialect.path, body, most), asked)
        if len(reply.token_ids) > asked.most + 1:
            raise Misbehaved(f"it gave {len(reply.token_ids):,} tokens where {asked.most:,} were asked for")
        return reply

    def tokens_of_probe(self) -> list[int] | None:
        """The tokens that it makes of `PROBE`; None where it does not say."""
        try:
            said = _call(self.client, self.url, "POST", "/tokenize", self.dialect.probe(self.served), _ASIDE)
        except (BadInput, Misbehaved, Unlucky):
            return None
        tokens = said.get("tokens")
        return tokens if isinstance(tokens, list) and all(type(token) is int for token in tokens) else None


def open_server(url: str, in_flight: int, seconds: float) -> Server:
    """Ask a server what it is; a request may take so many seconds. Raises `BadInput` where it cannot be used."""
    key = os.environ.get(API_KEY)
    client = httpx2.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=httpx2.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None),
        limits=httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
        follow_redirects=False,
    )
    try:
        dialect, card = find_dialect(_call(client, url, "GET", "/v1/models", None, 1 << 20), url)
        try:
            described = _call(client, url, "GET", dialect.described, None, 4 << 20)
        except (BadInput, Misbehaved, Unlucky):
            described = {}
        return Server(url, client, dialect, dialect.served(card, described))
    except (Misbehaved, Unlucky) as error:
        raise BadInput(f"{url}: {error}; start the server, or name another with --server") from None


def _call(
    client: httpx2.Client, url: str, method: str, path: str, body: dict[str, Any] | None, most: int
) -> dict[str, Any]:
    """The JSON object in a reply of at most so many bytes. Raises `Misbehaved`, `Unlucky` and `BadInput`."""
    data, taken = bytearray(), False
    try:
        with client.stream(method, path, json=body) as response:
            for piece in response.iter_bytes():
                data += piece
                if taken := len(data) > most:
                    break
            status, headers = response.status_code, response.headers
    except httpx2.HTTPError as error:
        reason = one_line(str(error))[:200] or type(error).__name__
        raise Unlucky(f"it cannot be reached ({reason})") from None
    if status in _PASSING:
        raise Unlucky(f"HTTP {status}", _seconds(headers.get("retry-after")))
    if 300 <= status < 400:
        raise Misbehaved(f"it points to another place (HTTP {status}); give that one's URL")
    if status in (401, 403):
        raise BadInput(f"{url}: wants a key (HTTP {status}); put it into {API_KEY} of the environment")
    if status >= 400:
        said = one_line(bytes(data[:2000]).decode("utf-8", "replace"))[:300]
        raise BadInput(f"{url}{path}: HTTP {status}: {said}")
    if taken:
        raise Misbehaved(f"its reply is longer than the {most:,} bytes that it may have")
    try:
        found = json.loads(bytes(data))
    except (ValueError, RecursionError):
        raise Unlucky("its reply is cut off, or no JSON") from None
    if not isinstance(found, dict):
        raise Misbehaved("its reply is no JSON object")
    return found


def _seconds(text: str | None) -> float | None:
    try:
        return min(max(float(text or ""), 0.0), LONGEST_WAIT)
    except ValueError:
        return None


class Pool:
    """Servers that share the requests: each takes the next one as soon as it has room, so a quick one does more.

    A server that fails `TRIES` times at one request, or whose replies cannot be used, is left out, and what it had is
    done by the others.
    """

    def __init__(self, servers: Sequence[Server], in_flight: int, tokens: int) -> None:
        """Share requests among `servers`, `in_flight` at a time to each, of a model that has so many `tokens`."""
        self.servers, self.in_flight, self.tokens = list(servers), in_flight, tokens
        self.lost: dict[str, Exception] = {}
        """Servers that were left out, by their URLs, and why."""

    def ask_all(self, asked: Sequence[tuple[int, Asked]], take: Callable[[int, Reply], None]) -> None:
        """Ask everything, each under its number, and hand the replies to `take`, in the order in which they come.

        Raises `BadInput` where a server says that a request is wrong, or all of them misbehave, and `Interrupted` where
        none can be reached any more.
        """
        work = _Work(deque(asked))
        threads = [
            threading.Thread(target=self._work, args=(server, work), daemon=True)
            for server in self.servers
            if server.url not in self.lost
            for _ in range(min(self.in_flight, len(asked)))
        ]
        try:
            for thread in threads:
                thread.start()
            alive, left = len(threads), len(asked)
            while left:
                if not alive:
                    self._give_up()
                done = work.done.get()
                if done is None:
                    alive -= 1
                elif isinstance(done, Exception):
                    raise done
                else:
                    left -= 1
                    take(*done)
        finally:
            work.stop()

    def _work(self, server: Server, work: _Work) -> None:
        """Ask one request after another, until there are none, or the server is lost."""
        try:
            while (given := work.next()) is not None:
                number, asked = given
                reply = None if server.url in self.lost else self._try(server, asked, work)
                if reply is None:
                    work.again(given)
                    return
                work.finish(number, reply)
        except Exception as error:
            work.done.put(error)
        finally:
            work.done.put(None)

    def _try(self, server: Server, asked: Asked, work: _Work) -> Reply | None:
        """The reply to a request; None where the server is lost, or all is to stop."""
        for number in range(TRIES):
            try:
                reply = server.ask(asked)
                if any(not 0 <= token < self.tokens for token in reply.token_ids):
                    raise Misbehaved("it gave a token that the model has none of: it runs another model")
                return reply
            except Misbehaved as error:
                self.lost.setdefault(server.url, error)
                return None
            except Unlucky as error:
                if number == TRIES - 1:
                    self.lost.setdefault(server.url, error)
                    return None
                wait = min(0.5 * 2**number * (1 + random.random()), LONGEST_WAIT)
                if work.stopped.wait(wait if error.after is None else error.after) or server.url in self.lost:
                    return None
        return None

    def _give_up(self) -> None:
        said = "; ".join(f"{url}: {error}" for url, error in self.lost.items())
        if all(isinstance(error, Misbehaved) for error in self.lost.values()):
            raise BadInput(said)
        raise Interrupted(f"no server is left ({said})")


class _Work:
    """Requests that wait, and the replies to others. Workers wait for what a lost server may still hand back."""

    def __init__(self, waiting: deque[tuple[int, Asked]]) -> None:
        self.waiting, self.left = waiting, len(waiting)
        self.changed = threading.Condition()
        self.stopped = threading.Event()
        self.done: SimpleQueue[tuple[int, Reply] | Exception | None] = SimpleQueue()

    def next(self) -> tuple[int, Asked] | None:
        """The next request; None once all are answered, or all is to stop."""
        with self.changed:
            while not self.waiting and self.left and not self.stopped.is_set():
                self.changed.wait()
            return self.waiting.popleft() if self.waiting and not self.stopped.is_set() else None

    def again(self, given: tuple[int, Asked]) -> None:
        """Hand a request back, for another server."""
        with self.changed:
            self.waiting.appendleft(given)
            self.changed.notify()

    def finish(self, number: int, reply: Reply) -> None:
        """Enter a reply."""
        with self.changed:
            self.left -= 1
            if not self.left:
                self.changed.notify_all()
        self.done.put((number, reply))

    def stop(self) -> None:
        """Let all workers end, those that wait for a server excepted, which end with their requests."""
        with self.changed:
            self.stopped.set()
            self.changed.notify_all()
