"""The pruning job: load → calibrate → solve → propagate → write, one decoder layer after the other.

All work happens in OUT.partial, which becomes OUT by one rename at the end. A journal in it names the finished layers
with the SHA-256 of what was written. A job that is started again verifies those, sends the calibration tokens through
them once more, and goes on, to the same bytes as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rac_engine.base.errors import Damaged
from rac_engine.base.process import peak_memory
from rac_engine.checkpoint import CheckpointWriter, local_folder
from rac_engine.engine.closing import PruneReport, close_job
from rac_engine.engine.context import Context
from rac_engine.engine.layer_files import LayerFiles
from rac_engine.engine.limits import allocator_restored, limited_gpu
from rac_engine.engine.loop import prune_layers
from rac_engine.engine.metrics import load_metrics
from rac_engine.engine.packed import Packer, drop_packed, drop_packing, is_packed_whole, new_packing, take_place
from rac_engine.engine.setup import PruneRequest, Setup, describe, identity_of, set_up
from rac_engine.engine.streams import open_streams
from rac_engine.engine.survey import Allocation, FirstPass, allocate, allocated
from rac_engine.engine.verify import verify
from rac_engine.jobs.clock import Clock
from rac_engine.jobs.job import FolderJob
from rac_engine.jobs.journal import Journal
from rac_engine.jobs.layout import ALLOCATION, PRUNE_JOURNAL, RAC
from rac_engine.jobs.timeline import Timeline
from rac_engine.models import Model
from rac_engine.plan import packed_bytes
from rac_engine.recipe import PruneSettings, Recipe, absolute, dump, load_recipe
from rac_engine.traces import Calibration, dated, moment_of

REPLAY = "replay: embeddings, then every finished layer in turn, from the tensors that its record vouches for"
"""The rule by which a job that goes on has the activations again, as its journal names it."""


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | PruneSettings | str | Path | None = None,
    calibration: Calibration | None = None,
    *,
    device: str = "cpu",
    restart: bool = False,
    hessians: int | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    finish: Callable[[Path], object] = lambda _: None,
    packer: Packer | None = None,
) -> PruneReport:
    """Prune the checkpoint `model` into the new folder `out`.

    Args:
        model: Folder of a Hugging Face checkpoint, or `org/name[@revision]` on the hub.
        out: Folder for the pruned checkpoint; it appears when it is whole.
        recipe: A recipe or its file, of which the sections `calibration` and `prune` count, or the settings alone.
        calibration: Sequences to calibrate on, instead of what the recipe names.
        device: "cpu", "cuda" or "cuda:N".
        restart: Start afresh where a job found unfinished in OUT.partial would go on.
        hessians: Hessians of a stage that are gathered in one pass over the tokens at most, which changes no result; by
            default as many as the memory plan says.
        device_memory: Bytes of the GPU that the job keeps to.
        host_memory: Bytes of this machine that the job keeps to, the whole process included. It does where the program
            has called `prepare_process` and `give_back_freed` of `rac_engine.base.process`, as the `rac` command does.
        progress: Called with what is being done in words, with the time left once a layer has shown its pace.
        note: Called before the work begins with what the report will remark on the calibration.
        finish: Called with the whole folder before it becomes `out`, to put a report there.
        packer: `rac_engine.pack.pack_output`, for settings that say `pack`; without it they raise ValueError.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out, recipe = Path(out), _recipe(Path(model), recipe)
    if recipe.prune.pack and packer is None:
        raise ValueError("settings with `pack` need a `packer`")
    claim = FolderJob(out, model=recipe.model)
    with allocator_restored(), claim as job:  # before anything is read: a second process is refused at once
        request = PruneRequest(
            out=out,
            recipe=recipe.model_copy(update={"model": local_folder(model, progress)}),
            calibration=calibration,
            device=device,
            restart=restart,
            hessians=hessians,
            device_memory=device_memory,
            host_memory=host_memory,
            progress=progress,
            note=note,
            finish=finish,
            packer=packer if recipe.prune.pack else None,
        )
        report = _prune(request, job)
        job.publish()
    return report


