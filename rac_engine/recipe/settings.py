"""Recipes: everything a job decides, as pydantic models that are written in YAML.

A recipe is the whole truth about a job: what the defaults filled in is saved beside the result (`dump`), and every
mistake is one line that names the file, the line and column, and the field. Relative paths are relative to the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_serializer,
    model_validator,
)

from rac_engine.base.errors import BadInput
from rac_engine.recipe.fields import (
    MOST_SOURCES,
    Columns,
    Count,
    FilePath,
    JobName,
    MethodName,
    ModelPath,
    ModuleName,
    PatternText,
    Seed,
    ServerURL,
    Settings,
    TemplateArguments,
    names_matrix,
    pruning_pattern,
    resolved_path,
    resolved_source,
    with_share,
)
from rac_engine.solve import DEFAULT_METHOD, find_method, method_names

if TYPE_CHECKING:
    from rac_engine.solve import Method

S = TypeVar("S", bound=Settings)

RESERVED_NAMES = ("dense", "pruned")

INSTRUCTION = "text added below each prompt, or put around it where it holds {prompt}: how to answer, for example"

RECORDS = "JSONL, JSON, CSV (.gz, .zst), Parquet, or a folder of `datasets`"

COLUMN = "column with the problem, or ROLE=NAME, where a file calls it otherwise: problem=Frage, answer=Antwort"

SERVER = (
    "URL of a vLLM, SGLang or llama.cpp server that runs this model, to sample there; may be repeated, for several "
    "that share the work. A key that they ask for stands in RAC_API_KEY of the environment"
)

IN_FLIGHT = "for servers: requests at a time to each"

REQUEST_SECONDS = "for servers: seconds that one request may take"

KEEPS_LITTLE = 0.3  # share of weights that a pattern keeps: with more there is little to gain by tuning for the time


SERVING = frozenset({"server", "in_flight", "request_seconds"})
"""Fields that say where to sample: another server goes on with what one has begun."""


class PromptSource(Settings):
    """One of several files of prompts."""

    file: FilePath = Field(description=f"file with `prompt`, `problem` or `messages` a record: {RECORDS}")
    share: float | None = Field(
        default=None, gt=0, le=1, description="part of the prompts that it gives (by default an equal part of the rest)"
    )
    column: Columns = Field(default={}, description=COLUMN)


def _prompt_files(value: Any, info: ValidationInfo) -> Any:
    """Turn what is given into a list of sources; one file without a share stays a path."""
    given = value if isinstance(value, list) else [value]
    if not 0 < len(given) <= MOST_SOURCES:
        raise ValueError(f"should be a file, or a list of at most {MOST_SOURCES}")
    made = [_prompt_source(each, info) for each in given]
    alone = len(made) == 1 and made[0].share is None and not made[0].column
    return made[0].file if alone else made


def _prompt_source(given: Any, info: ValidationInfo) -> PromptSource:
    if isinstance(given, str):
        name, share = with_share(str(resolved_path(given, info)))
        given = {"file": name, "share": share}
    elif isinstance(given, Path):
        given = {"file": given}
    return _checked(PromptSource, given, info)


def _checked(model: type[S], given: Any, info: ValidationInfo) -> S:
    """Settings of one of several sources; the message of a mistake names the field."""
    try:
        return model.model_validate(given, context=info.context)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "a source"
        raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def _shown_prompts(value: Path | list[PromptSource]) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [each.model_dump(mode="json", exclude_defaults=True) for each in value]


PromptFiles = Annotated[
    Path | list[PromptSource], BeforeValidator(_prompt_files), PlainSerializer(_shown_prompts, return_type=Any)
]


class TraceSettings(Settings):
    """Sampling of the model's own chains of thought."""

    prompts: PromptFiles = Field(
        description=f"file with `prompt`, `problem` or `messages` a record: {RECORDS}; or a list of several, each with "
        ":SHARE of the prompts behind it"
    )
    column: Columns = Field(default={}, description=COLUMN)
    tokens: Count = Field(default=1_000_000, description="token budget over prompts and completions")
    samples: Count = Field(default=2, description="traces a prompt")
    max_new_tokens: Count = Field(
        default=8192, description="longest completion, in tokens; it ends where the model's context is full, too"
    )
    temperature: float = Field(default=0.6, ge=0, description="sampling temperature; 0 is greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="probability mass of the tokens sampled from")
    seed: Seed = Field(default=0, description="the same seed gives the same traces")
    instruction: str = Field(default="", description=INSTRUCTION)
    template_arguments: TemplateArguments = Field(
        default={}, description="what the chat template is told besides the messages: `enable_thinking`, for example"
    )
    batch_size: Count = Field(
        default=128,
        description="traces sampled before they are kept, half of them at a time. Fewer where the budget needs no more",
    )
    server: list[ServerURL] = Field(default=[], description=SERVER)
    in_flight: Count = Field(default=64, le=4096, description=IN_FLIGHT)
    request_seconds: float = Field(default=3600, gt=0, le=1e6, description=REQUEST_SECONDS)

    @property
    def sources(self) -> list[PromptSource]:
        """The files of prompts."""
        if isinstance(self.prompts, Path):
            return [PromptSource(file=self.prompts, column=self.column)]
        return [each if each.column else each.model_copy(update={"column": self.column}) for each in self.prompts]


SourceText = Annotated[str, AfterValidator(resolved_source)]


class CalibrationSource(Settings):
    """One of several sources of calibration."""

    source: SourceText | None = Field(
        default=None, description="traces folder or file, other records, or text:FILE; none: this job's own traces"
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="part of the tokens that it gives (by default an equal part of the rest)"
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="how much its tokens count, times all other weights of a token"
    )


def _sources(value: Any, info: ValidationInfo) -> Any:
    """Check one source, or a list of several; a list of one that is text is that one."""
    given = value if isinstance(value, list) else [value]
    fits = all(isinstance(each, str | CalibrationSource | Mapping) for each in given)
    if not 0 < len(given) <= MOST_SOURCES or not fits or (given is not value and not isinstance(value, str)):
        raise ValueError("should be a traces folder or file, a .jsonl file, or text:FILE, or a list of such")
    made = [
        resolved_source(each, info) if isinstance(each, str) else _checked(CalibrationSource, each, info)
        for each in given
    ]
    return made[0] if len(made) == 1 and isinstance(made[0], str) else made


def _shown_sources(value: str | list[str | CalibrationSource]) -> Any:
    if isinstance(value, str):
        return value
    return [each if isinstance(each, str) else each.model_dump(mode="json", exclude_defaults=True) for each in value]


Sources = Annotated[
    str | list[str | CalibrationSource],
    BeforeValidator(_sources),
    PlainSerializer(_shown_sources, return_type=Any),
]


class CalibrationSettings(Settings):
    """Which tokens the Hessians are gathered from."""

    source: Sources | None = Field(
        default=None,
        description="traces folder or file, other records, or text:FILE; or a list of several, each with :SHARE of the "
        "tokens behind it, which sum to 1 (without, in equal parts); none: this job's own traces",
    )
    column: Columns = Field(default={}, description=COLUMN)
    template_arguments: TemplateArguments = Field(
        default={}, description="what the chat template is told besides the messages, where records hold no tokens"
    )
    part: Literal["all", "prompt", "completion"] = Field(
        default="all", description="which part of a trace enters the Hessians"
    )
    tokens: Count | None = Field(default=None, description="token budget (all there are by default)")
    sequence_length: Count = Field(default=2048, description="for text: tokens in a sequence")
    held_out: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="share of the sequences, 8 at least, by which the result is judged and from which no solver "
        "learns; 0: none. Of fewer than 40 sequences none are held out",
    )
    replaced: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="copies of sequences in which three of ten tokens are others, so many tokens for each that is not "
        "held out: they keep more of what no trace shows; for methods with a Hessian",
    )
    weight_completion: float = Field(
        default=1.0, ge=0, le=1e6, description="how much a completion's token counts; a prompt's counts 1"
    )
    weight_column: str | None = Field(
        default=None, min_length=1, description="column or field of the traces with a weight a trace or a list a token"
    )

    @property
    def sources(self) -> list[str | CalibrationSource]:
        """The sources as they were given; none for this job's own traces alone."""
        return [self.source] if isinstance(self.source, str) else list(self.source or [])

    @property
    def takes_own_traces(self) -> bool:
        """Whether this job's own traces are a source, or the only one."""
        return self.source is None or any(not isinstance(each, str) and each.source is None for each in self.sources)


