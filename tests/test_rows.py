"""Sources to numbered rows: every kind of file, a bad line is one row, a useless file is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import rows as reading
from launch.errors import DataError
from launch.recipe import Source
from launch.rows import RawRow, find_files, read_chunks, rows_of

ROWS = [{"input": "石头", "output": "stone"}, {"input": "a,b", "output": 'two\nlines "quoted"'}]


def read(*paths: Path | str) -> list[tuple[str, RawRow]]:
    files = find_files([Source(path=str(path)) for path in paths])
    return [
        (f"{file.label}:{raw.number}", raw) for file in files for chunk in read_chunks(file) for raw in rows_of(chunk)
    ]


def values(*paths: Path | str) -> list[Any]:
    return [raw.value for _, raw in read(*paths)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_lines_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(lines(ROWS), encoding="utf-8")
    assert [row_id for row_id, _ in read(path)] == [f"{name}:1", f"{name}:2"]
    assert values(path) == ROWS


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert values(path) == ROWS


def test_bom_crlf_empty_lines_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, second = (json.dumps(row, ensure_ascii=False) for row in ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\r\n  \r\n{second}".encode())
    assert values(path) == ROWS
    assert [row_id for row_id, _ in read(path)] == ["rows.jsonl:1", "rows.jsonl:4"]
    path = tmp_path / "array.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert values(path) == ROWS


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffinput,output\r\n石头,stone\r\n"a,b","two\nlines ""quoted"""\r\n7,3\r\n'.encode())
    assert values(path) == [*ROWS, {"input": "7", "output": "3"}], "a number in a CSV is text"
    assert [row_id for row_id, _ in read(path)] == ["rows.csv:2", "rows.csv:3", "rows.csv:5"]
    path.write_text("input,output\na,b,c\nd,e\n", encoding="utf-8")
    ragged, good = (raw for _, raw in read(path))
    assert ragged.value is None and ragged.fault == "3 fields, but the first line names 2 columns"
    assert good.value == {"input": "d", "output": "e"}


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == ROWS
    nested = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "nested.parquet")
    assert values(tmp_path / "nested.parquet") == nested


def test_a_parquet_row_that_is_not_utf8_is_one_row(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
    )
    pq.write_table(pa.table({"input": column, "output": column}), tmp_path / "rows.parquet")
    good, bad = (raw for _, raw in read(tmp_path / "rows.parquet"))
    assert good.value == {"input": "ok", "output": "ok"}
    assert bad.value is None and bad.fault.startswith("not UTF-8")


def test_a_parquet_value_that_python_has_not_is_one_row(tmp_path: Path) -> None:
    days = pa.array([0, 2**30], pa.date32())
    pq.write_table(pa.table({"input": ["a", "b"], "day": days}), tmp_path / "rows.parquet")
    good, bad = (raw for _, raw in read(tmp_path / "rows.parquet"))
    assert good.value is not None and good.value["input"] == "a"
    assert bad.value is None and bad.fault.startswith("a value that cannot be read")


