"""Rendered text -> token ids and what of them is trained.

A conversation is tokenised whole, as it will be served. Three kinds of rows go piece by piece instead, and are counted:
those whose own text looks like a special token (it stays text), those where a token would reach across the edge of an
answer (half of it trained), and all rows of a tokenizer that cannot say which characters a token stands for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from launch.templates import Rendered, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "x", "。")
Pieces = Literal["special-token text", "token across an edge", "slow tokenizer"]


@dataclass(frozen=True)
class Tokens:
    """One conversation as token ids."""

    ids: npt.NDArray[np.int32]  # [tokens]
    is_trained: npt.NDArray[np.bool_]  # [tokens]; never the first one, which nothing predicts
    answer_ends: tuple[int, ...]  # [trained answers] where each one's last token stands
    in_pieces: Pieces | None = None  # why it was not tokenised whole
    fault: str = ""  # why the row's own text cannot be told from a special token


def special_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Matches the text of any special token of the tokenizer, the longest first; None when it has none."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None


def _rewriting(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """The pattern of the special tokens, if the tokenizer finds them in normalised text, where a row may hide one."""
    added = tokenizer.added_tokens_decoder.values()
    normalises = tokenizer.backend_tokenizer.normalizer is not None
    return special_pattern(tokenizer) if normalises and any(t.special and t.normalized for t in added) else None


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids that no text of a row becomes; one of them ends an answer."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def tokenise(
    rendered: Sequence[Rendered], trained: Sequence[Sequence[bool]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Tokens]:
    """The tokens of each conversation; `trained` says of each of its answers whether it is.

    A token is trained when all its characters lie in a trained answer.
    """
    answers = [
        [span for span, is_trained in zip(r.answers, wanted, strict=True) if is_trained]
        for r, wanted in zip(rendered, trained, strict=True)
    ]
    special = special_ids(tokenizer)
    if not tokenizer.is_fast:
        return [
            _piece_by_piece(r, spans, tokenizer, special, "slow tokenizer")
            for r, spans in zip(rendered, answers, strict=True)
        ]
    rewriting = _rewriting(tokenizer)
    tokens: list[Tokens | None] = [None] * len(rendered)
    whole = [i for i, r in enumerate(rendered) if not r.literals]
    if whole:
        encoded = tokenizer(
            [rendered[i].text for i in whole],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for place, i in enumerate(whole):
            ids = np.asarray(encoded["input_ids"][place], dtype=np.int32)
            tokens[i] = _whole(ids, encoded.encodings[place], len(rendered[i].text), answers[i], special)
            if rewriting and sum(int(token) in special for token in ids) > len(rewriting.findall(rendered[i].text)):
                fault = "its text becomes a special token when the tokenizer normalises it"
                tokens[i] = Tokens(ids, np.zeros(len(ids), np.bool_), (), fault=fault)
    for i, r in enumerate(rendered):
        if tokens[i] is None:
            reason: Pieces = "special-token text" if r.literals else "token across an edge"
            tokens[i] = _piece_by_piece(r, answers[i], tokenizer, special, reason)
    return [found for found in tokens if found is not None]


def stretches(
    ids: npt.NDArray[Any], is_trained: npt.NDArray[np.bool_], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, bool]]:
    """(text, trained) of the stretches in which tokens are trained, or not, as the tokenizer reads them back."""
    edges = [0, *(np.flatnonzero(np.diff(is_trained)) + 1).tolist(), len(ids)]
    found = []
    before = ""
    for start, end in pairwise(edges):
        # Read from the beginning each time: a tokenizer may drop the space that its first token begins with.
        text = tokenizer.decode(ids[:end].tolist(), clean_up_tokenization_spaces=False)
        if not text.startswith(before):
            before, text = "", tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        found.append((text[len(before) :], bool(is_trained[start])))
        before = text
    return found


def _whole(
    ids: npt.NDArray[np.int32],
    encoding: Encoding,
    num_characters: int,
    answers: Sequence[Span],
    special: set[int],
) -> Tokens | None:
    """None when a token reaches across the edge of an answer."""
    is_trained = np.zeros(len(ids), np.bool_)
    ends = []
    for start, end in answers:
        first, stop = _first_token(encoding, start, num_characters), _first_token(encoding, end, num_characters)
        if _begins_before(encoding, first, start):
            return None
        if _begins_before(encoding, stop, end):
            if ids[stop] not in special:
                return None
            stop += 1  # an end token that swallows the space behind it, as Phi-3's does
        is_trained[first:stop] = True
        if stop > first:
            ends.append(stop - 1)
    is_trained[:1] = False
    return Tokens(ids, is_trained, tuple(ends))


def _begins_before(encoding: Encoding, token: int, edge: int) -> bool:
    held = encoding.token_to_chars(token) if token < len(encoding) else None
    return held is not None and held[0] < edge


def _first_token(encoding: Encoding, character: int, num_characters: int) -> int:
    """The first token that holds this character, or the next one that any token holds."""
    for place in range(character, num_characters):
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return len(encoding)


def _piece_by_piece(
    rendered: Rendered,
    answers: Sequence[Span],
    tokenizer: "PreTrainedTokenizerBase",
    special: set[int],
    reason: Pieces,
) -> Tokens:
    """Cut around literal text and at the edges that a token would reach across; no token stands in two pieces."""
    text, literals = rendered.text, rendered.literals
    edges = {edge for span in answers for edge in span}
    cuts = {0, len(text), *(edge for span in literals for edge in span)}
    if not tokenizer.is_fast:
        cuts |= edges
    ids, bounds = _encode_pieces(text, sorted(cuts), literals, tokenizer)
    is_special = np.isin(ids, list(special))
    crossed = {edge for edge in edges if (~is_special & (bounds[:, 0] < edge) & (bounds[:, 1] > edge)).any()}
    if crossed:
        ids, bounds = _encode_pieces(text, sorted(cuts | crossed), literals, tokenizer)
        is_special = np.isin(ids, list(special))
    is_trained = np.zeros(len(ids), np.bool_)
    ends = []
    for start, end in answers:
        # An end token may swallow the space behind it, as Phi-3's does.
        inside = (bounds[:, 0] >= start) & ((bounds[:, 1] <= end) | (is_special & (bounds[:, 0] < end)))
        is_trained |= inside
        ends += np.flatnonzero(inside)[-1:].tolist()
    is_trained[:1] = False
    for start, end in literals:
        inside = (bounds[:, 0] >= start) & (bounds[:, 1] <= end)
        if tokenizer.convert_tokens_to_ids(text[start:end]) in ids[inside]:
            fault = f"the tokenizer can write its text {text[start:end]!r} only as a special token"
            return Tokens(ids, is_trained, tuple(ends), reason, fault)
    return Tokens(ids, is_trained, tuple(ends), reason)


def _encode_pieces(
    text: str, cuts: Sequence[int], literals: Sequence[Span], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(ids [tokens], the characters that each stands for [tokens, 2]); all of its piece, when nobody knows better."""
    ids: list[int] = []
    bounds: list[tuple[int, int]] = []
    for start, end in pairwise(cuts):
        as_text = any(literal[0] <= start and end <= literal[1] for literal in literals)
        piece_ids, offsets = _encode_piece(text[start:end], tokenizer, is_first=start == 0, as_text=as_text)
        ids += piece_ids
        bounds += [(start + first, start + last) for first, last in offsets or [(0, end - start)] * len(piece_ids)]
    return np.asarray(ids, dtype=np.int32), np.asarray(bounds, dtype=np.int64).reshape(-1, 2)


def _encode_piece(
    piece: str, tokenizer: "PreTrainedTokenizerBase", *, is_first: bool, as_text: bool
) -> tuple[list[int], list[Span] | None]:
    """(ids, offsets or None) of a piece as it stands inside a text.

    SentencePiece puts a space before whatever text it is given, so that the piece is read behind a character which is
    taken away again; transformers' `sanitize_control_tokens` does so with a newline.
    """
    for before in () if is_first else _ANCHORS:
        anchor, _ = _encode(before, tokenizer, as_text=as_text)
        ids, offsets = _encode(before + piece, tokenizer, as_text=as_text)
        if ids[: len(anchor)] == anchor:  # it did not merge with the piece
            shifted = offsets and [(start - len(before), end - len(before)) for start, end in offsets[len(anchor) :]]
            return ids[len(anchor) :], shifted
    return _encode(piece, tokenizer, as_text=as_text)


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase", *, as_text: bool) -> tuple[list[int], list[Span] | None]:
    """(ids, offsets or None); `as_text`: what looks like a special token is not one."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=as_text,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"] if tokenizer.is_fast else None
