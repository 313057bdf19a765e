"""A plan as a page of text."""

from __future__ import annotations

from rac_engine.base.sizes import format_bytes, format_count, format_seconds, percent
from rac_engine.plan.memory import MemoryPlan
from rac_engine.plan.plan import Plan
from rac_engine.plan.sampling import sampling_lines
from rac_engine.plan.work import Work
from rac_engine.solve import MOST


def render(plan: Plan) -> str:
    """The plan as a page of text."""
    share = plan.weights / plan.parameters
    lines = [
        f"{plan.model}: {plan.model_type}, {plan.layers} layers, {format_count(plan.parameters)} parameters",
        f"{plan.matrices} matrices to prune, {format_count(plan.weights)} weights ({percent(share)} of all)",
        *plan.notes,
        "",
        "Matrices of a layer that share an input",
    ]
    rows = [
        (_names(stage.modules), f"{stage.rows} × {stage.columns}", format_bytes(stage.bytes)) for stage in plan.groups
    ]
    lines += _columns([("modules", "rows × columns", "Hessian" if plan.hessians else "norms"), *rows])
    by_reason: dict[str, list[str]] = {}
    for name, why in plan.left_dense.items():
        by_reason.setdefault(why, []).append(name.removesuffix(".weight"))
    for why, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"  {why}: {', '.join(names[:3])}{more}")
    lines += _gaps(plan)
    lines += ["", *_memory(plan)]
    lines += ["", "Disk"]
    if plan.packed is None:
        lines.append(f"  output  {format_bytes(plan.disk)}")
    else:
        lines.append(f"  output, packed  about {format_bytes(plan.packed)}")
        lines.append(f"  beside it until it is whole, the plain form  {format_bytes(plan.disk)}")
    if plan.memory.disk:
        lines.append(f"  activations, while it runs  {format_bytes(plan.memory.disk)}")
    if plan.memory.learning:
        lines.append(f"  while it is recovered  {format_bytes(plan.memory.learning)}")
    if plan.work:
        total = Work("all", sum(work.flops for work in plan.work), "")
        lines += ["", "Arithmetic", *_columns([(w.name, _flops(w.flops), w.rule) for w in [*plan.work, total]])]
    if plan.seconds is not None:
        lines += ["", f"Time: about {format_seconds(plan.seconds)}, at half of the peaks of what computes"]
    lines += sampling_lines(plan.sampling, plan.tokens)
    return "\n".join(lines)


def _gaps(plan: Plan) -> list[str]:
    """Lines on how far errors on other tokens are to be from those on the calibration's, and a warning."""
    known = [(group, group.gap) for group in plan.groups if group.gap is not None]
    if not known:
        return []
    said = dict.fromkeys(
        f"  {format_count(round(group.tokens))} tokens, {group.columns:,} inputs, {group.rows:,} outputs: "
        f"expect a held-out error {gap:.{2 if gap < 10 else 0}f} times the seen"
        for group, gap in known
    )
    lines = ["", "What the tokens teach, as measured on SmolLM2-135M (docs/methods.md)", *said]
    if max(gap for _, gap in known) > MOST:
        enough = format_count(max(group.enough or 0 for group, _ in known))
        lines.append(f"  warning: too few tokens; with {enough} no held-out error is beyond {MOST:g} times the seen")
    return lines


def _memory(plan: Plan) -> list[str]:
    """Lines on memory by phase, and on how the job goes about it."""
    memory, choice = plan.memory, plan.memory.choice
    lines = [f"Memory for {format_count(plan.tokens)} calibration tokens"]
    names = ["device", "host"] if memory.on_gpu else ["host"]
    for name in names:
        phases = [(phase.name, phase.device if name == "device" else phase.host) for phase in memory.phases]
        rows = [(phase, format_bytes(sum(parts.values()))) for phase, parts in phases]
        largest, parts = max(phases, key=lambda phase: sum(phase[1].values()))
        limit = memory.device_limit if name == "device" else memory.host_limit
        within = "" if limit is None else f" of {format_bytes(limit)}"
        lines += [f"  {name}, by phase", *_columns([(f"  {phase}", size) for phase, size in rows])]
        lines += [f"  {name}, at its peak ({largest})"]
        peak = format_bytes(sum(parts.values())) + within
        lines += _columns([*((f"  {what}", format_bytes(size)) for what, size in parts.items()), ("  peak", peak)])
    if kept := _kept_by_the_heap(memory):
        lines.append(f"  without --host-memory freed memory is kept for what comes: up to {format_bytes(kept)} more")
    where = {"device": "on the device", "host": "in host memory", "disk": "on disk"}[choice.place]
    meanwhile = "the next layer is read and the last one written meanwhile" if choice.overlap else "one layer at a time"
    if memory.alone:
        meanwhile += f", the latter before {' and '.join(memory.alone.values())}"
    together = f"{format_count(choice.chunk_tokens)} tokens go through a layer together"
    lines.append(f"  {together}; activations live {where}; {meanwhile}")
    if choice.judged:
        lines.append("  what is gathered is gathered of tokens held out too, by which every matrix is judged")
    if plan.passes:
        together = "all" if choice.hessians is None else f"{choice.hessians} at once"
        lines.append(
            f"  Hessians of a layer's experts are gathered {together}: {plan.passes} passes over the tokens of each"
        )
    return lines


def _kept_by_the_heap(memory: MemoryPlan) -> int:
    """Bytes that a CPU's job holds beyond the plan where no limit makes the process give back what it has freed.

    Measured at 1.3 to 1.8 times the activations of a chunk, which are made and freed over and over.
    """
    if memory.on_gpu or memory.host_limit is not None:
        return 0
    return 2 * max(phase.host.get("activations of a chunk", 0) for phase in memory.phases)


def _names(modules: list[str]) -> str:
    """`self_attn.q_proj, k_proj, v_proj`"""
    return ", ".join([modules[0], *(module.rpartition(".")[2] for module in modules[1:])])


def _flops(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 999.5:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of text, aligned: the first column to the left, the others to the right, a third and last to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), *(cell for cell in row[2:])]).rstrip()
        for row in rows
    ]