def test_keys_that_only_other_objects_have_are_not_there(tmp_path: Path) -> None:
    """Arrow gives every object of a column every key, null where it had none; in a tool's arguments that is a word."""
    rows = [{"calls": [{"city": "a"}, {"days": 2}], "note": "x"}, {"calls": [], "note": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == rows


def test_one_broken_first_line_does_not_make_it_another_kind_of_file(tmp_path: Path) -> None:
    for first in ('{"input": "a",', "garbage", "3"):
        (tmp_path / "rows.json").write_text(f"{first}\n{lines(ROWS)}", encoding="utf-8")
        assert values(tmp_path / "rows.json") == [None, *ROWS]


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.jsonl", "a.json", "b/part.jsonl", ".hidden/no.jsonl"):
        (tmp_path / name).write_text(lines(ROWS[:1]), encoding="utf-8")
    (tmp_path / "README.md").write_text("no rows")
    assert [row_id for row_id, _ in read(tmp_path)] == ["a.json:1", "part.jsonl:1", "z.jsonl:1"]


def test_row_ids_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(lines(ROWS[:1]), encoding="utf-8")
    found = [row_id for row_id, _ in read(tmp_path / "one/rows.jsonl", tmp_path / "two/rows.jsonl")]
    assert found == [f"{tmp_path}/one/rows.jsonl:1", f"{tmp_path}/two/rows.jsonl:1"]
    with pytest.raises(DataError, match=r"rows\.jsonl is named twice among the sources"):
        read(tmp_path / "one", tmp_path / "one/rows.jsonl")
    (tmp_path / "other.jsonl").symlink_to(tmp_path / "one/rows.jsonl")
    with pytest.raises(DataError, match=r"one/rows\.jsonl is named twice among the sources"):
        read(tmp_path / "other.jsonl", tmp_path / "one/rows.jsonl")


@pytest.mark.parametrize("chunk_bytes", [1, 10, 100, 1 << 20])
def test_chunks_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Whatever their size: no row is lost, cut or numbered wrongly."""
    monkeypatch.setattr(reading, "_LINES_PER_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "rows.jsonl"
    rows = [{"input": "x" * (number % 37), "output": "石" * (number % 11)} for number in range(200)]
    path.write_text("\n" + lines(rows) + "\n\n", encoding="utf-8")
    assert [(row_id, raw.value) for row_id, raw in read(path)] == [
        (f"rows.jsonl:{number}", row) for number, row in enumerate(rows, start=2)
    ]


BAD_LINES = [
    (b'{"input": "a"', "not JSON: Expecting ',' delimiter"),
    (b'{"input": "a",}', "not JSON: "),
    (b"{'input': 'a'}", "not JSON: Expecting property name"),
    (b'{"input": "a"} {"input": "b"}', "not JSON: Extra data"),
    (b'{"input": "tab\tand\x00zero"}', "not JSON: Invalid control character"),
    (b'{"input": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
    (b'["a", "b"]', "a row must be a JSON object, but this is a list"),
    (b'"a"', "a row must be a JSON object, but this is a str"),
    (b"null", "a row must be a JSON object, but this is a NoneType"),
    (b"hello", "not JSON: Expecting value"),
    (b"[" * 100_000, "not JSON: "),
    (b'{"input": "a", "output": "b", "input": "c"}', "the key 'input' is given twice"),
    (b'{"messages": [{"role": "user", "role": "assistant"}]}', "the key 'role' is given twice"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    (b'{"n": NaN}', "not JSON: NaN is no JSON number"),
    (b'{"n": -Infinity}', "not JSON: -Infinity is no JSON number"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES)
def test_a_bad_line_is_one_row(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    first, bad, last = read(path)
    assert first[1].value == last[1].value == ROWS[0]
    assert bad[0] == "rows.jsonl:2" and bad[1].fault.startswith(fault)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'[{"a": 1}, {"a": 2', r"is no JSON array: .* line 1 column 19 .*, in row 2; nothing after that"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"Expecting ',' or '\]' after a row: line 1 column 11"),
        ("a.json", b"[[1], 2", r"in row 2"),
        (
            "a.json",
            b'[{"a": 1}]\n[{"a": 2}]\n',
            r"holds more than one JSON array; one row a line belongs into a \.jsonl",
        ),
        ("a.json", b'"text"', r"must hold one JSON array of rows, or one row a line, but holds one JSON value"),
        ("a.json", b'{\n "data": []\n}', r"must hold one JSON array of rows, or one row a line, but holds one"),
        ("a.json", "[]".encode("utf-16"), r"is UTF-16 text; convert it: iconv"),
        ("a.jsonl", "{}".encode("utf-16"), r"is UTF-16 text; convert it: iconv"),
        ("a.csv", b'input,output\na,"b\n', r"is no CSV from line 2 on: .*a quote that is not closed"),
        ("a.csv", b"input,input\na,b\n", r"the first line must name every column once, but is \['input', 'input'\]"),
        ("a.parquet", b"PAR1 no", r"is no Parquet file that can be read"),
    ],
)
def test_a_file_of_no_use_is_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_an_array_holds_before_its_fault_is_not_taken_for_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")
    assert values(path) == []
    path.write_text(" \n ")
    assert values(path) == []
    path.write_text('[{"a": 1}, ]')
    assert values(path) == [{"a": 1}]
    path.write_bytes(b'[{"a": "\xff"}, {"a": 1}, 5]')
    first, second, third = (raw for _, raw in read(path))
    assert first.value == {"a": "\udcff"}, "a lone surrogate, which is that row's fault"
    assert second.value == {"a": 1} and third.fault == "a row must be a JSON object, but this is a int"


def test_an_array_that_is_too_large_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_JSON_ARRAY_BYTES", 100)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS * 10))
    with pytest.raises(DataError, match=r"make it JSON Lines: jq -cn --stream .* > rows\.jsonl"):
        read(path)
    path.write_text(lines(ROWS * 10))
    assert len(values(path)) == 20


@pytest.mark.parametrize("name", ["more.jsonl.gz", "more.ndjson", "more.tsv"])
def test_what_looks_like_data_is_not_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=rf"{name} is not of a kind that can be read; unpack or convert it, or move it"):
        read(tmp_path)


def test_names_and_kinds_of_files_that_would_do_harm(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl is not of a kind that can be read"):
        read(tmp_path / "pipe.jsonl")  # and does not wait for somebody to write
    for number, name in enumerate((b"new\nline.jsonl", b"\xff.jsonl")):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / os.fsdecode(name)).write_text(lines(ROWS), encoding="utf-8")
        with pytest.raises(DataError, match="cannot stand in a list of rows; rename the file"):
            read(directory)
    with pytest.raises(DataError, match=r"has a subset or a split, which only a hub id \(owner/name\) can have"):
        find_files([Source(path="configs/data/tiny_chat.jsonl", split="test")])
    for path in ("~nobody-of-that-name/rows.jsonl", "x" * 5000):
        with pytest.raises(DataError, match="cannot be read: "):
            find_files([Source(path=path)])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("no/such/file.jsonl", "There is no data file no/such/file.jsonl"),
        ("./nowhere", r"does not exist; give a file \(.json, .jsonl, .csv, .parquet\), a directory of them or"),
        ("README.md", "is not of a kind that can be read"),
        ("launch", r"The data directory launch holds no .json, .jsonl, .csv or .parquet file"),
    ],
)
def test_what_is_wrong_with_a_source(source: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        find_files([Source(path=source)])
