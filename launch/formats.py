"""Rows on disk -> conversations. A row that cannot be trained on gets one reason; an unreadable file is refused."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import DataBlock
from launch.errors import DataError
from launch.templates import Message, load_prompt_template, render_prompt

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One row as messages, or the reason (`dropped`) why there is nothing in it to train on."""

    row_id: str
    row: Row
    messages: tuple[Message, ...]
    dropped: str | None = None


def read_conversations(source: str, data: DataBlock) -> list[Conversation]:
    """Every row of `source`, in order; each has an outcome, none is skipped. Raises DataError on the first bad row."""
    rows = list(_read_rows(source))
    if not rows:
        raise DataError(f"{source} holds no rows.")
    row_format = _format_of(rows[0], data)
    prompt_name = data.prompt_template or "alpaca"
    prompt_source = load_prompt_template(prompt_name)
    conversations = []
    for row_id, row in rows:
        if row_format == "messages":
            messages = _from_messages(row_id, row)
        elif row_format == "question_answer":
            messages = _turns(row_id, "instruction", _text(row_id, row, "input"), row, data.answer_column)
        else:
            prompt = render_prompt(prompt_name, prompt_source, row, row_id)
            messages = _turns(row_id, "system", prompt, row, data.answer_column)
        if data.system is not None and messages and messages[0]["role"] != "system":
            messages = [Message(role="system", content=data.system), *messages]
        conversations.append(Conversation(row_id, row, tuple(messages), _reason_to_drop(messages)))
    return conversations


def _read_rows(source: str) -> Iterator[tuple[str, Row]]:
    """(row id, row) pairs; the id is the file's name with the line (JSONL) or the position (JSON array), from 1."""
    path = Path(source).expanduser()
    if path.suffix not in (".json", ".jsonl"):
        yield from _read_hub_rows(source, path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"There is no data file {source} (looked for {path.absolute()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The data file {source} cannot be read as UTF-8 text: {error}.") from None
    if path.suffix == ".json":
        try:
            values = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{source} is not one JSON array: {error}; rows one a line belong in a .jsonl file."
            ) from None
        if not isinstance(values, list):
            raise DataError(f"{source} must hold one JSON array of rows, but holds a {type(values).__name__}.")
        numbered = list(enumerate(values, start=1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source}, line {number} is not JSON: {error}.") from None
    for number, value in numbered:
        row_id = f"{path.name}:{number}"
        if not isinstance(value, dict):
            raise DataError(f"{row_id}: a row must be a JSON object, but this is a {type(value).__name__}.")
        yield row_id, value


def _read_hub_rows(source: str, path: Path) -> Iterator[tuple[str, Row]]:
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        state = "is not of a kind that can be read" if path.exists() else "does not exist"
        raise DataError(f"The data source {source} {state}; give a .json file, a .jsonl file or a hub id (owner/name).")
    import datasets  # slow to import, and only needed here

    try:
        loaded = datasets.load_dataset(source, split="train")
    except Exception as error:  # the library raises many kinds; all of them mean that there are no rows
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"The data set {source} cannot be loaded from the hub: {type(error).__name__}: {reason}."
        ) from None
    for number, row in enumerate(loaded, start=1):
        yield f"{source}:{number}", row


def _format_of(first: tuple[str, Row], data: DataBlock) -> str:
    row_id, row = first
    if data.prompt_template is not None:
        return "prompt"
    # The columns that tell a format, in the order in which they are tried.
    columns_of_format = {
        "messages": ("messages",),
        "alpaca": ("instruction", data.answer_column),
        "question_answer": ("input", data.answer_column),
    }
    if data.format != "auto":
        missing = [column for column in columns_of_format[data.format] if column not in row]
        if missing:
            raise DataError(
                f"{row_id}: data.format is {data.format}, but the row has no column {missing[0]!r}; "
                f"it has {', '.join(row)}."
            )
        return data.format
    for name, columns in columns_of_format.items():
        if all(column in row for column in columns):
            return name
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in columns_of_format.items())
    raise DataError(f"{row_id}: the columns {', '.join(row)} fit no known format ({known}); name data.prompt_template.")


def _from_messages(row_id: str, row: Row) -> list[Message]:
    listed = row.get("messages")
    if not isinstance(listed, list):
        raise DataError(f"{row_id}: messages must be a list, but is a {type(listed).__name__}.")
    messages = []
    for index, message in enumerate(listed):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{row_id}: messages[{index}] must be an object with role and content.")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise DataError(
                f"{row_id}: messages[{index}].role is {role!r}; the valid roles are system, user, assistant."
            )
        if not isinstance(content, str):
            raise DataError(f"{row_id}: messages[{index}].content must be text, but is a {type(content).__name__}.")
        messages.append(Message(role=role, content=content))
    return messages


def _turns(row_id: str, system_column: str, question: str, row: Row, answer_column: str) -> list[Message]:
    system = _text(row_id, row, system_column) if system_column in row else ""
    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=_text(row_id, row, answer_column)))
    return messages


def _text(row_id: str, row: Row, column: str) -> str:
    value = row.get(column)
    if column not in row:
        raise DataError(f"{row_id}: the row has no column {column!r}; it has {', '.join(row)}.")
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row_id}: the column {column!r} must be text, but is a {type(value).__name__}.")
    return value or ""


def _reason_to_drop(messages: list[Message]) -> str | None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in turns:
        return "no user turn"
    if turns != ["user", "assistant"] * (len(turns) // 2):
        return "bad role order"
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        return "empty answer"
    return None
