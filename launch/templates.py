"""Messages -> text and trained spans, by Jinja templates in a sandbox.

Chat templates are Hugging Face's standard (`messages, add_generation_prompt, bos_token, eos_token`), so the file that
is trained with is also what serving tools render. `{% generation %} ... {% endgeneration %}` marks what is trained.
"""

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from launch.errors import DataError, TemplateError

TEMPLATES_DIRECTORY = Path(__file__).resolve().parent.parent / "templates"

# Marks around trained text while a template renders; random, so that no row can contain them.
_SPAN_START, _SPAN_END = (f"\ue000{secrets.token_hex(8)}{side}\ue001" for side in "<>")


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are the [start, end) characters that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


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
        tag = r"(\{%%[-+]?\s*)%s(\s*[-+]?%%\})"
        opened = re.sub(tag % "generation", r"\1if true\2", self.source)
        return re.sub(tag % "endgeneration", r"\1endif\2", opened)


def marks_answers(source: str) -> bool:
    """Whether a chat template says what is trained."""
    return re.search(r"\{%[-+]?\s*generation\b", source) is not None


def load_chat_template(name: str) -> ChatTemplate:
    """Read `templates/chat/<name>.jinja`. Raises TemplateError when it is missing or marks nothing as trained."""
    source = _read(name, "chat")
    if not marks_answers(source):
        raise TemplateError(
            f"templates/chat/{name}.jinja marks no answer with {{% generation %}} ... {{% endgeneration %}}."
        )
    return ChatTemplate(name, source)


def render_chat(
    template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Rendered:
    """Render a whole conversation once. Raises TemplateError with the template's own reason."""
    try:
        marked = _compile(template.source, jinja2.Undefined).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=template.bos_token,
            eos_token=template.eos_token,
        )
    except jinja2.TemplateError as error:
        raise TemplateError(f"The template {template.name} refused a conversation: {error}.") from None
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"({_SPAN_START}|{_SPAN_END})", marked):
        if piece == _SPAN_START:
            start = length
        elif piece == _SPAN_END:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Rendered("".join(pieces), tuple(spans))


def load_prompt_template(name: str) -> str:
    """The source of `templates/prompt/<name>.jinja`, which turns a row into the user turn."""
    return _read(name, "prompt")


def render_prompt(name: str, source: str, row: Mapping[str, Any], row_id: str) -> str:
    """The user turn of one row. Raises DataError when the template names a column that the row has not."""
    try:
        given = {column: value for column, value in row.items() if value is not None}  # null is not a word
        return _compile(source, jinja2.StrictUndefined).render(given)
    except jinja2.UndefinedError as error:
        columns = ", ".join(row)
        raise DataError(
            f"{row_id}: templates/prompt/{name}.jinja names a missing column: {error}; it has {columns}."
        ) from None
    except jinja2.TemplateError as error:
        raise TemplateError(f"{row_id}: templates/prompt/{name}.jinja failed: {error}.") from None


def _read(name: str, kind: str) -> str:
    directory = TEMPLATES_DIRECTORY / kind
    names = sorted(path.stem for path in directory.glob("*.jinja"))
    if name not in names:  # membership, so that a name is never a path
        raise TemplateError(f"There is no {kind} template {name!r}; the valid names are {', '.join(names)}.")
    return (directory / f"{name}.jinja").read_text(encoding="utf-8")


class _Generation(Extension):
    """`{% generation %}` blocks, whose text is put between the span marks."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line_number)

    def _mark(self, caller: Callable[[], str]) -> str:
        return _SPAN_START + caller() + _SPAN_END


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=64)
def _compile(source: str, undefined: type[jinja2.Undefined]) -> jinja2.Template:
    # The options are those of transformers' own chat templates, so that the same source gives the same text there.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=undefined, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"A template is not valid Jinja: line {error.lineno}: {error.message}.") from None