def _prune(request: PruneRequest, job: FolderJob) -> PruneReport:
    """Prune in the folder that `job` has claimed, until it can be published."""
    partial = job.partial
    moment = moment_of(partial / PRUNE_JOURNAL, request.restart)
    with dated(moment) as dating:
        setup = set_up(request, partial)
    model, chunk = setup.model, setup.memory.choice.chunk_tokens
    run = describe(setup)
    identity = identity_of(setup, run)
    for remark in setup.remarks:
        request.note(remark)
    peak_memory(reset=True)
    with limited_gpu(setup.device, request.device_memory), torch.inference_mode():
        journal = job.open_journal(
            PRUNE_JOURNAL,
            identity,
            restart=request.restart,
            beside={
                "chunk_tokens": chunk,
                "judged": setup.memory.choice.judged,
                "activations": REPLAY,
                **dating.record(),
            },
            stopped=lambda: f"stopped with {min(job.done, model.layers)} of {model.layers} layers done",
            worthwhile=lambda: bool(job.done) or (partial / ALLOCATION).exists(),  # that of a first pass
        )
        if request.packer and (known := _packed_before(request, partial, model, job.done)) is not None:
            return known
        clock = Clock()
        allocation = _allocation(setup, partial, identity, clock, request.progress)
        context = _begin(setup, request, partial, journal, clock, allocation)
        prune_layers(context)
        recipe = dump(absolute(request.recipe))
        report = close_job(context, request.out, run, recipe, setup.remarks, setup.resident, job.notes)
        if request.packer is None or not _pack(request, request.packer, partial, model):
            request.finish(partial)
            _read_back(partial, model, request.progress)
    return report


def _pack(request: PruneRequest, packer: Packer, partial: Path, model: Model) -> bool:
    """Put the packed form of the finished job in the place of the plain one, unless it is no smaller."""
    folder = new_packing(partial)
    if not packer(partial, folder, request.out, request.recipe.prune.values, request.progress):
        drop_packing(partial)
        request.note("no matrix would become smaller by packing: the output has plain weights")
        return False
    request.finish(folder)
    _read_back(folder, model, request.progress)
    take_place(partial)
    return True


def _packed_before(request: PruneRequest, partial: Path, model: Model, layers: int) -> PruneReport | None:
    """What a job has come to that was stopped once its packed form was whole; None if it was not, or is damaged."""
    if not is_packed_whole(partial):
        return None
    drop_packing(partial)
    take_place(partial)
    if verify(partial, model.checkpoint, request.progress).problems:
        drop_packed(partial)
        return None
    known = load_metrics(partial / RAC)
    return PruneReport(request.out, known.run, known.matrices, known.end, layers, known.blocks, known.layers)


def _allocation(
    setup: Setup, partial: Path, identity: dict[str, Any], clock: Clock, progress: Callable[[str], None]
) -> Allocation | None:
    """The sparsity of each matrix, from a first pass over the tokens; None where it is the same for all."""
    layers = allocated(setup.model, setup.settings, setup.skipped)
    if setup.packing is None or not any(layers):
        return None
    with clock("first pass"):
        choice = setup.memory.choice
        job = FirstPass(setup.model, setup.settings, layers, setup.packing, choice, setup.device)
        return allocate(job, partial, identity, progress)


def _begin(
    setup: Setup,
    request: PruneRequest,
    partial: Path,
    journal: Journal,
    clock: Clock,
    allocation: Allocation | None,
) -> Context:
    """The job with its shards reserved on disk and its tokens embedded."""
    memory, timeline = setup.memory, Timeline()
    beside = memory.beside if setup.packing is not None else 0
    if setup.settings.pack:
        beside = max(beside, packed_bytes(setup.model, setup.settings, setup.skipped))
    writer = CheckpointWriter(setup.model.checkpoint, partial, beside)
    context = Context(
        model=setup.model,
        settings=setup.settings,
        skipped=setup.skipped,
        device=setup.device,
        memory=memory,
        hessians=request.hessians or memory.choice.hessians,
        allocation=allocation,
        files=LayerFiles(setup.model, writer, journal, clock, timeline, pin=memory.on_gpu),
        clock=clock,
        timeline=timeline,
        progress=request.progress,
    )
    if setup.packing is not None and context.last >= 0:
        open_streams(context, setup.packing, partial)
    return context


def _read_back(partial: Path, source: Model, progress: Callable[[str], None]) -> None:
    """Refuse to publish what does not read back as it should: a disk that lies is found out here, not by a user."""
    if problems := verify(partial, source.checkpoint, progress).problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Damaged(f"{partial}: the finished output is damaged: {problems[0]}{more}; run this again")


def _recipe(model: Path, recipe: Recipe | PruneSettings | str | Path | None) -> Recipe:
    """A recipe with `model` in it, from all that `prune` takes for one."""
    if recipe is None:
        recipe = PruneSettings()
    if isinstance(recipe, PruneSettings):
        return Recipe(model=model, prune=recipe)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    return recipe.model_copy(update={"model": model})
