"""Models on the Hugging Face hub: fetched into its cache, or found there.

huggingface_hub does the fetching. A file that is whole is never fetched again, and one that breaks off goes on while
the program runs. Fetched are the weights that the index names, in safetensors, and what lies beside them: never weights
in any other form, nor folders with such. Nothing that is fetched is ever run.
"""

from __future__ import annotations

import glob
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, require_space
from rac_engine.base.hubnames import HubName, hub_name
from rac_engine.base.sizes import format_bytes
from rac_engine.checkpoint.header import read_config
from rac_engine.checkpoint.reader import INDEX, SINGLE, inside

_BESIDE = (".json", ".jsonl", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".py")

_WITHOUT_ENDING = ("LICENSE", "LICENCE", "NOTICE")

_TEMPLATES = "additional_chat_templates/"  # the one folder that tokenizers read from

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".npz")

_AT_ONCE = 4  # files

Tell = Callable[[str], object]


def local_folder(model: str | Path, progress: Tell = lambda _: None, weights: bool = True) -> Path:
    """The folder of a checkpoint: the local one of that path or, for `org/name[@revision]`, the hub's in the cache.

    What the cache lacks is fetched; without `weights`, what lies beside them alone. `progress` is told how far that is.
    Where there is no network, or HF_HUB_OFFLINE is set, what the cache has is taken. Raises `BadInput` where there is
    no such model, where it may not be had, and where it has no safetensors.
    """
    asked = hub_name(model)
    if asked is None:
        return Path(model)
    cached = _cached(asked)
    with _told(asked):
        try:
            commit, sizes = _listing(asked)
        except Exception as error:
            if (reason := _unreachable(error)) is None:
                raise
            if cached is not None and _is_whole(cached, weights):
                progress(f"{asked}: from the cache, {reason}")
                return cached
            part = "" if cached is None else ", but for a part of it"
            raise BadInput(
                f"{asked}: no such folder, nor is that model in the cache of the hub{part}, and {reason}; fetch it "
                f"where there is a network (`hf download {asked.name}`), or give a folder"
            ) from None
        _require_safetensors(asked, sizes)
        fetch = _Fetch(asked, sizes, progress)
        folder = fetch([name for name in sizes if _is_beside(name)], asked.revision)
        if folder.name != commit:
            raise BadInput(f"{asked}: was changed on the hub while it was fetched; run this again")
        return fetch(_weight_files(folder, sizes), commit) if weights else folder


def is_fetched(folder: Path) -> bool:
    """Whether all weight files are there that the index names, or the single one."""
    return _is_whole(folder, weights=True)


def _cached(asked: HubName) -> Path | None:
    """The model's folder in the cache, as far as it was fetched; None if it was not begun."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(asked.name, "config.json", revision=asked.revision)
    return Path(found).parent if isinstance(found, str) else None


def _is_whole(folder: Path, weights: bool) -> bool:
    if not (folder / "config.json").is_file():
        return False
    if not weights or (folder / SINGLE).is_file():
        return True
    return (folder / INDEX).is_file() and all((folder / name).is_file() for name in _named(folder))


def _named(folder: Path) -> list[str]:
    """The files of weights that an index names."""
    weight_map = read_config(inside(folder, INDEX)).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and name.endswith(".safetensors")})


def _listing(asked: HubName) -> tuple[str, dict[str, int]]:
    """The commit of a model on the hub, and the sizes of its files in bytes by their names."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(asked.name, revision=asked.revision, files_metadata=True)
    return str(info.sha), {each.rfilename: each.size or 0 for each in info.siblings or ()}


def _require_safetensors(asked: HubName, names: Mapping[str, int]) -> None:
    if "config.json" not in names:
        raise BadInput(f"{asked}: has no config.json on the hub; give a model that transformers loads")
    if INDEX in names or SINGLE in names:
        return
    others = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
    instead = f" but {others[0]}" if others else ""
    raise BadInput(
        f"{asked}: has no {SINGLE} on the hub{instead}; only safetensors are read: give a revision or a model that has "
        "them, or convert it with transformers (save_pretrained)"
    )


def _is_beside(name: str) -> bool:
    """Whether a file of a model is one of those beside the weights that are fetched: no weights, no other folders."""
    if "/" in name and not name.startswith(_TEMPLATES):
        return False
    return not name.startswith(".") and (name.endswith(_BESIDE) or name.startswith(_WITHOUT_ENDING))


def _weight_files(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """The files of weights that are to be fetched: those of the index, or the single one."""
    return [name for name in _named(folder) if name in sizes] if INDEX in sizes else [SINGLE]


class _Fetch:
    """Fetches files of a model, and tells how far that is."""

    def __init__(self, asked: HubName, sizes: Mapping[str, int], progress: Tell) -> None:
        self.asked, self.sizes, self.progress = asked, sizes, progress

    def __call__(self, names: Sequence[str], revision: str | None) -> Path:
        """Fetch what the cache lacks of these files, and return their folder."""
        from huggingface_hub import constants, snapshot_download

        cache = Path(constants.HF_HUB_CACHE)
        with disk_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            here = _cached(HubName(self.asked.name, revision))
            lacking = sum(self.sizes[name] for name in names if here is None or not (here / name).is_file())
            require_space(cache, lacking)
            found = snapshot_download(
                self.asked.name,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=_bar(lambda done: self._tell(done, lacking)),
                max_workers=_AT_ONCE,
            )
        return Path(found)

    def _tell(self, done: float, lacking: int) -> None:
        self.progress(f"fetching {self.asked} · {format_bytes(min(done, lacking))} of {format_bytes(lacking)}")


def _bar(tell: Callable[[float], None]) -> Any:
    """A class of progress bars that tells how many bytes have come, and draws nothing."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            """Draw nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            """Count, and tell."""
            shown = super().update(n)
            if self.counts_bytes:
                tell(self.n)
            return shown

    return Bar


@contextmanager
def _told(asked: HubName) -> Iterator[None]:
    """Turn what can go wrong on the hub into one line of `BadInput`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except BadInput:
        raise
    except errors.GatedRepoError:
        raise BadInput(
            f"{asked}: is gated; accept its terms on {constants.ENDPOINT}/{asked.name} and set HF_TOKEN to a token of "
            "the account that did"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"{asked}: no such folder, and no model of that name on {constants.ENDPOINT}; if it is a private one, set "
            "HF_TOKEN to a token that may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(f"{asked}: that model has no such revision; give a branch, a tag or a commit of it") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        mend = "check HF_TOKEN" if status in (401, 403) else "run this again later, what has come is kept"
        raise BadInput(f"{asked}: {constants.ENDPOINT} answers with status {status}; {mend}") from None
    except Exception as error:
        if (reason := _unreachable(error)) is None:
            raise
        raise BadInput(
            f"{asked}: could not be fetched whole, {reason}; run this again, files that have come are kept"
        ) from None


def _unreachable(error: Exception) -> str | None:
    """Why the hub could not be reached, in words; None for any other error."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else None
    # What the client's transport raises has no class that all versions of huggingface_hub share.
    kinds = (type(error), type(error.__cause__))
    transport = any(kind.__module__.partition(".")[0] in ("httpx", "httpx2", "requests") for kind in kinds)
    if transport or isinstance(error, ConnectionError | TimeoutError | errors.EntryNotFoundError):
        return f"{constants.ENDPOINT} cannot be reached"
    return None
