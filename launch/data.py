"""Conversations -> samples: text is rendered once, tokenised once, and every row has one outcome in the ledger."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from launch.config import Recipe
from launch.errors import DataError, TemplateError
from launch.formats import Conversation, read_conversations
from launch.templates import ChatTemplate, Rendered, render_chat

_ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class Samples:
    """Tokenised rows, end to end in flat arrays; sample i is `[offsets[i], offsets[i + 1])`."""

    token_ids: npt.NDArray[np.int64]  # [tokens]
    is_trained: npt.NDArray[np.bool_]  # [tokens]; never the first token of a sample, which nothing predicts
    offsets: npt.NDArray[np.int64]  # [samples + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def num_trained(self) -> npt.NDArray[np.int64]:
        """Trained tokens of each sample."""
        total = np.concatenate([[0], np.cumsum(self.is_trained)])
        return np.asarray(total[self.offsets[1:]] - total[self.offsets[:-1]], dtype=np.int64)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(token ids, trained) of one sample, both [tokens]."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids[part], self.is_trained[part]

    @property
    def sha256(self) -> str:
        """Of the tokens, the masks and where samples begin."""
        digest = hashlib.sha256()
        for array in (self.token_ids, self.is_trained, self.offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def end_token_ids(self, special_ids: Sequence[int]) -> list[int]:
        """The special tokens that end a trained answer; generation stops at them."""
        is_end = self.is_trained & ~np.append(self.is_trained[1:], False)
        return sorted({int(token) for token in np.unique(self.token_ids[is_end])} & set(special_ids))

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_file({"token_ids": self.token_ids, "is_trained": self.is_trained, "offsets": self.offsets}, path)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Read what `save` wrote."""
        return cls(**load_file(path))


@dataclass(frozen=True)
class Prepared:
    """The samples of a run and the ledger of its rows."""

    train: Samples
    evaluation: Samples
    report: dict[str, Any]  # data_report.json
    quarantine: list[dict[str, Any]]  # the rows that were dropped, each with its reason


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Prepared:
    """Read, render, tokenise and split. Raises DataError when a row cannot be read or nothing is left to train on."""
    data = recipe.data
    tokenised = _tokenise_source(data.train, recipe, tokenizer, template)
    if data.evaluation is not None:
        train = tokenised
        evaluation = _tokenise_source(data.evaluation, recipe, tokenizer, template)
    else:
        usable = [index for index, row in enumerate(tokenised) if row.outcome == "kept"]
        held_out = _held_out(usable, data.test_size, recipe.train.seed)
        train = [row for index, row in enumerate(tokenised) if index not in held_out]
        evaluation = [tokenised[index] for index in sorted(held_out)]
    kept = {"train": _kept(train), "evaluation": _kept(evaluation)}
    outcomes = Counter({"trained": len(kept["train"]), "evaluated": len(kept["evaluation"])})
    dropped = [row for row in [*train, *evaluation] if row.outcome != "kept"]
    outcomes.update(row.outcome for row in dropped)
    if not kept["train"]:
        raise DataError(f"{data.train} leaves no row to train on: {_counts(outcomes)}.")
    samples = {split: _samples(rows) for split, rows in kept.items()}
    report = {
        "rows": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        **{split: _length_report(part) for split, part in samples.items()},
        "evaluation_row_ids": [row.conversation.row_id for row in kept["evaluation"]],
    }
    quarantine = [
        {"row_id": row.conversation.row_id, "reason": row.outcome, "row": dict(row.conversation.row)} for row in dropped
    ]
    return Prepared(samples["train"], samples["evaluation"], report, quarantine)


def tokenise(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """(token ids, trained) of each text, both [tokens].

    A token is trained when all its characters lie in one trained span. The first token is not: nothing predicts it.
    """
    encoded = tokenizer([r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True)
    result = []
    for text, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)  # [tokens, 2] characters
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, end in text.spans:
            trained |= (bounds[:, 0] >= start) & (bounds[:, 1] <= end) & (bounds[:, 1] > bounds[:, 0])
        trained[:1] = False
        result.append((np.asarray(ids, dtype=np.int64), trained))
    return result


@dataclass(frozen=True)
class _Row:
    conversation: Conversation
    outcome: str  # kept, or the reason why it was dropped
    token_ids: npt.NDArray[np.int64]
    is_trained: npt.NDArray[np.bool_]


_NO_TOKENS = (np.zeros(0, np.int64), np.zeros(0, np.bool_))


def _tokenise_source(
    source: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> list[_Row]:
    conversations = read_conversations(source, recipe.data)
    rows = []
    for first in range(0, len(conversations), _ROWS_PER_BATCH):
        batch = conversations[first : first + _ROWS_PER_BATCH]
        whole = [c for c in batch if c.dropped is None]
        tokens = iter(tokenise([_render(template, c) for c in whole], tokenizer) if whole else ())
        for conversation in batch:
            ids, trained = _NO_TOKENS if conversation.dropped else next(tokens)
            outcome = conversation.dropped or _outcome(conversation, ids, trained, recipe)
            rows.append(_Row(conversation, outcome, ids, trained))
    return rows


def _render(template: ChatTemplate, conversation: Conversation) -> Rendered:
    try:
        return render_chat(template, conversation.messages)
    except TemplateError as error:
        raise TemplateError(f"{conversation.row_id}: {error}") from None


def _outcome(
    conversation: Conversation, ids: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_], recipe: Recipe
) -> str:
    limit = recipe.data.max_length
    if len(ids) > limit:
        if recipe.data.overlong == "error":
            raise DataError(
                f"{conversation.row_id} has {len(ids)} tokens, more than data.max_length = {limit}; "
                "raise it, or set data.overlong: drop."
            )
        return "too long"
    return "kept" if trained.any() else "no trained token"


def _held_out(usable: Sequence[int], test_size: float, seed: int) -> set[int]:
    count = round(len(usable) * test_size) if test_size < 1 else int(test_size)
    if count >= len(usable) > 0:
        raise DataError(f"data.test_size = {test_size:g} leaves none of the {len(usable)} usable rows to train on.")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(usable))
    return {usable[index] for index in order[:count]}


def _kept(rows: Iterable[_Row]) -> list[_Row]:
    return [row for row in rows if row.outcome == "kept"]


def _samples(rows: Sequence[_Row]) -> Samples:
    lengths = [len(row.token_ids) for row in rows]
    return Samples(
        np.concatenate([_NO_TOKENS[0], *(row.token_ids for row in rows)]),
        np.concatenate([_NO_TOKENS[1], *(row.is_trained for row in rows)]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    )


def _length_report(samples: Samples) -> dict[str, Any]:
    lengths = samples.lengths
    if not len(samples):
        return {"samples": 0}
    p50, p95 = np.percentile(lengths, [50, 95])
    return {
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(samples.is_trained.sum()),
        "tokens_p50": round(float(p50)),
        "tokens_p95": round(float(p95)),
        "tokens_max": int(lengths.max()),
    }


def _counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in outcomes.items() if count)
