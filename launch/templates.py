"""Messages -> text and trained spans, by Jinja templates in a sandbox.

Chat templates are Hugging Face's standard (`messages, add_generation_prompt, bos_token, eos_token`), so the file that
is trained with is also what serving tools render. `{% generation %} ... {% endgeneration %}` marks what is trained.
"""

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from launch.errors import DataError, RefusedConversationError, TemplateError

TEMPLATES_DIRECTORY = Path(__file__).resolve().parent.parent / "templates"

# Marks around answers, and in the place of text that must not become a special token, while a template renders.
# Random, so that no row can contain them; letters and digits, which no filter of a template writes otherwise.
_SECRET = f"x{secrets.token_hex(8)}x"
_MARK = re.compile(f"{_SECRET}(begin|end|[0-9]+){_SECRET}", re.IGNORECASE)
_GENERATION_TAG = r"(\{%%[-+]?\s*)%s(\s*[-+]?%%\})"

Span = tuple[int, int]  # [start, end) characters


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]  # [{"type": "function", "function": {"name", "arguments"}}]
    name: NotRequired[str]  # of the tool that speaks


KNOWN_CONVERSATION = [
    Message(role="user", content="Qa17"),
    Message(role="assistant", content="Ax29"),
    Message(role="user", content="Qb31"),
    Message(role="assistant", content="Ay43"),
]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[Span, ...]  # of every assistant message, in order: what the model has to say, its end token included
    literals: tuple[Span, ...] = ()  # what looks like a special token and is a row's own text


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may write."""

    name: str
    source: str
    bos_token: str = ""
    eos_token: str = ""

    @property
    def for_serving(self) -> str:
        """The source with `if true` for the generation tags, which not every serving tool knows: the same text."""
        opened = re.sub(_GENERATION_TAG % "generation", r"\1if true\2", self.source)
        return re.sub(_GENERATION_TAG % "endgeneration", r"\1endif\2", opened)

    @functools.cached_property
    def marks_answers(self) -> bool:
        """Whether it says itself what is trained."""
        return re.search(_GENERATION_TAG % "generation", self.source) is not None

    @functools.cached_property
    def takes_tools(self) -> bool:
        """Whether it renders the tools of a conversation."""
        tree = _environment(jinja2.Undefined).parse(self.source)
        return any(name.name == "tools" for name in tree.find_all(nodes.Name))


def load_chat_template(name: str) -> ChatTemplate:
    """Read `templates/chat/<name>.jinja`. Raises TemplateError when there is none."""
    return ChatTemplate(name, _read(name, "chat"))


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    special: re.Pattern[str] | None = None,
) -> Rendered:
    """Render a conversation, whole, and find its answers: by the template's generation tags, else by its prefixes.

    `special` matches the tokenizer's special tokens; where a row contains such text, it is reported as literal.
    Raises TemplateError with the template's own reason, or when it does not mark every answer, or when it has no tags
    and its prompts are not prefixes of the whole, naming the message where that breaks.
    """
    if tools and not template.takes_tools:
        raise RefusedConversationError(
            f"The template {template.name} has no place for tools; choose one of {', '.join(_names_with_tools())}, or "
            "tokenizer, if the model's own has."
        )
    literals: list[str] = []
    if special is not None and _may_match(special, messages, tools):
        messages, tools = _protected(messages, special, literals), _protected(tools, special, literals)
    marked = _render(template, messages, tools)
    if not template.marks_answers:
        marked = _marked_by_prefixes(template, messages, tools, marked)
    rendered = _without_marks(marked, literals)
    num_answers = sum(message["role"] == "assistant" for message in messages)
    if len(rendered.answers) != num_answers:
        raise TemplateError(f"The template {template.name} marks {len(rendered.answers)} of {num_answers} answers.")
    return rendered


def render_generation_prompt(
    template: ChatTemplate, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """What serving tools send so that the model answers `messages`."""
    return render_question(template, messages, tools=tools).text


def render_question(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    special: re.Pattern[str] | None = None,
) -> Rendered:
    """The same with what looks like a special token in a message reported as literal, and no answer to be trained."""
    literals: list[str] = []
    if special is not None and _may_match(special, messages, tools):
        messages, tools = _protected(messages, special, literals), _protected(tools, special, literals)
    rendered = _without_marks(_render(template, messages, tools, add_generation_prompt=True), literals)
    return replace(rendered, answers=())


def prove_mask(template: ChatTemplate) -> None:
    """Render known conversations and compare every answer's span with the prompt that serving tools would send.

    Raises TemplateError when a span begins inside its prompt (a mask that trains questions, or everything), when it
    does not hold the answer, or when the prompt is not what stands before the answer.
    """
    for conversation in (KNOWN_CONVERSATION[:2], KNOWN_CONVERSATION):
        rendered = render_chat(template, conversation)
        text = rendered.text
        for (start, end), index in zip(rendered.answers, range(1, len(conversation), 2), strict=True):
            prompt = render_generation_prompt(template, conversation[:index])
            if not text.startswith(prompt):
                raise TemplateError(
                    f"The template {template.name} writes another text before message {index + 1} in training than the "
                    f"prompt that is served: {_around_difference(prompt, text)}."
                )
            if start < len(prompt):
                raise TemplateError(
                    f"The template {template.name} marks {text[start : len(prompt)]!r} as an answer, which is part of "
                    "the prompt."
                )
            if conversation[index]["content"] not in text[start:end]:
                raise TemplateError(
                    f"The template {template.name} marks {text[start:end]!r} as the answer of message {index + 1}, "
                    f"which is {conversation[index]['content']!r}."
                )
            others = [message["content"] for place, message in enumerate(conversation) if place != index]
            if any(other in text[start:end] for other in others):
                raise TemplateError(
                    f"The template {template.name} marks {text[start:end]!r} as the answer of message {index + 1}, "
                    "which holds another message."
                )


def load_prompt_template(name: str) -> str:
    """The source of `templates/prompt/<name>.jinja`, which turns a row into the user turn."""
    return _read(name, "prompt")


def render_prompt(name: str, source: str, row: Mapping[str, Any], row_id: str) -> str:
    """The user turn of one row. Raises DataError for a column that the row has not, or that is of the wrong kind."""
    compiled = _compile(source, jinja2.StrictUndefined)
    try:
        return compiled.render({column: value for column, value in row.items() if value is not None})  # null is no word
    except jinja2.UndefinedError as error:
        columns = ", ".join(row)
        raise DataError(
            f"{row_id}: templates/prompt/{name}.jinja names a missing column: {error}; it has {columns}."
        ) from None
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, ValueError) as error:
        raise DataError(f"{row_id}: templates/prompt/{name}.jinja failed: {error}.") from None


def _read(name: str, kind: str) -> str:
    directory = TEMPLATES_DIRECTORY / kind
    names = sorted(path.stem for path in directory.glob("*.jinja"))
    if name not in names:  # membership, so that a name is never a path
        raise TemplateError(f"There is no {kind} template {name!r}; the valid names are {', '.join(names)}.")
    return (directory / f"{name}.jinja").read_text(encoding="utf-8")


def _names_with_tools() -> list[str]:
    paths = sorted((TEMPLATES_DIRECTORY / "chat").glob("*.jinja"))
    return [path.stem for path in paths if load_chat_template(path.stem).takes_tools]


def _render(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    compiled = _compile(template.source, jinja2.Undefined)
    try:
        return compiled.render(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            bos_token=template.bos_token,
            eos_token=template.eos_token,
        )
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, ValueError) as error:
        raise RefusedConversationError(
            f"The template {template.name} refused a conversation: {str(error).rstrip('.')}."
        ) from None


def _marked_by_prefixes(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], whole: str
) -> str:
    """The text with marks around every answer: from the end of its prompt to the end of the conversation up to it."""
    pieces, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(template, messages[:index], tools, add_generation_prompt=True)
        through = _render(template, messages[: index + 1], tools)
        for part in (prompt, through):
            if not whole.startswith(part):
                raise TemplateError(
                    f"The template {template.name} has no generation tags and is not prefix-stable, so that its "
                    f"answers cannot be found: it breaks at messages[{index}] of {len(messages)}, "
                    f"{_around_difference(part, whole)}; mark the answers with {{% generation %}} in a copy of it."
                )
        turn = through[len(prompt) :]
        answer = message["content"] if turn.startswith(message["content"]) else ""
        end = len(prompt) + len(answer) + len(turn[len(answer) :].rstrip())  # without the space after the end token
        pieces += [whole[position : len(prompt)], _mark("begin"), whole[len(prompt) : end], _mark("end")]
        position = end
    return "".join(pieces) + whole[position:]


def _without_marks(marked: str, literals: Sequence[str]) -> Rendered:
    pieces: list[str] = []
    answers: list[Span] = []
    literal_spans: list[Span] = []
    length = start = 0
    for index, piece in enumerate(_MARK.split(marked)):
        if index % 2 == 0:
            pieces.append(piece)
            length += len(piece)
        elif piece.lower() == "begin":
            start = length
        elif piece.lower() == "end":
            answers.append((start, length))
        else:
            pieces.append(literals[int(piece)])
            literal_spans.append((length, length + len(pieces[-1])))
            length += len(pieces[-1])
    if any(_SECRET in piece.lower() for piece in pieces):
        raise TemplateError("The template cuts texts into parts that cannot be followed; choose another data.template.")
    return Rendered("".join(pieces), tuple(answers), tuple(literal_spans))


def _may_match(special: re.Pattern[str], messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Quick, for nearly all rows have neither tools nor anything that looks like a special token."""
    return bool(tools) or any("tool_calls" in m or "name" in m or special.search(m["content"]) for m in messages)


