"""Rendering of chat templates in a process of its own: a template is a stranger's program.

transformers renders in jinja's sandbox, where a template reaches nothing but what it is given. But it may loop for
years, or double a text until the memory is full; a process can be given limits and ended. It is a fork of this one, so
that it needs no time to start and renders just as transformers does here; a conversation takes it a tenth of a
millisecond or so.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import socket
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers.utils import chat_template_utils

from rac_engine.base.sizes import format_bytes
from rac_engine.traces.conversation import Messages

SECONDS = 20.0
"""Time that a conversation may take."""

MEMORY = 1 << 30
"""Bytes of memory that rendering may take."""

LONGEST = 8 << 20
"""Characters of what is rendered, at most; to tokenize them takes a hundred bytes each."""


class Unrendered(Exception):
    """A template that refuses a conversation, or takes too much for it; the words say why."""


class Renderer:
    """The process that renders by a tokenizer's chat template as it is now; started when first asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.template = tokenizer.chat_template
        ours, its = socket.socketpair()
        with warnings.catch_warnings():
            # Python warns of other threads, whose locks stay locked in a fork: it takes none but the interpreter's.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if self._process == 0:
            _serve(its, tokenizer)
        its.close()
        self._socket = ours

    def render(self, messages: Messages, arguments: Mapping[str, Any], moment: datetime, answered: bool = False) -> str:
        """The conversation as text, up to where the answer begins unless it is `answered`. Raises `Unrendered`."""
        asked = {"messages": messages, "arguments": dict(arguments), "moment": moment.isoformat()}
        try:
            return self._ask({**asked, "answered": answered})
        except BaseException as error:
            if not isinstance(error, Unrendered):
                self.stop()
            raise

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process:
            self._socket.close()
            with suppress(OSError):
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
            self._process = 0

    @property
    def stopped(self) -> bool:
        """Whether it has been ended."""
        return not self._process

    def _ask(self, request: dict[str, Any]) -> str:
        until = time.monotonic() + SECONDS
        said = bytearray()
        try:
            self._socket.settimeout(SECONDS)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while not said.endswith(b"\n"):
                self._socket.settimeout(max(until - time.monotonic(), 0.001))
                if not (piece := self._socket.recv(1 << 20)):
                    raise ConnectionResetError
                said += piece
        except TimeoutError:
            self.stop()
            raise Unrendered(f"takes more than {SECONDS:g} s for it; that is no prompt") from None
        except ConnectionError:
            self.stop()
            raise Unrendered("brought down the process that rendered it") from None
        answer = json.loads(said)
        if "text" not in answer:
            raise Unrendered(answer["refused"])
        return str(answer["text"])


def _serve(its: socket.socket, tokenizer: Any) -> None:
    """Answer requests until the other end is closed; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.freeze()  # what the parent has is not to be looked after here
        _close_all_but(its.fileno())
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        limits = [most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        for line in its.makefile("rb"):
            its.sendall(_answer(json.loads(line), tokenizer) + b"\n")
    finally:
        os._exit(0)


def _close_all_but(kept: int) -> None:
    """Close files that the parent had open, locks of jobs and ends of pipes among them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.closerange(3, kept)
    os.closerange(kept + 1, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], kept + 2))


def _answer(request: dict[str, Any], tokenizer: Any) -> bytes:
    random.seed(0)  # a template may draw lots; the same prompt is to be the same text all the same
    # The clock that transformers gives templates: what they are given besides may be plain data alone.
    vars(chat_template_utils)["datetime"] = _Stopped(datetime.fromisoformat(request["moment"]))
    try:
        text = tokenizer.apply_chat_template(
            request["messages"],
            add_generation_prompt=not request["answered"],
            tokenize=False,
            **request["arguments"],
        )
        if len(text) > LONGEST:
            return _refused(f"makes {len(text):,} characters of it; that is no prompt")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return _refused(f"takes more than {format_bytes(MEMORY)} for it; that is no prompt")
    except Exception as error:  # a template may refuse a conversation with any exception of its own
        return _refused(f"refuses it: {' '.join(str(error).split())[:300]}")


class _Stopped:
    """A clock that stands still."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment

    def now(self) -> datetime:
        """The moment at which it stands."""
        return self._moment


def _refused(why: str) -> bytes:
    return json.dumps({"refused": why}).encode()


_renderers: weakref.WeakKeyDictionary[Any, Renderer] = weakref.WeakKeyDictionary()


def renderer_of(tokenizer: Any) -> Renderer:
    """The process that renders by this tokenizer's template; ended with the tokenizer, or by `stop_rendering`."""
    found = _renderers.get(tokenizer)
    if found is None or found.stopped or found.template != tokenizer.chat_template:
        stop_rendering(tokenizer)
        found = _renderers[tokenizer] = Renderer(tokenizer)
        weakref.finalize(tokenizer, found.stop)
    return found


def stop_rendering(tokenizer: Any) -> None:
    """End the process that renders by this tokenizer's template, if there is one: the next prompt starts another.

    A fork keeps memory as it was when it began; a job that goes on for hours should not leave it standing.
    """
    if (found := _renderers.pop(tokenizer, None)) is not None:
        found.stop()
