"""Traces: prompts with the model's own completions, sampled, stored, and read back as calibration tokens.

Begin at `generate`, which samples traces into Parquet files with a `Decoder`, and at `load_calibration`, which reads
these and other layouts (JSONL, text) as `TokenSequence`s. Token ids are the truth: a trace is never rendered or
tokenized again. A chat template is applied in `template.render` alone.
"""

from __future__ import annotations

from rac_engine.traces.calibration import Calibration, TokenSequence, Weighting, load_calibration
from rac_engine.traces.conversation import Messages, instructed
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.endings import cut_off_notes
from rac_engine.traces.generation import TRACE_TOKEN_BYTES, TraceReport, generate
from rac_engine.traces.held_out import FEWEST, HoldingOut, hold_out
from rac_engine.traces.memory import Rates, Room, SamplingPlan, SamplingShape, Sequences, plan_sampling
from rac_engine.traces.mixture import mixed, source_of
from rac_engine.traces.prompts import prompts_of
from rac_engine.traces.questions import answer_of, id_of, question_of
from rac_engine.traces.records import read_records
from rac_engine.traces.rendering import stop_rendering
from rac_engine.traces.replaced import ordinary_tokens, with_replaced
from rac_engine.traces.sampler import Sampler, require_embedding
from rac_engine.traces.sampling import Request, Sampling, at_a_time, request_key
from rac_engine.traces.served import open_sampler, text_bytes
from rac_engine.traces.snapshot import Snapshots
from rac_engine.traces.template import dated, has_date, moment_of, read_moment
from rac_engine.traces.tokenizer import load_tokenizer

__all__ = [
    "FEWEST",
    "TRACE_TOKEN_BYTES",
    "Calibration",
    "Decoder",
    "HoldingOut",
    "Messages",
    "Rates",
    "Request",
    "Room",
    "Sampler",
    "Sampling",
    "SamplingPlan",
    "SamplingShape",
    "Sequences",
    "Snapshots",
    "TokenSequence",
    "TraceReport",
    "Weighting",
    "answer_of",
    "at_a_time",
    "cut_off_notes",
    "dated",
    "generate",
    "has_date",
    "hold_out",
    "id_of",
    "instructed",
    "load_calibration",
    "load_tokenizer",
    "mixed",
    "moment_of",
    "open_sampler",
    "ordinary_tokens",
    "plan_sampling",
    "prompts_of",
    "question_of",
    "read_moment",
    "read_records",
    "request_key",
    "require_embedding",
    "source_of",
    "stop_rendering",
    "text_bytes",
    "with_replaced",
]