class ExpertSettings(Settings):
    """Treatment of a mixture's experts that too few calibration tokens were routed to."""

    min_tokens: float = Field(
        default=1.0, ge=0, description="tokens for each input of a matrix below which an expert's own are too few"
    )
    otherwise: Literal["blend", "magnitude", "dense"] = Field(
        default="blend", description="prune such an expert by its H blended with all tokens', by magnitude, or not"
    )


class Override(Settings):
    """Another target for some matrices. A sparsity lifts the pattern, and a pattern sets
    the sparsity; what is not given stays as it is elsewhere."""

    modules: list[ModuleName] = Field(min_length=1, description="by name, glob or regular expression, as in `dense`")
    sparsity: float | None = Field(default=None, ge=0, lt=1, description="share of zeros in these matrices")
    pattern: PatternText | None = Field(default=None, description="N:M for these matrices, in place of a sparsity")
    damping: float | None = Field(default=None, gt=0, le=1, description="damping of these matrices")

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("modules"), str):
            return {**data, "modules": [data["modules"]]}
        return data

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.sparsity is None and self.pattern is None and self.damping is None:
            raise ValueError("give a sparsity, a pattern or a damping")
        if self.pattern is not None and self.sparsity is not None:
            raise ValueError("a pattern sets the sparsity; give one of them")
        return self

    def names(self, *names: str) -> bool:
        """Whether it is for the matrix that is called any of these."""
        return any(names_matrix(entry, *names) for entry in self.modules)


