"""Shapes that a job's memory depends on: inputs, stages and attention of its layers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rac_engine.calibrate import match_bytes, statistic_bytes
from rac_engine.checkpoint import find_format
from rac_engine.models import CALL_TOKENS, Model, Workspace, working_dtype, workspace
from rac_engine.recipe import PruneSettings
from rac_engine.solve import Needs, run_of_rows
from rac_kernels.ops import attention


@dataclass(frozen=True)
class Input:
    """An input of a stage that matrices [rows in all, columns] share; a stage may have `count` alike (experts)."""

    name: str
    rows: int
    columns: int
    largest: int
    """Rows of the largest matrix."""
    matrices: int
    attention: bool
    """Whether its block mixes tokens: an attention, or a recurrent mixer."""
    recurrent: bool
    """Whether what mixes them is a recurrent mixer."""
    entrance: bool
    """Whether it is the block's own input, behind its norm."""
    last: bool
    """Whether it is that of a block's last matrix, which is kept while that is solved."""
    inner: int = 3
    """Copies of a block's inner activations that exist while they are made."""
    count: int = 1
    key: tuple[int, int] = (0, 0)
    """The kind of its layer, and the number of its stage there."""

    @property
    def weights(self) -> int:
        """Elements of all its matrices."""
        return self.rows * self.columns * self.count

    @property
    def by_outputs(self) -> bool:
        """Whether what ties it to the dense model is its matrix's outputs, not the inputs."""
        return self.last or (self.count > 1 and self.matrices == 1 and self.rows < self.columns)

    def gathered(self, needs: Needs, tied: bool) -> int:
        """Bytes of what is gathered from one such input: its statistic and, where it is `tied` to the dense model, what
        ties it, but for the outputs of a block's last matrix."""
        own = statistic_bytes(self.columns, needs)
        if not tied or self.last:
            return own
        return own + match_bytes(self.columns, self.rows if self.by_outputs else None)


def dtype_of(model: Model, settings: PruneSettings, on_gpu: bool) -> torch.dtype:
    """The dtype of activations: the model's own or what is quicker, unless the settings name one."""
    return working_dtype(model.dtype, on_gpu) if settings.dtype == "auto" else getattr(torch, settings.dtype)


