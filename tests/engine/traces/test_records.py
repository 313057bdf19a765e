"""Files as people have them: in every format, packed, in folders, broken and hostile."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rac_engine.base.errors import BadInput
from rac_engine.base.process import peak_memory
from rac_engine.traces import tables
from rac_engine.traces.footer import column_sizes
from rac_engine.traces.records import read_records

ROWS: list[dict[str, Any]] = [{"problem": "a é\u2028b", "answer": "1"}, {"problem": "c", "answer": "2"}]


def found(source: Path, **options: Any) -> list[dict[str, Any]]:
    return [record for _, record in read_records(source, **options)]


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    made: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return made


def stream(rows: list[dict[str, Any]] = ROWS, file: bool = False) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    made: bytes = sink.getvalue().to_pybytes()
    return made


def parquet(rows: list[dict[str, Any]] = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    made: bytes = sink.getvalue().to_pybytes()
    return made


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines()),
        ("a.jsonl", b"\xef\xbb\xbf" + lines()),
        ("a.jsonl", lines().decode().replace("\n", "\r\n").encode("utf-16")),
        ("a.jsonl", b"\xfe\xff" + lines().decode().encode("utf-16-be")),
        ("a.jsonl", lines().decode().encode("utf-16-le")),
        ("a.jsonl.gz", gzip.compress(lines())),
        ("a", gzip.compress(lines().decode().encode("utf-16"))),
        ("a.jsonl.zst", zstd(lines())),
        ("a.jsonl.bz2", bz2.compress(lines())),
        ("a.jsonl.xz", lzma.compress(lines())),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode("utf-16")),
        ("a.json", json.dumps({"data": ROWS, "version": 1}, indent=1).encode()),
        ("a.json", json.dumps({"rows": [{"row_idx": 0, "row": row} for row in ROWS]}).encode()),
        ("a.csv", 'problem,answer\n"a é\u2028b",1\nc,2\n'.encode()),
        ("a.tsv.gz", gzip.compress("problem\tanswer\na é\u2028b\t1\nc\t2\n".encode())),
        ("a.parquet", parquet()),
        ("a.arrow", stream()),
        ("a.arrow", stream(file=True)),
    ],
    ids=[
        "jsonl",
        "bom",
        "utf-16",
        "utf-16-be",
        "utf-16-no-bom",
        "gz",
        "gz-utf-16",
        "zst",
        "bz2",
        "xz",
        "array",
        "array-utf-16",
        "wrapped",
        "viewer",
        "csv",
        "tsv.gz",
        "parquet",
        "arrow-stream",
        "arrow-file",
    ],
)
def test_formats(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert found(tmp_path / name) == ROWS


def test_long_arrays_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rac_engine.traces import formats

    rows = [{"problem": "x" * size, "text": '[{"}'} for size in (1, 300, 50, 2_000_000, 7)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    monkeypatch.setattr(formats, "_MAX_LINE", 4 << 20)
    assert found(tmp_path / "a.json") == rows
    monkeypatch.setattr(formats, "_MAX_LINE", 1 << 10)
    with pytest.raises(BadInput, match="record 4: not valid JSON"):
        found(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04rest", "is a zip archive; unpack it"),
        (b"\x80\x04\x95", "is a pickle, which is never loaded"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS has not fetched; run `git lfs pull`"),
        (b"<!DOCTYPE html>", "is a web page; download the file itself"),
        ("{}".encode("utf-32"), "text in UTF-32; save it as UTF-8"),
        (gzip.compress(parquet()), "a table that was packed once more"),
        (gzip.compress(lines() * 1000)[:40], "is packed, and broken"),
        (zstd(lines() * 1000)[:40], "is packed, and broken"),
        (parquet()[:-20], "not a Parquet file that can be read .*; fetch it again"),
        (stream()[:200], "not an? Arrow file that can be read"),
        (b'[{"problem": "a"}, {"problem": ', r"record 2: not valid JSON"),
        (b'[{"problem": "a"}, 5]', r"record 2: should be a JSON object"),
        (b'[{"problem": "a"}', "does not end"),
        (b'[{"problem": "a", "problem": "b"}]', "given twice"),
        (b'\xff\xfe{\0"\0\x00\xd8', "no text in utf-16.*; save it as UTF-8"),
        (parquet([{"frage": "a"}]), "none of its columns is known, which are 'frage'; name one"),
    ],
)
def test_what_cannot_be_read_is_called_by_its_name(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(BadInput, match=said) as error:
        found(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value) and "\n" not in str(error.value)


def test_of_a_wide_table_known_columns_are_read(tmp_path: Path) -> None:
    rows = [{"Problem": "a", "embedding": [0.5] * 4, "w": 2, "Frage": "b"}]
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    assert found(tmp_path / "a.parquet") == [{"Problem": "a"}]
    assert found(tmp_path / "a.parquet", columns={"problem": "Frage"}, also=["w"]) == [{"problem": "b", "w": 2}]


def saved_to_disk(folder: Path) -> None:
    """A data set as `datasets` saves it."""
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"data-0000{number}-of-00002.arrow").write_bytes(stream([ROWS[number]]))
    names = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "f", "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


def test_folders_of_datasets(tmp_path: Path) -> None:
    saved_to_disk(tmp_path / "d/train")
    assert found(tmp_path / "d/train") == ROWS
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train"]}')
    assert found(tmp_path / "d") == ROWS
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(BadInput, match="holds the splits train, test; give one"):
        found(tmp_path / "d")
    (tmp_path / "d/train/state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(BadInput, match=r"state\.json names no files"):
        found(tmp_path / "d/train")


def test_folders_as_the_hub_has_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / f"data/train-0000{number}-of-00002.parquet").write_bytes(parquet([ROWS[number]]))
    (tmp_path / "README.md").write_text("x")
    assert found(tmp_path) == ROWS
    (tmp_path / "data/test-00000-of-00001.parquet").write_bytes(parquet())
    with pytest.raises(BadInput, match="holds the splits test, train"):
        found(tmp_path)
    (tmp_path / "none/inner").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"holds no \.parquet file.*it has the folders inner"):
        found(tmp_path / "none")


def test_answers_of_a_batch_find_their_requests(tmp_path: Path) -> None:
    """OpenAI's output has no prompts: they are in the input file, by custom_id, in another order."""

    def body(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    asked = [{"custom_id": str(number), "body": body(str(number))} for number in range(3)]
    answered = [{"custom_id": str(number), "response": {"body": {}}} for number in (2, 0)]
    (tmp_path / "input.jsonl").write_bytes(lines(asked))
    (tmp_path / "output.jsonl").write_bytes(lines(answered))
    assert [record["body"] for record in found(tmp_path)] == [body("2"), body("0")]
    (tmp_path / "output.jsonl").unlink()
    assert found(tmp_path) == asked


def test_a_file_of_kilobytes_that_holds_gigabytes_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its footer says of the values, since their bytes say nothing: they are run lengths of a dictionary."""
    file = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"completion_token_ids": [[7] * 1_000_000]}), file, compression="zstd")
    assert file.stat().st_size < 10_000
    with file.open("rb") as opened:
        assert column_sizes(opened)[0][0].values == 1_000_000
    monkeypatch.setattr(tables, "_HONEST", 1 << 20)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    with pytest.raises(BadInput, match=r"'completion_token_ids' holds 1,000,000 values in a file of"):
        found(file)


def test_text_that_repeats_takes_its_place_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of a megabyte that every row names: many megabytes, of which a few rows are unpacked at a time."""
    table = pa.table({"problem": ["x" * 1_000_000] * 100, "generations": [["y" * 1_000_000]] * 100})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    del table
    monkeypatch.setattr(tables, "_BATCH", 8 << 20)
    before = peak_memory(reset=True)
    assert sum(len(record["problem"]) for _, record in read_records(tmp_path / "a.parquet")) == 100_000_000
    assert peak_memory() - before < 64 << 20
