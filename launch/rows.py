"""Files, directories and hub sets -> numbered rows, in chunks that fit in memory however large the source is.

JSON Lines are cut at line ends and parsed a line at a time: a bad line is the outcome of one row, not of the file.
"""

import csv
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launch.errors import DataError, first_line
from launch.modes import as_at_start
from launch.recipe import Source

Row = Mapping[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
MAX_JSON_ARRAY_BYTES = 1_000_000_000  # an array is read whole
_LINES_PER_CHUNK_BYTES = 1 << 18  # small: while the last chunk is prepared, the other processes wait
_ROWS_PER_CHUNK = 200
_NOT_READ = (".arrow", ".bz2", ".gz", ".ndjson", ".tsv", ".xz", ".zip", ".zst")  # look like data, and are not skipped
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DataFile:
    """One file, or one hub set, of a source."""

    label: str  # what its row ids begin with
    source: Source
    path: Path | None  # None: a hub set

    @property
    def size_bytes(self) -> int | None:
        """None for a hub set."""
        return self.path.stat().st_size if self.path else None


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in its file, or what is wrong with it."""

    number: int  # of the line (JSON Lines, CSV) or of the row, from 1
    value: Row | None
    fault: str = ""
    text: str = ""  # of a line that is no row


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: `[start, end)` bytes of whole lines that the reader fetches itself, or the rows."""

    file: DataFile
    first: int  # number of its first line
    lines: tuple[int, int] | None
    rows: Sequence[RawRow] = ()


def find_files(sources: Sequence[Source]) -> list[DataFile]:
    """The files of the sources, in order. Raises DataError for a source that is not there or cannot be read."""
    found = [(source, path) for source in sources for path in _paths(source)]
    names = Counter(path.name for _, path in found if path is not None)
    files = []
    for source, path in found:
        if path is None:
            label = "/".join(
                filter(None, (source.path, source.subset, source.split if source.split != "train" else ""))
            )
        else:
            label = path.name if names[path.name] == 1 else str(path)
        if not label.isprintable():
            raise DataError(f"The file name {label!r} cannot stand in a list of rows; rename the file.")
        files.append(DataFile(label, source, path))
    places = Counter(str(file.path.resolve()) if file.path else file.label for file in files)
    twice = next((place for place, times in places.items() if times > 1), None)
    if twice is not None:
        raise DataError(
            f"{twice} is named twice among the sources; give it one entry, with a weight if it is to count more."
        )
    return files


def read_chunks(file: DataFile) -> Iterator[Chunk]:
    """The whole file in order. Raises DataError when it is of no use as a whole."""
    if file.path is None:
        yield from _in_chunks(file, _hub_rows(file.source))
        return
    try:
        if file.path.suffix == ".parquet":
            yield from _in_chunks(file, _parquet_rows(file.path))
            return
        _check_encoding(file.path)
        if file.path.suffix == ".csv":
            yield from _in_chunks(file, _csv_rows(file))
        elif _holds_lines(file):
            yield from _line_chunks(file)
        else:
            yield from _in_chunks(file, _array_rows(file))
    except OSError as error:
        raise DataError(f"The data file {file.path} cannot be read: {_reason(error)}.") from None


def rows_of(chunk: Chunk) -> Iterator[RawRow]:
    """The rows of a chunk; a line that is no row comes with its fault, an empty line not at all."""
    if chunk.lines is None:
        yield from chunk.rows
        return
    assert chunk.file.path is not None
    start, end = chunk.lines
    try:
        with chunk.file.path.open("rb") as file:
            file.seek(start)
            block = file.read(end - start)
    except OSError as error:
        raise DataError(f"The data file {chunk.file.path} cannot be read: {_reason(error)}.") from None
    decoder = _Decoder()
    for number, line in enumerate(block.split(b"\n"), start=chunk.first):
        if line.strip():
            yield _row_of_line(number, line, decoder)


def _paths(source: Source) -> list[Path | None]:
    """What a source names: a file, every readable file of a directory, or None for a hub id."""
    try:
        path = Path(source.path).expanduser()
        is_there, is_directory, is_file = path.exists(), path.is_dir(), path.is_file()
        inside = _files_inside(path) if is_directory else []
    except (OSError, RuntimeError) as error:
        raise DataError(f"The data source {source.path} cannot be read: {_reason(error)}.") from None
    looks_like_a_hub_id = source.path.count("/") == 1 and not source.path.startswith((".", "/", "~"))
    if looks_like_a_hub_id and not is_there and path.suffix not in SUFFIXES:
        return [None]
    if source.subset is not None or source.split != "train":
        raise DataError(
            f"{source.path} has a subset or a split, which only a hub id (owner/name) can have; leave them out."
        )
    if is_directory:
        if not inside:
            raise DataError(
                f"The data directory {source.path} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file."
            )
        return list(inside)
    if is_file and path.suffix in SUFFIXES:
        return [path]
    if not is_there and path.suffix in SUFFIXES:
        raise DataError(f"There is no data file {source.path} (looked for {path.absolute()}).")
    state = "is not of a kind that can be read" if is_there else "does not exist"
    raise DataError(
        f"The data source {source.path} {state}; give a file ({', '.join(SUFFIXES)}), a directory of them or a hub id "
        "(owner/name)."
    )


def _files_inside(directory: Path) -> list[Path]:
    """Every file that can be read, in order; hidden ones are left alone. Raises OSError for what cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    unread = [path for path in found if path.suffix in _NOT_READ]
    if unread:
        raise DataError(
            f"{sorted(unread)[0]} is not of a kind that can be read; unpack or convert it, or move it away."
        )
    return sorted(path for path in found if path.suffix in SUFFIXES and path.is_file())


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _in_chunks(file: DataFile, rows: Iterator[RawRow]) -> Iterator[Chunk]:
    while batch := list(islice(rows, _ROWS_PER_CHUNK)):
        yield Chunk(file, batch[0].number, None, batch)


# ---- JSON ----


def _holds_lines(file: DataFile) -> bool:
    """Whether a JSON file has a row a line: by its name, or because it does not begin as an array does."""
    assert file.path is not None
    if file.path.suffix == ".jsonl":
        return True
    with file.path.open("rb") as opened:
        begin = opened.read(1 << 16).removeprefix(_BOM).lstrip()
    first, *lines = begin.split(b"\n")
    if begin.startswith(b"[") or not begin:
        return False
    if first.rstrip().endswith(b"}") or any(line.startswith(b"{") for line in lines):
        return True
    raise DataError(f"{file.path} must hold one JSON array of rows, or one row a line, but holds one JSON value.")


def _check_encoding(path: Path) -> None:
    with path.open("rb") as opened:
        if opened.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 {path} > UTF8{path.suffix}")


def _line_chunks(file: DataFile) -> Iterator[Chunk]:
    assert file.path is not None
    with file.path.open("rb") as text:
        if text.read(len(_BOM)) != _BOM:
            text.seek(0)
        start, number = text.tell(), 1
        while block := text.read(_LINES_PER_CHUNK_BYTES):
            num_lines = block.count(b"\n")
            if not block.endswith(b"\n"):
                num_lines += text.readline().endswith(b"\n")
            yield Chunk(file, number, (start, text.tell()))
            start, number = text.tell(), number + num_lines


def _row_of_line(number: int, line: bytes, decoder: "_Decoder") -> RawRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RawRow(number, None, f"not UTF-8: {error.reason} at byte {error.start}", line.decode("utf-8", "replace"))
    decoder.repeated_keys.clear()
    try:
        value, end = decoder.raw_decode(text.strip(" \t\r"))
        if end != len(text.strip(" \t\r")):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        return RawRow(number, None, f"not JSON: {error}", text)
    return _row_of_value(number, value, decoder)


def _row_of_value(number: int, value: object, decoder: "_Decoder") -> RawRow:
    if not isinstance(value, dict):
        kind = type(value).__name__
        return RawRow(number, None, f"a row must be a JSON object, but this is a {kind}", json.dumps(value))
    if decoder.repeated_keys:
        return RawRow(number, value, f"the key {decoder.repeated_keys[0]!r} is given twice")
    return RawRow(number, value)


class _Decoder(json.JSONDecoder):
    """Remembers the keys that stood twice in one object, of which JSON parsers keep the last without a word."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)
        self.repeated_keys: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            self.repeated_keys += [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        return value

    def _constant(self, name: str) -> None:
        raise ValueError(f"{name} is no JSON number")


def _array_rows(file: DataFile) -> Iterator[RawRow]:
    """The elements of a JSON array, parsed one after the other; their numbers are positions, from 1."""
    assert file.path is not None and file.size_bytes is not None
    if file.size_bytes > MAX_JSON_ARRAY_BYTES:
        raise DataError(
            f"{file.path} is a JSON array of {file.size_bytes / 1e9:.1f} GB, and an array is read whole; make it JSON "
            f"Lines: jq -cn --stream 'fromstream(1|truncate_stream(inputs))' {file.path} > {file.path.stem}.jsonl"
        )
    # A byte that is not UTF-8 becomes a lone surrogate, which is its row's fault and not the file's.
    text = file.path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    position = _after_space(text, 0)
    if position == len(text):
        return
    position = _after_space(text, position + 1)
    decoder = _Decoder()
    number = 0
    while text[position : position + 1] != "]":  # a comma after the last row harms nobody
        number += 1
        decoder.repeated_keys.clear()
        try:
            value, position = decoder.raw_decode(text, position)
            position = _after_space(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file.path} is no JSON array: {error}, in row {number}; nothing after that can be read, whereas in a "
                ".jsonl file, one row a line, a bad row is only itself."
            ) from None
        yield _row_of_value(number, value, decoder)
        if text[position] == ",":
            position = _after_space(text, position + 1)
    if _after_space(text, position + 1) < len(text):
        raise DataError(f"{file.path} holds more than one JSON array; one row a line belongs into a .jsonl file.")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


# ---- CSV, Parquet, hub ----


def _csv_rows(file: DataFile) -> Iterator[RawRow]:
    assert file.path is not None
    csv.field_size_limit(1 << 30)
    with file.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.reader(opened, strict=True)
        columns: list[str] | None = None
        line = 1
        try:
            for fields in reader:
                number, line = line, reader.line_num + 1
                if not fields:
                    continue
                if columns is None:
                    columns = fields
                    if len(set(columns)) < len(columns) or not all(columns):
                        raise DataError(f"{file.path}: the first line must name every column once, but is {columns}.")
                elif len(fields) != len(columns):
                    fault = f"{len(fields)} fields, but the first line names {len(columns)} columns"
                    yield RawRow(number, None, fault, ",".join(fields))
                else:
                    yield RawRow(number, dict(zip(columns, fields, strict=True)))
        except csv.Error as error:
            raise DataError(
                f"{file.path} is no CSV from line {line} on: {error} (a quote that is not closed?); nothing after that "
                "can be read."
            ) from None


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa  # slow to import, and only needed here
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS_PER_CHUNK):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        value = _without_nulls(batch.slice(index, 1).to_pylist()[0])
                    except UnicodeDecodeError as error:
                        yield RawRow(number, None, f"not UTF-8: {error.reason}")
                    except (ValueError, OverflowError) as error:  # a date that Python has not, for one
                        yield RawRow(number, None, f"a value that cannot be read: {error}")
                    else:
                        yield RawRow(number, value)
    except pa.ArrowException as error:
        raise DataError(
            f"The data file {path} is no Parquet file that can be read, after row {number}: {first_line(error)}."
        ) from None


def hub_fingerprint(source: Source) -> str:
    """Of a hub set as it stands in the cache."""
    return str(sorted(entry["filename"] for entry in load_hub_set(source).cache_files))


def _hub_rows(source: Source) -> Iterator[RawRow]:
    for number, row in enumerate(load_hub_set(source), start=1):
        yield RawRow(number, _without_nulls(row))


def _without_nulls(value: Any, depth: int = 0) -> Any:
    """Without the nulls inside columns: Arrow fills the keys that one object has and another has not with them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item, depth + 1) for key, item in value.items() if depth == 0 or item is not None}
    return [_without_nulls(item, depth + 1) for item in value] if isinstance(value, list) else value


@functools.cache
def load_hub_set(source: Source) -> Any:
    """A `datasets.Dataset`, which is mapped, not read. Raises DataError with the library's reason."""
    import datasets  # slow to import, and only needed here

    if not os.isatty(2):
        datasets.disable_progress_bars()
    try:
        with as_at_start():
            return datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # the library raises many kinds; all of them mean that there are no rows
        raise DataError(
            f"The data set {source.path} cannot be loaded from the hub: {type(error).__name__}: {first_line(error)}."
        ) from None
