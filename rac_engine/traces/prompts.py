"""The prompts that traces are sampled for: of one file, or of several in a fixed proportion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.recipe import TraceSettings
from rac_engine.traces.conversation import Messages
from rac_engine.traces.mixture import shares_of
from rac_engine.traces.questions import id_of, question_of
from rac_engine.traces.records import read_records


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file. `id` decides the random numbers of its samples; `rows` of the file ask it."""

    id: str
    messages: Messages
    source: str
    """The file."""
    name: str
    """The id in that file."""
    rows: int = 1


def prompts_of(settings: TraceSettings) -> list[Prompt]:
    """The prompts of all files, in the order in which they are asked; of several, each with its file before its id.

    At any point of the order every file has given its share of those before, as nearly as can be. Where one has no more
    the others go on. Raises `BadInput` as `load_prompts` does, and for shares that do not sum to 1.
    """
    sources = settings.sources
    if len(sources) == 1:
        return load_prompts(sources[0].file, sources[0].column)
    shares = shares_of([source.share for source in sources], "prompts")
    names = [source.file.name for source in sources]
    told = names if len(set(names)) == len(names) else [str(source.file) for source in sources]
    if len(set(told)) < len(told):
        raise BadInput(f"prompts: {max(told, key=told.count)} is given twice")
    queues = [
        [replace(prompt, id=f"{name}:{prompt.id}") for prompt in load_prompts(source.file, source.column)]
        for source, name in zip(sources, told, strict=True)
    ]
    order: list[Prompt] = []
    taken = [0] * len(queues)
    while open_ := [at for at, queue in enumerate(queues) if taken[at] < len(queue)]:
        furthest = min(open_, key=lambda at: (taken[at] + 1) / shares[at])  # the first of those that are as far behind
        order.append(queues[furthest][taken[furthest]])
        taken[furthest] += 1
    return order


def load_prompts(path: Path, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Prompts of a file or folder in any layout that is known (see `question_of`), with an `id` if they have one.

    `columns` says which column plays a role. A record that repeats id and question of an earlier one is asked once, as
    data sets with a row an answer have them. Raises `BadInput` that names the first broken line, and for an id that
    stands for two questions.
    """
    prompts: dict[str, Prompt] = {}
    number = 0
    for where, record in read_records(path, columns):
        asked = question_of(record, where)
        name, own = id_of(record)
        name = str(number) if name is None else name
        earlier = prompts.get(name)
        if earlier is not None and earlier.messages == asked and (own or name != str(number)):
            prompts[name] = replace(earlier, rows=earlier.rows + 1)
            continue
        if earlier is not None and own:
            raise BadInput(f"{where}: id {name!r} is there twice")
        if earlier is not None:  # a name that is no `id` need not be its record's alone
            name = f"{name}#{number}"
        prompts[name] = Prompt(name, asked, str(path), name)
        number += 1
    if not prompts:
        raise BadInput(f"{path}: holds no prompt")
    return list(prompts.values())


def notes_on(prompts: Sequence[Prompt]) -> list[str]:
    """A note on records that repeat others, if there are any."""
    repeated = sum(prompt.rows - 1 for prompt in prompts)
    return [f"{repeated:,} records repeat id and question of another; each question was asked once"] if repeated else []