_Value = TypeVar("_Value")


def _protected(value: _Value, special: re.Pattern[str], literals: list[str]) -> _Value:
    """The same value with a mark in the place of everything in its strings that looks like a special token."""

    def mark(match: re.Match[str]) -> str:
        literals.append(match[0])
        return _mark(str(len(literals) - 1))

    def protect(part: Any) -> Any:
        if isinstance(part, str):
            return special.sub(mark, part)
        if isinstance(part, Mapping):
            return {protect(key): protect(item) for key, item in part.items()}
        return [protect(item) for item in part] if isinstance(part, list | tuple) else part

    protected: _Value = protect(value)
    return protected


def _mark(content: str) -> str:
    return f"{_SECRET}{content}{_SECRET}"


def _around_difference(part: str, whole: str) -> str:
    place = next((i for i, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other), len(whole))
    return f"{part[place : place + 30]!r} against {whole[place : place + 30]!r}"


class _Generation(Extension):
    """`{% generation %}` blocks, whose text is put between marks."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line_number)

    def _mark(self, caller: Callable[[], str]) -> str:
        return _mark("begin") + caller() + _mark("end")


_METHODS = frozenset(dir(dict))
_OF_A_LOOP = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Finds `message.role` of a plain dict, and `loop.first`, without what else it might be: most of a rendering."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is LoopContext and attribute in _OF_A_LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _environment(undefined: type[jinja2.Undefined]) -> _Sandbox:
    # The options are those of transformers' own chat templates, so that the same source gives the same text there.
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, undefined=undefined, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise  # but no clock: training text must not depend on the day
    return environment


@functools.lru_cache(maxsize=64)
def _compile(source: str, undefined: Callable[..., jinja2.Undefined]) -> jinja2.Template:
    try:
        template = _environment(undefined).from_string(source)
        template.globals = dict(template.globals)  # a plain dict: each rendering copies it
        return template
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"A template is not valid Jinja: line {error.lineno}: {error.message}.") from None