@dataclass(frozen=True)
class Attention:
    """An attention, as far as memory depends on it."""

    queries: int
    """Elements of a token's queries."""
    key_values: int
    """Elements of keys and values a token."""
    group: int
    """Query heads to a key."""
    widths: int
    """Width of a key and a value together."""
    head: int
    """Width of a query."""
    open: bool
    """Whether there are soft caps or sinks, which no kernel of PyTorch's knows."""
    window: int | None

    @classmethod
    def of(cls, model: Model) -> Attention:
        config = model.config
        heads = int(config.num_attention_heads)
        # Where layers differ, transformers does not tell of them all at once.
        each = list(getattr(config, "per_layer_config", None) or [config])
        key_heads = max(int(getattr(one, "num_key_value_heads", None) or heads) for one in each)
        width = max(int(getattr(one, "head_dim", None) or model.hidden_size // heads) for one in each)
        keys = _most_rows(model, "k_proj") or key_heads * width  # of the layer with the most, where they differ
        values = _most_rows(model, "v_proj") or keys
        key_values, widths, group = keys + values, width + width * values // keys, heads // key_heads
        if latent := getattr(config, "kv_lora_rank", None):
            # The cache holds the latent; keys and (widened) values are made of it for all tokens so far.
            width = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
            key_values = int(latent) + int(config.qk_rope_head_dim) + 3 * heads * width
            widths, group = 2 * width, 1
        return cls(
            queries=heads * width,
            key_values=key_values,
            group=group,
            widths=widths,
            head=width,
            open=model.needs_eager_attention,
            window=getattr(config, "sliding_window", None) or None,
        )

    def passing(self, shape: Shape, chunk: int, longest: int, on_gpu: bool) -> int:
        """Bytes of a chunk on its way through it: queries, keys and their rotations, norms in fp32, what comes out."""
        size = shape.size
        rotating = shape.hidden + 4 * self.queries + 2 * self.key_values
        normed = (shape.hidden + self.queries) * size + 8 * self.queries
        most = 0
        for window in {None, self.window if self.window is not None and self.window < longest else None}:
            device, dtype = torch.device("cuda" if on_gpu else "cpu"), {2: torch.bfloat16, 4: torch.float32}[size]
            fused = not self.open and attention.is_fused(device, dtype, self.head, window)
            masked = not on_gpu and (window is not None or longest > chunk)
            sizes = attention.AttentionShape(chunk, longest, self.group, self.widths, window)
            most = max(most, attention.workspace(sizes, fused, size if masked else 0))
        attending = chunk * size * (shape.hidden + 3 * self.queries + self.key_values) + most
        return max(chunk * rotating * size, chunk * normed, attending)


@dataclass(frozen=True)
class Recurrent(Workspace):
    """The recurrent mixers, as far as memory depends on them."""

    @classmethod
    def of(cls, model: Model, size: int) -> Recurrent:
        each = [workspace(mixer, size) for plan, mixer in model.mixers() if plan.recurrent] or [Workspace()]
        return cls(max(one.token for one in each), max(one.state for one in each))

    def passing(self, shape: Shape, chunk: int, width: int) -> int:
        """Bytes of a chunk on its way through it: what has come out of `width`, twice while it is put together."""
        call = min(chunk, CALL_TOKENS)
        return call * self.token + 2 * self.state + chunk * shape.size * (shape.hidden + 2 * width)


@dataclass(frozen=True)
class Stage:
    """Inputs that are looked at in one pass over the tokens, and what has become of the layer before."""

    inputs: tuple[Input, ...]
    before: int
    """Weights of the block that are pruned by then."""
    gone: int
    """Weights of the blocks before it."""

    @property
    def name(self) -> str:
        """Names of its inputs, or of the experts' alone."""
        routed = [found.name for found in self.inputs if found.count > 1]
        return ", ".join(routed or [found.name for found in self.inputs])


@dataclass(frozen=True)
class Shape:
    """A model, as far as a job's memory depends on it: the largest layer, in bytes and elements."""

    hidden: int
    layer_bytes: int
    """Bytes of its weights as they are on disk."""
    weight_size: int
    """Bytes of a weight on disk."""
    size: int
    """Bytes of an activation."""
    embedding_bytes: int
    quantized_bytes: int
    """Bytes of the largest matrix as it lies quantized in the files, at most one a weight."""
    attention: Attention
    recurrent: Recurrent
    stages: tuple[Stage, ...]
    """Inputs that are looked at together, of the largest layer and of the first."""

    head: Stage | None = None
    """The stage of lm_head, if it is to be pruned."""
    head_bytes: int = 0
    layers: int = 0
    weights: int = 0
    """Elements of all matrices of the decoder layers."""
    vocabulary: int = 0

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Inputs of all stages."""
        return tuple(found for stage in self.stages for found in stage.inputs)

    @classmethod
    def of(cls, model: Model, settings: PruneSettings, on_gpu: bool) -> Shape:
        """The shape of a model that goes through in the dtype of the settings."""
        infos = model.checkpoint.tensors
        dtype = dtype_of(model, settings, on_gpu)
        # Layers of one kind are alike: the one with the most bytes and the first of each kind are looked at.
        sizes = [sum(infos[name].nbytes for name in model.tensor_names(layer)) for layer in range(model.layers)]
        largest = sizes.index(max(sizes))
        stages = list[Stage]()
        others = [layer for layer in model.first_layers() if model.kind(layer) != model.kind(largest)]
        for layer in (largest, *others):
            stages += [found for found in _stages(model, layer, settings.order == "layer") if found not in stages]
        head: Stage | None = None
        if "lm_head" in settings.also:
            (matrix,) = model.matrices(model.layers)
            run = run_of_rows(matrix.rows, matrix.columns)
            head = Stage((Input(matrix.module, matrix.rows, matrix.columns, run, 1, False, False, True, False),), 0, 0)
        return cls(
            head=head,
            head_bytes=0 if head is None else infos[model.family.head].nbytes,
            hidden=model.hidden_size,
            layer_bytes=max(sizes),
            weight_size=model.matrices(largest)[0].dtype.itemsize,
            size=dtype.itemsize,
            embedding_bytes=infos[model.family.embedding].nbytes * (2 if "embeddings" in settings.also else 1),
            quantized_bytes=0 if find_format(model.checkpoint.config) is None else _largest(model, largest),
            attention=Attention.of(model),
            recurrent=Recurrent.of(model, dtype.itemsize),
            stages=tuple(stages),
            layers=model.layers,
            weights=sum(matrix.rows * matrix.columns for matrix in model.prunable()),
            vocabulary=infos[model.family.embedding].shape[0],
        )


def _most_rows(model: Model, part: str) -> int:
    """Rows of the largest matrix of that name in the layers' attention; 0 if there is none."""
    names = (
        f"{model.family.layers}{layer}.{model.plans(layer)[0].module}.{part}.weight" for layer in range(model.layers)
    )
    infos = model.checkpoint.tensors
    return max((infos[name].shape[0] for name in names if name in infos), default=0)


def _largest(model: Model, layer: int) -> int:
    """Elements of the layer's largest matrix."""
    return max(matrix.rows * matrix.columns for matrix in model.matrices(layer))


def _stages(model: Model, layer: int, at_once: bool) -> Iterator[Stage]:
    """Stages of a layer; one of all inputs where they are looked at at once."""
    inputs = list(_inputs(model, layer))
    if at_once:
        yield Stage(tuple(found for _, _, found in inputs), 0, 0)
        return
    done = Counter[int]()
    for (block, _), alike in itertools.groupby(inputs, key=lambda entry: entry[:2]):
        own = tuple(found for _, _, found in alike)
        yield Stage(own, done[block], done.total() - done[block])
        done[block] += sum(found.weights for found in own)


def _inputs(model: Model, layer: int) -> Iterator[tuple[int, int, Input]]:
    """Every input with the numbers of its block and stage."""
    plans = model.plans(layer)
    groups = [list(same) for _, same in itertools.groupby(model.matrices(layer), key=lambda matrix: matrix.group)]
    first = {block: min(g[0].stage for g in groups if g[0].group.block == block) for block in range(len(plans))}
    for (stage, routed), alike in itertools.groupby(
        groups, key=lambda group: (group[0].stage, group[0].group.expert is not None)
    ):
        every = list(alike)
        for group in every[:1] if routed else every:
            block = group[0].group.block
            plan = plans[block]
            parts = max(len(g) for g in groups if g[0].stage == first[block])
            found = Input(
                name=", ".join(matrix.module for matrix in group) + (f" and {len(every) - 1} more" if routed else ""),
                rows=sum(matrix.rows for matrix in group),
                columns=group[0].columns,
                largest=max(matrix.rows for matrix in group),
                matrices=len(group),
                attention=plan.mixes,
                recurrent=plan.recurrent,
                entrance=stage == first[group[0].group.block],
                last=plan.experts is None and plan.beside is None and group[0].module == f"{plan.module}.{plan.output}",
                # The gate's, as it comes and activated, and the up's; one matrix for both is taken apart once made.
                inner=3 if parts > 1 else 4 if plan.experts is None else 6,
                count=len(every) if routed else 1,
                key=(model.kind(layer), stage),
            )
            yield block, stage, found
