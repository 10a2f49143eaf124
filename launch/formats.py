"""A row as it stands in its file -> a conversation, or the reason why there is nothing in it to train on. Pure."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from launch.errors import DataError
from launch.recipe import DataBlock, Source
from launch.rows import Row
from launch.templates import Message, load_prompt_template, render_prompt

# Why a row is not trained on.
Reason = Literal[
    "malformed", "no user turn", "bad role order", "empty answer", "nothing to train", "too long", "answer cut"
]

# The columns that tell a format, in the order in which they are tried.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "{answer}"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("input", "{answer}"),
}
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """One row as messages; `is_trained` says of each message whether it is learned, which only answers are."""

    messages: tuple[Message, ...]
    is_trained: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def trained_answers(self) -> list[bool]:
        """Of each answer, whether it is trained."""
        pairs = zip(self.messages, self.is_trained, strict=True)
        return [is_trained for message, is_trained in pairs if message["role"] == "assistant"]

    def up_to_trained_answer(self, count: int) -> "Conversation":
        """Its beginning, with so many of its trained answers."""
        end = [place for place, is_trained in enumerate(self.is_trained) if is_trained][count - 1] + 1
        return Conversation(self.messages[:end], self.is_trained[:end], self.tools)


class BadRowError(Exception):
    """A row that cannot be trained on: (reason, detail). It never leaves the preparation of the rows."""

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail.encode("utf-8", "backslashreplace").decode()  # it may quote the row
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one file become conversations."""

    name: str  # a key of COLUMNS, or prompt
    answer_column: str
    prompt_template: str
    prompt_source: str
    system: str | None
    train_on: Literal["all", "last"]


def choose_format(label: str, first_rows: Sequence[Row], source: Source, data: DataBlock) -> RowFormat:
    """From the recipe, or from the first of some rows that fits a format. Raises DataError when neither says."""
    answer = source.answer_column or data.answer_column
    prompt_template = source.prompt_template or (data.prompt_template if source.format is None else None)
    wanted = source.format or data.format
    columns_of = {name: tuple(answer if c == "{answer}" else c for c in columns) for name, columns in COLUMNS.items()}
    if prompt_template is not None:
        name = "prompt"
    elif wanted != "auto":
        name = wanted
    else:
        fitting = (
            name
            for row in first_rows
            for name, columns in columns_of.items()
            if all(column in row for column in columns)
        )
        found = next(fitting, None)
        if found is None:
            known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in columns_of.items())
            raise DataError(
                f"{label}: the columns {', '.join(first_rows[0])} fit no known format ({known}); name "
                "data.prompt_template."
            )
        name = found
    prompt_template = prompt_template or "alpaca"
    return RowFormat(name, answer, prompt_template, load_prompt_template(prompt_template), data.system, data.train_on)


def to_conversation(row: Row, row_format: RowFormat, row_id: str) -> Conversation:
    """The messages of a row. Raises BadRowError with the one reason why it cannot be trained on."""
    if row_format.name == "prompt":
        messages, weights = _from_prompt(row, row_format, row_id), None
    else:
        messages, weights = _READERS[row_format.name](row, row_format, row_id)
    if row_format.system is not None and not (messages and messages[0]["role"] == "system"):
        messages = [Message(role="system", content=row_format.system), *messages]
        weights = weights and [True, *weights]
    tools = _tools(row) if row_format.name in _WITH_TOOLS else ()
    _check_unicode(messages, tools)
    _check_roles([message["role"] for message in messages], messages)
    is_answer = [message["role"] == "assistant" for message in messages]
    is_trained = [answer and (weights is None or weights[i]) for i, answer in enumerate(is_answer)]
    if row_format.train_on == "last":
        last = max(i for i, answer in enumerate(is_answer) if answer)
        is_trained = [trained and i == last for i, trained in enumerate(is_trained)]
    for index, message in enumerate(messages):
        if is_trained[index] and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRowError("empty answer", f"message {index + 1} of {len(messages)}")
    if not any(is_trained):
        raise BadRowError("nothing to train", "every answer has train: false or weight: 0")
    return Conversation(tuple(messages), tuple(is_trained), tools)


_Read = tuple[list[Message], list[bool] | None]  # the messages, and whether each is to be trained (None: all)


