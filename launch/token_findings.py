"""Whether the tokenizer fits the base and the chat template; no row is looked at."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launch.errors import ModelError
from launch.findings import Finding
from launch.recipe import ModelBlock
from launch.templates import KNOWN_CONVERSATION, ChatTemplate, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the shipped templates write and nobody means as text.
_MARKS = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>")


def find_token_faults(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, config: Mapping[str, Any], model: ModelBlock
) -> Iterator[Finding]:
    """`tokenizer` has the recipe's tokens; `config` is the base's config.json, empty when there is none."""
    yield from _find_without_rows(tokenizer, config, model)
    if template.name != "tokenizer":  # the model's own knows what it may write as text, as Zephyr's does
        yield from _find_split_marks(tokenizer, template)


def _find_without_rows(
    tokenizer: "PreTrainedTokenizerBase", config: Mapping[str, Any], model: ModelBlock
) -> Iterator[Finding]:
    """Tokens behind the last row of the embeddings, at which training would end when a row has one.

    With tokens that the recipe adds, the embeddings get rows for all. Padding is never looked up.
    """
    parts = [part for part in (config.get("text_config"), config) if isinstance(part, Mapping)]
    keys = ("vocab_size", "padded_vocab_size")
    num_rows = max((part[key] for part in parts for key in keys if isinstance(part.get(key), int)), default=None)
    if num_rows is None or model != model.without_tokens:
        return
    padding = {tokenizer.pad_token} - {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    behind = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= num_rows and token not in padding)
    if behind:
        yield Finding(
            f"The tokenizer of {model.tokenizer_name_or_path} has tokens up to id {behind[-1][0]:,}, but the model has "
            f"{num_rows:,} rows of embeddings (vocab_size in config.json): {len(behind):,} tokens, such as "
            f"{behind[0][1]!r}, have none; bring the tokenizer and the config.json of one model together.",
            error=ModelError,
        )


def _find_split_marks(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> Iterator[Finding]:
    """Marks between the messages; the end of an answer is checked with the rows, and refused when it is no token."""
    rendered = render_chat(template, KNOWN_CONVERSATION)
    answers = [rendered.text[start:end] for start, end in rendered.answers]
    vocabulary = tokenizer.get_vocab()
    split = [
        mark
        for mark in dict.fromkeys(_MARKS.findall(rendered.text))
        if mark not in vocabulary and not any(mark in answer for answer in answers)
    ]
    if split:
        yield Finding(
            f"The template {template.name} writes {', '.join(split)}, which this tokenizer does not have and takes for "
            f"text ({len(tokenizer.tokenize(split[0]))} tokens for {split[0]}); choose the data.template of this "
            "model, or add them with model.extra_special_tokens.",
            stops=False,
        )
