"""RAC Engine: prunes reasoning language models, calibrated on their own chains of thought.

`trace` samples them, `prune` prunes a checkpoint, `evaluate` asks a model questions with known answers, `keep_zeros`
keeps the zeros of a pruned model that is trained on, `load` reads a packed or a dense model. What they need is imported
when they are called, so that `import rac_engine` (and `rac --help`) stays instant.

After `import rac_engine`, transformers loads packed folders too, as in `AutoModelForCausalLM.from_pretrained(PACKED)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_engine.base.imports import after_import

if TYPE_CHECKING:
    from torch import nn

    from rac_engine.engine import KeptZeros, PruneReport
    from rac_engine.evaluation import EvalResult
    from rac_engine.recipe import EvalSettings, PruneSettings, Recipe, TraceSettings
    from rac_engine.traces import Calibration, TraceReport

__version__ = "0.1.0"
__all__ = ["evaluate", "keep_zeros", "load", "prune", "trace"]


def _register() -> None:
    """Tell transformers of packed folders."""
    import rac_engine.serve.quantizer  # noqa: F401


after_import("transformers.quantizers.auto", _register)


def _silent(_: object) -> None:
    """Tells nobody."""


def trace(
    model: str | Path,
    settings: TraceSettings,
    out: str | Path,
    *,
    device: str = "auto",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[Any], None] = _silent,
) -> TraceReport:
    """Sample traces of the checkpoint `model` into the new folder `out`.

    Args:
        model: Folder of a Hugging Face checkpoint, or `org/name[@revision]` on the hub.
        settings: Prompts, token budget and sampling: `rac_engine.recipe.TraceSettings(prompts="P.jsonl", tokens=...)`.
        out: Folder for Parquet files (a row a trace, token ids and text) and the summary traces.json.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        restart: Start afresh where an unfinished sampling in OUT.partial would go on.
        device_memory: Bytes of the GPU that the job keeps to; where the model does not fit, its layers are streamed.
        host_memory: Bytes of this machine that the job keeps to, the whole process included, as for `prune`.
        progress: Called with what is being done; its `str` is for people.

    Returns the counts of traces and tokens. Raises `rac_engine.base.errors.BadInput` for what cannot work, and
    `rac_engine.base.errors.Interrupted` on SIGINT, after which the same call goes on to the same traces.
    """
    from rac_engine.jobs.surroundings import usable_device
    from rac_engine.traces import generate

    return generate(
        model,
        settings,
        out,
        device=usable_device(device),
        restart=restart,
        device_memory=device_memory,
        host_memory=host_memory,
        progress=progress,
    )


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | PruneSettings | str | Path | None = None,
    calibration: Calibration | None = None,
    *,
    device: str = "auto",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[str], None] = _silent,
) -> PruneReport:
    """Prune the checkpoint `model` into the new folder `out`, with a report beside the weights.

    Args:
        model: Folder of a Hugging Face checkpoint, or `org/name[@revision]` on the hub.
        out: Folder for the pruned checkpoint; it appears when it is whole. `out`/rac/report.html is the report.
        recipe: A recipe or the path of one, of which `calibration` and `prune` count, or pruning settings alone.
        calibration: Sequences to calibrate on, instead of what the recipe names.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        restart: Start afresh where an unfinished job in OUT.partial would go on.
        device_memory: Bytes of the GPU that the job keeps to.
        host_memory: Bytes of this machine that the job keeps to, the whole process included. It does where the
            program has called `prepare_process` (before it imports torch) and `give_back_freed`, both of
            `rac_engine.base.process`, as the `rac` command does: settings for good are the program's to make.
        progress: Called with what is being done, in words.

    Returns what was made, with a row a matrix. Raises `rac_engine.base.errors.BadInput` for what cannot work, and
    `rac_engine.base.errors.Interrupted` on SIGINT, after which the same call goes on to the same bytes.
    """
    from rac_engine.engine import prune as run
    from rac_engine.jobs.surroundings import usable_device
    from rac_engine.pack import pack_output
    from rac_engine.report import write_report

    return run(
        model,
        out,
        recipe,
        calibration,
        device=usable_device(device),
        restart=restart,
        device_memory=device_memory,
        host_memory=host_memory,
        progress=progress,
        finish=write_report,
        packer=pack_output,
    )


def evaluate(
    model: str | Path,
    settings: EvalSettings,
    out: str | Path,
    *,
    baseline: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[Any], None] = _silent,
) -> EvalResult:
    """Let `model` answer problems or predict tokens, and write the results to the new JSON file `out`.

    Args:
        model: Folder of a Hugging Face checkpoint, dense or pruned, or `org/name[@revision]` on the hub.
        settings: Problems and sampling: `rac_engine.recipe.EvalSettings(problems="Q.jsonl", ...)`; or files whose
            tokens are to be predicted, a layer at a time: `EvalSettings(perplexity=["TRACES", "text:FILE"])`; or both.
        out: File for accuracy, decode lengths and every answer, and for perplexity.
        baseline: Results of another model on the same problems or tokens, to be compared with one by one.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        restart: Start afresh where an unfinished evaluation in OUT.partial would go on.
        device_memory: Bytes of the GPU that the job keeps to; where the model does not fit, its layers are streamed.
        host_memory: Bytes of this machine that the job keeps to, the whole process included, as for `prune`.
        progress: Called with what is being done; its `str` is for people.

    Returns the results. Raises `rac_engine.base.errors.BadInput` for what cannot work, and
    `rac_engine.base.errors.Interrupted` on SIGINT, after which the same call goes on.
    """
    from rac_engine.evaluation import evaluate as run
    from rac_engine.jobs.surroundings import usable_device

    return run(
        model,
        settings,
        out,
        baseline=baseline,
        device=usable_device(device),
        restart=restart,
        device_memory=device_memory,
        host_memory=host_memory,
        progress=progress,
    )


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keep the zeros that the matrices of `model` have now while it is trained, as in recovery by fine-tuning.

    At a kept place the gradient is set to zero before it is accumulated, so that clipping, momentum and the moments of
    Adam never see it. And behind every step of an optimizer that has one of the matrices, the places are set to zero
    again: so weight decay, a state from an earlier training and optimizers that mix the elements of a matrix (Muon,
    Shampoo) bring none back. A mask takes a byte a weight.

    It works on plain torch parameters, those of a `DistributedDataParallel` model too. FSDP and DeepSpeed train flat or
    sharded copies that it does not see, and LoRA brings weights in when it is merged: call `apply()` of what is
    returned then, or `rac mask apply` on the files.

    Args:
        model: A pruned model, with its weights loaded. Matrices (two dimensions or more) with some zeros are kept;
            those that are zero all over, as LoRA's B begins, are not.

    Returns a handle: `apply()` sets the places to zero at once, `remove()` ends it, and so does the end of a `with`
    block. Raises `rac_engine.base.errors.BadInput` where no matrix has zeros.
    """
    from rac_engine.engine import keep_zeros as keep

    return keep(model)


def load(model: str | Path, *, device: str = "auto", **settings: Any) -> tuple[Any, Any]:
    """Load a packed checkpoint, or a dense one, for transformers: `model, tokenizer = rac_engine.load("PACKED")`.

    Args:
        model: Folder of a checkpoint, or `org/name[@revision]` on the hub.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        settings: Others of `AutoModelForCausalLM.from_pretrained`. The dtype is the checkpoint's unless it is given.

    Returns the model, whose matrices stay packed in memory, and its tokenizer. Raises
    `rac_engine.base.errors.BadInput` where there is no such checkpoint, or one without a tokenizer, and ValueError for
    packed matrices that are damaged.
    """
    from rac_engine.jobs.surroundings import usable_device
    from rac_engine.serve import load as run

    return run(model, device=usable_device(device), **settings)