def _from_messages(row: Row, row_format: RowFormat, row_id: str) -> _Read:
    listed = _list(row, "messages")
    if all(isinstance(entry, str) for entry in listed):
        return [Message(role=("user", "assistant")[i % 2], content=entry) for i, entry in enumerate(listed)], None
    return _openai_messages(listed, "messages")


def _openai_messages(listed: Sequence[Any], column: str) -> _Read:
    messages: list[Message] = []
    weights = []
    for index, entry in enumerate(listed):
        where = f"{column}[{index}]"
        if not isinstance(entry, dict) or "role" not in entry:
            _malformed(f"{where} must be an object with role and content")
        role = "system" if entry["role"] == "developer" else entry["role"]
        if role not in ROLES:
            _malformed(f"{where}.role is {_short(role)}; the valid roles are {', '.join(ROLES)}")
        calls = entry.get("tool_calls")
        if "content" not in entry and not calls:
            _malformed(f"{where} must be an object with role and content")
        message = Message(role=role, content=_content(entry.get("content"), where))
        if calls:
            if role != "assistant":
                _malformed(f"{where} has tool_calls, but its role is {role}")
            message["tool_calls"] = _tool_calls(calls, where)
        if role == "tool" and isinstance(entry.get("name"), str):
            message["name"] = entry["name"]
        messages.append(message)
        weights.append(_weight(entry, where))
    return messages, weights


def _from_sharegpt(row: Row, row_format: RowFormat, row_id: str) -> _Read:
    system = _text(row, "system") if "system" in row else ""
    messages = [Message(role="system", content=system)] if system else []
    for index, entry in enumerate(_list(row, "conversations")):
        where = f"conversations[{index}]"
        if not isinstance(entry, dict) or not {"from", "value"} <= entry.keys():
            _malformed(f"{where} must be an object with from and value")
        spoken_by, value = entry["from"], entry["value"]
        if not isinstance(spoken_by, str) or spoken_by not in SHAREGPT_ROLES:
            _malformed(f"{where}.from is {_short(spoken_by)}; the valid ones are {', '.join(SHAREGPT_ROLES)}")
        if spoken_by == "function_call":
            message = Message(role="assistant", content="")
            message["tool_calls"] = _tool_calls(value, where)
        else:
            message = Message(role=SHAREGPT_ROLES[spoken_by], content=_content(value, where))
        messages.append(message)
    return messages, None


def _from_alpaca(row: Row, row_format: RowFormat, row_id: str) -> _Read:
    system = _text(row, "system") if "system" in row else ""
    messages = [Message(role="system", content=system)] if system else []
    history = row.get("history") or []
    if not isinstance(history, list):
        _malformed(f"history must be a list of pairs, but is {_kind(history)}")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            _malformed(f"history[{index}] must be a pair of texts, question and answer")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return [*messages, *_from_prompt(row, row_format, row_id)], None


def _from_question_answer(row: Row, row_format: RowFormat, row_id: str) -> _Read:
    system = _text(row, "instruction") if "instruction" in row else ""
    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=_text(row, "input")))
    messages.append(Message(role="assistant", content=_text(row, row_format.answer_column)))
    return messages, None


def _from_prompt_completion(row: Row, row_format: RowFormat, row_id: str) -> _Read:
    messages: list[Message] = []
    weights: list[bool] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(column), list):
            more, more_weights = _openai_messages(row[column], column)
            assert more_weights is not None
            messages += more
            # What stands in the prompt is given, its answers too.
            weights += more_weights if column == "completion" else [False] * len(more)
        else:
            messages.append(Message(role=role, content=_text(row, column)))
            weights.append(True)
    return messages, weights


_WITH_TOOLS = ("messages", "sharegpt", "prompt_completion")
_READERS: dict[str, Callable[[Row, RowFormat, str], _Read]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "question_answer": _from_question_answer,
    "prompt_completion": _from_prompt_completion,
}


def _from_prompt(row: Row, row_format: RowFormat, row_id: str) -> list[Message]:
    """The user turn that a prompt template makes of the row, and the answer."""
    if row_format.name == "alpaca":
        _text(row, "instruction")
        _text(row, "input", default="")
    try:
        prompt = render_prompt(row_format.prompt_template, row_format.prompt_source, row, row_id)
    except DataError as error:
        _malformed(str(error).removeprefix(f"{row_id}: ").rstrip("."))
    answer = _text(row, row_format.answer_column)
    return [Message(role="user", content=prompt), Message(role="assistant", content=answer)]


