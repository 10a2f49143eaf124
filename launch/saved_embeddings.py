"""What PEFT saves of a base beside an adapter: its embeddings, whole, when they were resized or are adapted."""

from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel

from launch.shards import Stored, row_blocks
from launch.vocabulary import row_names


def resize_as_saved(skeleton: PreTrainedModel, trained: Mapping[str, Stored]) -> None:
    """Give a base the rows that its adapter wants: another tool may have added some, and PEFT saves them all then."""
    saved = [whole_embedding(name, trained) for name in sorted(row_names(skeleton))]
    rows = {tensor.shape[0] for tensor in saved if tensor is not None}
    if rows - {skeleton.config.get_text_config().vocab_size}:
        skeleton.resize_token_embeddings(max(rows), mean_resizing=False)


def whole_embedding(name: str, saved: Mapping[str, Stored]) -> Stored | None:
    """What the adapter's file has in the place of this parameter of the base."""
    return next((saved[key] for key in keys_of_base(name) if key in saved), None)


def keys_of_base(name: str) -> list[str]:
    """Under which PEFT may save a parameter of the base: inside what the layer has become, or as it is."""
    stem, _, leaf = name.rpartition(".")
    places = ("base_layer.", "token_adapter.base_layer.", "original_module.", "")
    return [f"base_model.model.{stem}.{place}{leaf}" for place in places]


def is_saved_twice(key: str, expected: Collection[str], saved: Mapping[str, Stored]) -> bool:
    """Whether one of what is expected is the same: a saved module has two names, tied embeddings have rows each."""
    rows = ".token_adapter.trainable_tokens_delta"
    plain = key.replace(".modules_to_save.", ".")
    twins = [twin for twin in expected if twin == plain or (key.endswith(rows) and twin.endswith(rows))]
    return any(_are_same(saved[key], saved[twin]) for twin in twins)


def _are_same(one: Stored, other: Stored) -> bool:
    blocks = row_blocks(one.shape)
    return one.shape == other.shape and all(torch.equal(one.read(*rows), other.read(*rows)) for rows in blocks)
