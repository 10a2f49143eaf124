"""A chunk of rows -> tokens, and one outcome for every row. What it does to a row depends on that row alone."""

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from launch.errors import DataError, RefusedConversationError, TemplateError
from launch.formats import BadRowError, Conversation, RowFormat, to_conversation
from launch.recipe import DataBlock
from launch.rows import Chunk, RawRow, rows_of
from launch.templates import ChatTemplate, Rendered, render_chat
from launch.tokens import Tokens, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What can become of a row, by number. Which of the kept ones are trained on is for the split to say.
OUTCOMES = (
    "kept",
    "too long",
    "answer cut",
    "empty answer",
    "nothing to train",
    "no user turn",
    "bad role order",
    "malformed",
    "duplicate",
)
KEPT, DUPLICATE = OUTCOMES.index("kept"), OUTCOMES.index("duplicate")


@dataclass(frozen=True)
class Work:
    """What is done to every row."""

    data: DataBlock
    formats: Mapping[str, RowFormat]  # by label of the file
    template: ChatTemplate
    tokenizer: "PreTrainedTokenizerBase"
    special: re.Pattern[str] | None  # the text of the tokenizer's special tokens


@dataclass(frozen=True)
class Dropped:
    """A row that is not in the samples, for quarantine.jsonl."""

    row_id: str
    reason: str
    detail: str
    row: str  # as JSON, or the line that is none

    def as_line(self) -> str:
        """One line of JSON."""
        head = {"row_id": self.row_id, "reason": self.reason, "detail": self.detail}
        return f'{json.dumps(head, ensure_ascii=False)[:-1]}, "row": {self.row}}}\n'


@dataclass(frozen=True)
class Batch:
    """What became of a chunk of rows."""

    numbers: npt.NDArray[np.int64]  # [rows]
    outcomes: npt.NDArray[np.uint8]  # [rows] places in OUTCOMES
    token_ids: npt.NDArray[np.int32]  # [tokens], of the kept rows end to end
    is_trained: npt.NDArray[np.bool_]  # [tokens]
    lengths: npt.NDArray[np.int64]  # [kept rows]
    num_trained: npt.NDArray[np.int64]  # [kept rows]
    digests: list[bytes]  # [kept rows] of tokens and mask, when duplicates are looked for
    last_tokens: list[tuple[int, ...]]  # [kept rows] the token that ends each trained answer
    notes: list[tuple[str, ...]]  # [kept rows] shortened, tokenised in pieces and why
    dropped: list[Dropped]


def account_for(chunk: Chunk, work: Work) -> Batch:
    """Every row of the chunk.

    Raises DataError for a bad row when the recipe says so, TemplateError when the template itself is of no use.
    """
    raws = list(rows_of(chunk))
    ids = [f"{chunk.file.label}:{raw.number}" for raw in raws]
    places: list[int] = []  # of the rows that are conversations
    prepared: list[_RenderedRow] = []
    faults: dict[int, tuple[str, str]] = {}  # by place: the reason and its detail
    for place, raw in enumerate(raws):
        try:
            conversation = conversation_of(raw, work.formats[chunk.file.label], ids[place])
            prepared.append((conversation, render(conversation, work, ids[place])))
            places.append(place)
        except BadRowError as error:
            faults[place] = error.reason, error.detail
    kept: list[Tokens] = []
    notes: list[tuple[str, ...]] = []
    for place, one, tokens in zip(places, prepared, _tokenise(prepared, work), strict=True):
        try:
            fitting = _fit(one, tokens, work)
        except BadRowError as error:
            faults[place] = error.reason, error.detail
            continue
        kept.append(fitting)
        notes.append((*(["shortened"] if fitting is not tokens else []), *filter(None, [fitting.in_pieces])))
    for place, (reason, detail) in sorted(faults.items()):
        is_long = reason in ("too long", "answer cut")
        if (work.data.overlong if is_long else work.data.bad_rows) == "error":
            remedy = "raise data.max_length, or set data.overlong" if is_long else "mend the row, or set data.bad_rows"
            raise DataError(f"{ids[place]}: {reason}: {detail}; {remedy}: {'drop' if is_long else 'quarantine'}.")
    outcomes = np.zeros(len(raws), np.uint8)
    for place, (reason, _) in faults.items():
        outcomes[place] = OUTCOMES.index(reason)
    no_tokens = np.zeros(0, np.int32)
    return Batch(
        np.asarray([raw.number for raw in raws], np.int64),
        outcomes,
        np.concatenate([no_tokens, *(row.ids for row in kept)]),
        np.concatenate([no_tokens.astype(np.bool_), *(row.is_trained for row in kept)]),
        np.asarray([len(row.ids) for row in kept], np.int64),
        np.asarray([row.is_trained.sum() for row in kept], np.int64),
        [_digest(row) for row in kept] if work.data.drop_duplicates else [],
        [tuple(int(row.ids[end]) for end in row.answer_ends) for row in kept],
        notes,
        [Dropped(ids[place], *faults[place], as_json(raws[place])) for place in sorted(faults)],
    )