class PruneSettings(Settings):
    """Pruning: what, how much, and by which method. With a `pattern` N:M the sparsity is 1 - N/M."""

    method: MethodName = Field(
        default=DEFAULT_METHOD, description=f"how weights are chosen and corrected: {', '.join(method_names())}"
    )
    sparsity: float = Field(
        default=0.5, ge=0, lt=1, description="share of zeros in every pruned matrix, from 0 up to but not 1"
    )
    pattern: PatternText | None = Field(
        default=None,
        description="N:M, at most N nonzeros in every M columns; sets the sparsity (unstructured by default)",
    )
    values: Literal["same", "int8", "int4"] = Field(
        default="same",
        description="what kept weights are: numbers of the checkpoint's format (same), or such of them as 8 or 4 bits "
        "can say with a scale for every 32 or so, chosen so that the others make up for the rounding; `rac pack` then "
        "stores them so. With sparsity 0 all weights are kept",
    )
    pack: bool = Field(
        default=False,
        description="write the output in packed form, as `rac pack` with the same values does: a bit a weight that "
        "says what is kept, and only that is stored. What is not on the grid of `values` is packed bit for bit",
    )
    damping: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="added to the Hessian's diagonal, relative to its mean (by default 0.01; the default method "
        "chooses it for each input by the error on sequences that are held out, if there are any)",
    )
    block_size: Count = Field(default=128, description="columns that share a threshold")
    reconstruct: Literal["auto", "residual", "dense", "layer"] = Field(
        default="auto",
        description="what pruned matrices should give: the dense model's outputs (dense), those and hidden states "
        "(residual), or what dense matrices would make of the pruned model's inputs (layer, as published); "
        "auto is what the method is best with, residual for the default one",
    )
    tune: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="epochs over the tokens in which a block's kept weights are moved together, so that its hidden "
        "states come nearer to the dense model's; 0 for none (by default none, but where the default method "
        f"is left less than {KEEPS_LITTLE:.0%} by a pattern)",
    )
    recover: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="passes over the tokens, once all is pruned, in which the kept weights of the whole model are "
        "moved together, so that it comes nearer to the dense model's next tokens; the pass that is best for the "
        "tokens held out is kept",
    )
    reorder: Literal["auto", "none", "mlp"] = Field(
        default="auto",
        description="order of an MLP's inner neurons, which makes no difference to the model but to a pattern: as it "
        "is (none), or one that brings large weights of a row of down into different groups (mlp); auto is mlp where "
        "blocks are tuned by default",
    )
    order: Literal["staged", "layer"] = Field(
        default="staged", description="calibrate each stage on the pruned ones before it, or a layer at once"
    )
    dense: list[ModuleName] = Field(
        default=[],
        description="modules left dense, by name as `rac plan` prints it, glob or regular expression; may be repeated",
    )
    also: list[Literal["lm_head", "embeddings"]] = Field(
        default=[], description="prune lm_head or embeddings too, which otherwise stay dense; may be repeated"
    )
    allocation: Literal["uniform", "error"] = Field(
        default="uniform",
        description="the same sparsity everywhere (uniform), or such that the next weight costs every input as much "
        "(error); from a first pass over the dense model",
    )
    allocation_bounds: float = Field(
        default=0.1, gt=0, lt=1, description="for error: how far a matrix's sparsity may be from the model's"
    )
    overrides: list[Override] = Field(
        default=[], description="other sparsities, patterns or dampings by module; of several that fit, the last wins"
    )
    unseen: Literal["dense", "magnitude"] = Field(
        default="dense", description="what becomes of a matrix that saw no calibration token"
    )
    experts: ExpertSettings = Field(default=ExpertSettings(), description="what becomes of experts that saw few tokens")
    nonfinite: Literal["refuse", "dense"] = Field(
        default="refuse", description="a model whose weights hold NaN or Inf: refuse it, or leave those matrices dense"
    )
    chunk_tokens: Count = Field(
        default=8192, description="tokens that go through a layer together; fewer take less memory"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="number format of activations (auto: the checkpoint's; fp32 on a CPU slow with 16 bits)",
    )

    @model_validator(mode="before")
    @classmethod
    def _sparsity_follows_pattern(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "sparsity" not in data and isinstance(data.get("pattern"), str):
            try:
                n, m = pruning_pattern(data["pattern"])
            except BadInput:
                return data
            return {**data, "sparsity": 1 - n / m}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> PruneSettings:
        if self.pattern is not None:
            n, m = pruning_pattern(self.pattern)
            if abs(self.sparsity - (1 - n / m)) > 0.005:
                raise ValueError(
                    f"pattern {self.pattern} means sparsity {1 - n / m:.3g}, not {self.sparsity:g}; drop one"
                )
        if self.allocation != "uniform":
            if self.pattern is not None:
                raise ValueError(f"allocation: {self.allocation} is for unstructured sparsity, not for a pattern")
            if self.solver.needs == "nothing":
                raise ValueError(f"allocation: {self.allocation} needs a method with calibration, not {self.method}")
        if self.reconstruct in ("residual", "dense"):
            if self.order == "layer":
                raise ValueError(f"reconstruct: {self.reconstruct} needs order: staged")
            if self.solver.needs != "hessian":
                raise ValueError(f"reconstruct: {self.reconstruct} needs a method with a Hessian, not {self.method}")
        if self.reorder == "mlp" and (self.order == "layer" or self.solver.needs == "nothing"):
            raise ValueError("reorder: mlp needs order: staged and a method with calibration")
        if self.tune and self.reconstructs == "layer":
            raise ValueError(f"tune: {self.tune} needs the dense model beside: reconstruct: residual or dense")
        if self.recover and self.solver.needs == "nothing":
            raise ValueError(f"recover: {self.recover} needs a method with calibration, not {self.method}")
        if self.recover and self.values != "same":
            raise ValueError(f"recover: {self.recover} moves weights off what {self.values} can say; drop one")
        if self.recover and self.also:
            raise ValueError(f"recover: {self.recover} is for layers alone; drop also: {', '.join(self.also)}")
        return self

    def of(self, *names: str) -> PruneSettings:
        """The settings for the matrix that is called any of these, by the overrides."""
        changed: dict[str, Any] = {}
        for override in self.overrides:
            if not override.names(*names):
                continue
            if override.sparsity is not None:
                changed |= {"sparsity": override.sparsity, "pattern": None}
            elif override.pattern is not None:
                n, m = pruning_pattern(override.pattern)
                changed |= {"sparsity": 1 - n / m, "pattern": override.pattern}
            if override.damping is not None:
                changed["damping"] = override.damping
        return self.model_copy(update=changed) if changed else self

    def overridden(self, *names: str) -> bool:
        """Whether an override says how sparse the matrix is that is called any of these."""
        return any(each.names(*names) and (each.sparsity, each.pattern) != (None, None) for each in self.overrides)

    @property
    def solver(self) -> Method:
        """All that is known of the method. Imports torch when first asked for."""
        return find_method(self.method)

    @property
    def allocation_reach(self) -> float:
        """Distance that an allocated sparsity may have from the model's."""
        return 0.0 if self.allocation == "uniform" else self.allocation_bounds

    @property
    def reconstructs(self) -> Literal["residual", "dense", "layer"]:
        """The outputs to give again: `reconstruct`, with auto as the method and the order have it."""
        if self.reconstruct == "auto":
            return self.solver.reconstruct if self.order == "staged" else "layer"
        return self.reconstruct

    @property
    def epochs(self) -> int:
        """Epochs of tuning: `tune`, or by default the method's where a pattern keeps little."""
        if self.tune is not None:
            return self.tune
        return self.solver.epochs if self._keeps_little else 0

    @property
    def reorders(self) -> bool:
        """Whether an MLP's inner neurons get another order: `reorder`, with auto as the method has it."""
        if self.reorder != "auto":
            return self.reorder == "mlp"
        return self._keeps_little and self.solver.reorders

    @property
    def _keeps_little(self) -> bool:
        """Whether the pattern keeps so little that more effort pays, and the dense model is there to tune by."""
        if self.pattern is None or self.reconstructs == "layer":
            return False
        n, m = pruning_pattern(self.pattern)
        return n / m < KEEPS_LITTLE


class EvalSettings(Settings):
    """Sampling and counting of answers, and tokens that are predicted."""

    problems: FilePath | None = Field(default=None, description=f"file with `problem` and `answer` a record: {RECORDS}")
    perplexity: list[SourceText] = Field(
        default=[],
        max_length=MOST_SOURCES,
        description="traces folder or file or other records, whose completions the model has to predict, or text:FILE, "
        "of which all tokens: mean loss and perplexity, a layer at a time; may be repeated",
    )
    perplexity_tokens: Count | None = Field(
        default=None, description="for perplexity: at most N tokens of each file (all by default)"
    )
    column: Columns = Field(default={}, description=COLUMN)
    limit: Count | None = Field(default=None, description="only the first N problems (all by default)")
    samples: Count = Field(default=1, description="answers a problem")
    max_new_tokens: Count = Field(
        default=32768, description="an answer longer than this, or than the model's context, is cut off and wrong"
    )
    temperature: float = Field(default=0.6, ge=0, description="sampling temperature; 0 is greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="probability mass of the tokens sampled from")
    seed: Seed = Field(default=0, description="the same seed gives the same answers")
    instruction: str = Field(default="", description=INSTRUCTION)
    template_arguments: TemplateArguments = Field(
        default={}, description="what the chat template is told besides the messages: `enable_thinking`, for example"
    )
    batch_size: Count = Field(
        default=128,
        description="answers sampled before they are kept, half of them at a time",
    )
    server: list[ServerURL] = Field(default=[], description=SERVER)
    in_flight: Count = Field(default=64, le=4096, description=IN_FLIGHT)
    request_seconds: float = Field(default=3600, gt=0, le=1e6, description=REQUEST_SECONDS)

    @model_validator(mode="after")
    def _measures_something(self) -> EvalSettings:
        if self.problems is None and not self.perplexity:
            raise ValueError("give problems, or files for perplexity, or both")
        return self


class Variant(Settings):
    """A model to compare the main one with: pruned otherwise, evaluated the same way, not kept."""

    name: JobName = Field(description="what tables call this model")
    calibration: CalibrationSettings | None = Field(default=None, description="none: as the main model")
    prune: PruneSettings = Field(default=PruneSettings(), description="only what differs from the main model")

    @field_serializer("prune")
    def _only_what_differs(self, prune: PruneSettings) -> dict[str, Any]:
        return prune.model_dump(mode="json", exclude_unset=True)

    def settings(self, main: PruneSettings) -> PruneSettings:
        """The main model's settings with this variant's on top; a new sparsity lifts the main model's pattern."""
        changed = self.prune.model_dump(exclude_unset=True)
        kept = main.model_dump(exclude={"pattern"} if "sparsity" in changed else None)
        return PruneSettings.model_validate({**kept, **changed})


class Recipe(Settings):
    """A whole job: trace → prune → evaluate, and what to compare with."""

    model: ModelPath = Field(
        description="folder of a Hugging Face checkpoint, or `org/name` or `org/name@revision` on the hub"
    )
    name: JobName = Field(default="pruned", description="what tables call the pruned model")
    trace: TraceSettings | None = Field(default=None, description="how traces are sampled; none: there are some")
    calibration: CalibrationSettings = Field(default=CalibrationSettings(), description="what pruning decides on")
    prune: PruneSettings = Field(default=PruneSettings(), description="what is pruned, how much, and how")
    evaluate: EvalSettings | None = Field(default=None, description="which problems are asked; none: no evaluation")
    compare: list[Variant] = Field(default=[], description="models to compare with")

    @model_validator(mode="after")
    def _no_server_answers_for_all(self) -> Recipe:
        if self.evaluate is not None and self.evaluate.server:
            raise ValueError(
                "evaluate.server: one server runs one model, and here several are compared; use rac eval for each"
            )
        return self

    @model_validator(mode="after")
    def _models_are_compared_by_answers(self) -> Recipe:
        if self.evaluate is not None and self.evaluate.problems is None:
            raise ValueError("evaluate.problems: is missing; models are compared by their answers")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        taken = {*RESERVED_NAMES, self.name}
        for variant in self.compare:
            if variant.name in taken:
                raise ValueError(f"compare: the name {variant.name!r} is taken; each variant needs a name of its own")
            taken.add(variant.name)
        return self
