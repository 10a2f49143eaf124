"""Ask what was trained: a prompt, a conversation on the terminal, or a file of prompts, answered as serving would."""

import json
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from launch import batching
from launch.answering import Decoding, Speaker, load_speaker, new_tokens
from launch.errors import DataError, LaunchError
from launch.formats import ROLES
from launch.templates import Message, render_question
from launch.tokens import special_pattern, tokenise

Say = Callable[[str], None]
FORMS = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
_BEGINNING = '{"line": '  # of every line of answers


@dataclass(frozen=True)
class Asking:
    """How every question is asked."""

    decoding: Decoding
    seed: int | None = None  # of sampling, with the number of the question
    system: str | None = None  # of conversations that have none of their own

    def settings(self) -> dict[str, Any]:
        """All of it, for the file of answers."""
        return {"system": self.system, "seed": self.seed, **vars(self.decoding)}


@dataclass(frozen=True)
class Reply:
    """What was said."""

    text: str
    num_tokens: int
    is_cut: bool  # it ended because there was no more room


@dataclass(frozen=True)
class Question:
    """A line of a file of prompts."""

    line: int
    given: Mapping[str, Any]
    messages: tuple[Message, ...]


def chat(
    source: str,
    compare: str | None,
    asking: Asking,
    *,
    prompt: str | None = None,
    files: tuple[Path, Path] | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Answer `prompt`, or the first of `files` into the second, or what is typed, or what standard input holds.

    `base` is for the adapter `source`. Raises a LaunchError for what cannot be asked or loaded, before any answer.
    """
    names = [source] if compare is None else [source, compare]
    questions: list[Question] = []
    known: set[tuple[int, str]] = set()
    if files is not None:
        questions = read_questions(files[0])
        known = answered_before(files[1], questions, asking)
        if all((question.line, name) in known for question in questions for name in names):
            print(f"{files[1]}: all {len(questions)} are answered already.")
            return
    elif prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None:
        user_turn(prompt)
    speakers = [load_speaker(source, key="SOURCE", base=base, trust_remote_code=trust_remote_code)]
    if compare is not None:
        other = load_speaker(compare, key="--compare", trust_remote_code=trust_remote_code, like=speakers[0])
        speakers.append(other)
    if files is not None:
        num_new, num_cut = answer_file(speakers, questions, known, *files, asking)
        print(f"{files[1]}: {num_new} answers added to {len(known)}; {num_cut} of them cut (is_cut).")
    elif prompt is not None:
        answer_once(speakers, prompt, asking)
    else:
        import readline  # noqa: F401 - arrow keys and characters of two columns, in input()

        converse(speakers, asking, lambda: input("> "))


# ---- a question and its answer ----


def prompt_ids(speaker: Speaker, messages: Sequence[Message]) -> list[int]:
    """The tokens of the conversation up to the answer; no message becomes a special token.

    Raises TemplateError when the template refuses the conversation, DataError when it cannot be written as tokens or
    the model has no room for an answer.
    """
    tokenizer = speaker.tokenizer
    rendered = render_question(speaker.template, messages, special=special_pattern(tokenizer))
    try:
        rendered.text.encode()
    except UnicodeEncodeError:
        raise DataError("The prompt is not UTF-8 (it has half a character); write it otherwise.") from None
    (tokens,) = tokenise([rendered], [[]], tokenizer)
    if tokens.fault:
        raise DataError(f"The prompt cannot be asked, for {tokens.fault}; write it otherwise.")
    room = _room(speaker)
    if room is not None and len(tokens.ids) >= room:
        raise DataError(
            f"The conversation has {len(tokens.ids)} tokens, and {speaker.name} has room for {room} with its answer; "
            "ask something shorter, or begin again."
        )
    ids: list[int] = tokens.ids.tolist()
    return ids


def _room(speaker: Speaker) -> int | None:
    """Tokens that the model has positions for; None when it does not say."""
    room: int | None = getattr(speaker.model.config, "max_position_embeddings", None)
    return room


def reply(speaker: Speaker, messages: Sequence[Message], asking: Asking, number: int, say: Say) -> Reply:
    """Answer the conversation; `say` is given the answer as it is made. The seed is that of question `number`."""
    ids, room, decoding = prompt_ids(speaker, with_system(messages, asking.system)), _room(speaker), asking.decoding
    limit = decoding.max_new_tokens if room is None else min(decoding.max_new_tokens, room - len(ids))
    if asking.seed is not None:
        torch.manual_seed(batching.step_seed(asking.seed, number, 0))
    stream = _Stream(speaker.tokenizer, say)
    made = new_tokens(
        speaker.model,
        ids,
        speaker.stops,
        replace(decoding, max_new_tokens=limit),
        trust_remote_code=speaker.trust_remote_code,
        streamer=stream,
    )
    return Reply(stream.text(), len(made), len(made) == limit and made[-1] not in speaker.stops)


class _Stream:  # what transformers calls a streamer
    """Says the text of the tokens as far as it is certain: an unfinished character waits for its last byte."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] | None = None  # None until the prompt has come by
        self._num_said = 0

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        known = [token for token in value.flatten().tolist() if token < len(self._tokenizer)]
        self._ids += known  # a head may have rows that are no tokens
        self._say_to(self.text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        self._say_to(self.text())

    def text(self) -> str:
        decoded: str = self._tokenizer.decode(
            self._ids or [], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def _say_to(self, text: str) -> None:
        if len(text) > self._num_said:
            self._say(text[self._num_said :])
            self._num_said = len(text)


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The messages behind the system message, if there is one and they have none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return tuple(messages)
    return (Message(role="system", content=system), *messages)


def user_turn(text: str) -> Message:
    """What the user typed. Raises DataError for no text."""
    if not text.strip():
        raise DataError("The prompt is empty; ask something.")
    return Message(role="user", content=text)


# ---- on the terminal ----


def answer_once(speakers: Sequence[Speaker], prompt: str, asking: Asking) -> None:
    """Print each one's answer as it is made; what is said about it goes to standard error."""
    for speaker in speakers:
        _print_reply(speaker, [user_turn(prompt)], asking, 0, is_labelled=len(speakers) > 1)


def converse(speakers: Sequence[Speaker], asking: Asking, read: Callable[[], str]) -> None:
    """Answer what `read` gives until it raises EOFError or KeyboardInterrupt, or gives /exit; /reset begins again."""
    for speaker in speakers:
        _note(f"{speaker.name}: {speaker.kind}.")
    _note("/reset begins again; /exit or Ctrl-D ends; Ctrl-C ends an answer.")
    histories: list[list[Message]] = [[] for _ in speakers]
    number = 0
    with suppress(EOFError, KeyboardInterrupt):
        while (text := read().strip()) != "/exit":
            if text == "/reset":
                histories = [[] for _ in speakers]
                _note("The conversation begins again.")
            elif text:
                for speaker, history in zip(speakers, histories, strict=True):
                    _take_turn(speaker, history, text, asking, number, is_labelled=len(speakers) > 1)
                number += 1
    print(flush=True)


def _take_turn(
    speaker: Speaker, history: list[Message], text: str, asking: Asking, number: int, *, is_labelled: bool
) -> None:
    """Ask, and remember question and answer; a question that got no answer is forgotten."""
    messages, said = [*history, user_turn(text)], list[str]()
    try:
        _print_reply(speaker, messages, asking, number, is_labelled=is_labelled, also=said.append)
    except LaunchError as error:
        _note(str(error))
    except KeyboardInterrupt:
        print(flush=True)
        _note("Stopped; what was said so far is remembered.")
    if said:
        history[:] = [*messages, Message(role="assistant", content="".join(said))]


def _print_reply(
    speaker: Speaker,
    messages: Sequence[Message],
    asking: Asking,
    number: int,
    *,
    is_labelled: bool,
    also: Say | None = None,
) -> None:
    if is_labelled:
        print(f"── {speaker.name}: {speaker.kind}", flush=True)

    def say(text: str) -> None:
        print(printable(text), end="", flush=True)
        if also is not None:
            also(text)

    found = reply(speaker, messages, asking, number, say)
    print(flush=True)
    if found.is_cut:
        is_ours = found.num_tokens == asking.decoding.max_new_tokens
        why = "--max-new-tokens gives it more" if is_ours else f"{speaker.name} has no room for more"
        _note(f"The answer was cut after {found.num_tokens} tokens; {why}.")


def printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- a file of prompts ----


def read_questions(path: Path) -> list[Question]:
    """The prompts of a file. Raises DataError for a file that cannot be read and a line of another form."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    questions = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"--file {path} holds no prompts; a line of it is {FORMS}.")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    try:
        given = json.loads(line)
    except ValueError:
        given = None
    messages = None
    if isinstance(given, dict) and given.keys() == {"prompt"} and isinstance(given["prompt"], str):
        messages = [Message(role="user", content=given["prompt"])]
    elif isinstance(given, dict) and given.keys() == {"messages"} and isinstance(given["messages"], list):
        messages = given["messages"] if all(map(_is_message, given["messages"])) else None
    if not messages or messages[-1]["role"] == "assistant" or not messages[-1]["content"].strip():
        raise DataError(f"{path}:{number} is no prompt; each line is {FORMS}, and something is asked last.")
    return Question(number, given, tuple(messages))


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in ROLES
        and isinstance(value["content"], str)
    )


def answered_before(output: Path, questions: Sequence[Question], asking: Asking) -> set[tuple[int, str]]:
    """(line, source) of the answers in `output`, from which a half-written last line is taken away.

    Raises DataError when a line answers another question, or with other settings, or is something else.
    """
    if not output.exists():
        if not output.parent.is_dir():
            raise DataError(f"--output: there is no directory {output.parent}; make it first.")
        return set()
    try:
        whole, newline, torn = output.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise DataError(f"--output {output} cannot be read: {error.strerror}.") from None
    asked = {question.line: question.given for question in questions}
    known = set()
    for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
        record = _record(line)
        given = asked.get(record.get("line", 0))
        if given is None or any(record.get(name) != value for name, value in given.items()):
            raise DataError(f"{output}:{number} is no answer to a line of --file; give another --output.")
        if record.get("settings") != asking.settings():
            raise DataError(f"{output}:{number} was answered with other settings; give those, or another --output.")
        known.add((int(record["line"]), str(record["source"])))
    if not torn.startswith(_BEGINNING.encode()[: len(torn)]):
        raise DataError(f"{output} is no file of answers; give another --output.")
    if torn:
        with output.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    return known


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def answer_file(
    speakers: Sequence[Speaker],
    questions: Sequence[Question],
    known: set[tuple[int, str]],
    path: Path,
    output: Path,
    asking: Asking,
) -> tuple[int, int]:
    """Append the answers that are not `known` to `output`, a whole line each: (how many, how many of them cut).

    Raises DataError before the first one when any question cannot be asked.
    """
    left = [(question, speaker) for question in questions for speaker in speakers]
    left = [(question, speaker) for question, speaker in left if (question.line, speaker.name) not in known]
    for question, speaker in left:
        try:
            prompt_ids(speaker, with_system(question.messages, asking.system))
        except LaunchError as error:
            raise DataError(f"{path}:{question.line}: {error}") from None
    num_cut = 0
    with output.open("a", encoding="utf-8") as file:
        for question, speaker in tqdm(left, desc="answers", leave=False, disable=None):
            found = reply(speaker, question.messages, asking, question.line, lambda _: None)
            num_cut += found.is_cut
            record = {
                "line": question.line,
                **question.given,
                "answer": found.text,
                "is_cut": found.is_cut,
                "source": speaker.name,
                "settings": asking.settings(),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    return len(left), num_cut