# ---- parts of a row ----


def _text(row: Row, column: str, default: str | None = None) -> str:
    if column not in row:
        if default is not None:
            return default
        _malformed(f"the row has no column {column!r}; it has {', '.join(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        _malformed(f"the column {column!r} must be text, but is {_kind(value)}")
    return value or ""


def _list(row: Row, column: str) -> list[Any]:
    if column not in row:
        _malformed(f"the row has no column {column!r}; it has {', '.join(row)}")
    if not isinstance(row[column], list):
        _malformed(f"{column} must be a list, but is {_kind(row[column])}")
    return list(row[column])


def _content(value: object, where: str) -> str:
    """Text, or OpenAI's list of text parts; null is no text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _malformed(f"{where}.content must be text, but is {_kind(value)}")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = _short(part.get("type")) if isinstance(part, dict) else _kind(part)
            _malformed(f"{where}.content[{index}] must be a text part, but is {kind}")
        texts.append(part["text"])
    return "".join(texts)


def _weight(entry: Mapping[str, Any], where: str) -> bool:
    train, weight = entry.get("train"), entry.get("weight")
    if train is not None and not isinstance(train, bool):
        _malformed(f"{where}.train must be true or false, but is {_short(train)}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        _malformed(f"{where}.weight must be 0 or 1, but is {_short(weight)}")
    return train is not False and weight != 0


def _tool_calls(value: object, where: str) -> list[dict[str, Any]]:
    """OpenAI's form with the arguments as an object, which is what templates render; a bare {name, arguments} too."""
    value = _parsed(value, where)
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else [value]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _malformed(f"{where}: tool call {index + 1} must have a name and arguments")
        arguments = _parsed(function.get("arguments", {}), f"{where}: the arguments of tool call {index + 1}")
        if not isinstance(arguments, dict):
            _malformed(f"{where}: the arguments of tool call {index + 1} must be an object, but are {_kind(arguments)}")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not calls:
        _malformed(f"{where} calls no tool")
    return calls


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The `tools` column: a list of OpenAI's function schemas, or its JSON text."""
    value = row.get("tools")
    if value in (None, "", []):
        return ()
    value = _parsed(value, "tools")
    if not isinstance(value, list):
        _malformed(f"tools must be a list, but is {_kind(value)}")
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _malformed(f"tools[{index}] must have a name")
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        _malformed(f"{where}: not JSON: {error}")


def _check_roles(roles: list[str], messages: Sequence[Message]) -> None:
    """[system] and then turns: the user asks, the assistant answers, in between as many tool calls as it likes."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    asked = [message for message in messages if message["role"] == "user"]
    if not any(message["content"].strip() for message in asked):
        raise BadRowError("no user turn", "nobody asks anything" if not asked else "every user turn is empty")
    # What may come after a role, and whether tools were called, which must answer.
    previous = "start"
    for index, role in enumerate(turns):
        called = index > 0 and bool(messages[index - 1 + len(roles) - len(turns)].get("tool_calls"))
        allowed = {"start": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}.get(
            previous, ("tool",) if called else ("user",)
        )
        if role not in allowed:
            place = index + 1 + len(roles) - len(turns)
            raise BadRowError("bad role order", f"message {place} is {role}, and {' or '.join(allowed)} was due")
        previous = role
    if previous != "assistant":
        raise BadRowError("bad role order", f"the last message is {previous}, and must be assistant")


def _check_unicode(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    parts = [(f"message {index + 1}", _texts(message)) for index, message in enumerate(messages)]
    for where, texts in [*parts, ("tools", json.dumps(tools, ensure_ascii=False))] if tools else parts:
        try:
            texts.encode()
        except UnicodeEncodeError as error:
            _malformed(f"{where} is not valid Unicode: {error.reason} ({error.object[error.start]!r})")


def _texts(message: Message) -> str:
    """All that a row has written in it; of nearly all messages that is the content, and JSON would take far longer."""
    return message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)


def _malformed(detail: str) -> NoReturn:
    raise BadRowError("malformed", detail)


def _kind(value: object) -> str:
    names = {"NoneType": "null", "str": "text", "int": "a number", "float": "a number", "bool": "true or false"}
    name = type(value).__name__
    return names.get(name, f"a {name}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