def conversation_of(raw: RawRow, row_format: RowFormat, row_id: str) -> Conversation:
    """Raises BadRowError for a row that is none, or that cannot be trained on."""
    if raw.value is None or raw.fault:
        raise BadRowError("malformed", raw.fault)
    try:
        return to_conversation(raw.value, row_format, row_id)
    except RecursionError:
        raise BadRowError("malformed", "nested too deeply") from None


def render(conversation: Conversation, work: Work, row_id: str) -> Rendered:
    """Raises BadRowError when the template has no place for the conversation, TemplateError when it is of no use."""
    try:
        return render_chat(work.template, conversation.messages, tools=conversation.tools, special=work.special)
    except RefusedConversationError as error:
        raise BadRowError("malformed", str(error).rstrip(".")) from None
    except TemplateError as error:
        raise TemplateError(f"{row_id}: {error}") from None


def as_json(raw: RawRow) -> str:
    """The row; what is no row, or what JSON has no word for, as text."""
    value = raw.text if raw.value is None else dict(raw.value)
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(reprlib.repr(value))


def _digest(tokens: Tokens) -> bytes:
    return hashlib.sha256(tokens.ids.tobytes() + tokens.is_trained.tobytes()).digest()[:16]


_RenderedRow = tuple[Conversation, Rendered]


def _tokenise(rendered: Sequence[_RenderedRow], work: Work) -> list[Tokens]:
    texts, trained = [text for _, text in rendered], [conversation.trained_answers for conversation, _ in rendered]
    return tokenise(texts, trained, work.tokenizer) if texts else []


def _fit(rendered: _RenderedRow, tokens: Tokens, work: Work) -> Tokens:
    """The tokens to train on; others than these when the last answers were taken away. Raises BadRowError."""
    limit = work.data.max_length
    if tokens.fault:
        raise BadRowError("malformed", tokens.fault)
    if not tokens.is_trained.any():
        raise BadRowError("nothing to train", "no token of an answer is trained")
    if len(tokens.ids) <= limit:
        return tokens
    detail = f"{len(tokens.ids):,} tokens, and data.max_length is {limit:,}"
    if work.data.overlong != "truncate":
        raise BadRowError("too long", detail)
    # An answer without its end would teach the model never to stop, so that answers are kept whole or not at all. What
    # is left is rendered again: some formats end the last answer of a conversation otherwise than an earlier one.
    conversation, _ = rendered
    for num_answers in reversed(range(1, sum(end < limit for end in tokens.answer_ends) + 1)):
        shorter = conversation.up_to_trained_answer(num_answers)
        (fitting,) = _tokenise([(shorter, render(shorter, work, ""))], work)
        if len(fitting.ids) <= limit:
            return fitting
    raise BadRowError("answer cut", f"{detail}, within which no answer ends")
