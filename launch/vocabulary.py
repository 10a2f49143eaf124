"""Tokens that the recipe adds: their rows in the base's embeddings and head."""

from collections.abc import Sequence, Set

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch import engine as engines
from launch.errors import ConfigError, ModelError
from launch.model import DTYPES, load_base
from launch.recipe import ModelBlock

ROWS_MULTIPLE = 64  # which matrix units like


def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Set[int], settings: ModelBlock
) -> None:
    """Give the token ids that were added rows in embeddings and head; a collective, and the same rows on every rank.

    The rows of the tokens that the base was trained with stay as they are. Every other row becomes their mean, whether
    it was there before (a base may have more rows than tokens, all untrained) or is new, for which the number of rows
    grows to a multiple of 64. Nothing happens when no token was added. Raises ModelError for what cannot be resized.
    """
    for name in ("eos_token", "pad_token"):
        if getattr(settings, name) is not None:
            for config in filter(None, (model.config, model.generation_config)):
                setattr(config, f"{name}_id", getattr(tokenizer, f"{name}_id"))
    if not added:
        return
    own = own_rows(model, tokenizer, added)
    add_rows(model, added)
    tensors = _by_row(model)
    with engines.written_whole(tensors), torch.no_grad():
        for tensor in tensors:
            tensor.copy_(rows_with_mean(tensor, own))


def own_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Set[int]) -> list[int]:
    """The rows of the tokens that the base was trained with, before any are added to it."""
    num_rows = engines.whole_shape(_by_row(model)[0])[0]
    return sorted(index for index in set(tokenizer.get_vocab().values()) - added if index < num_rows)


def add_rows(model: PreTrainedModel, added: Set[int]) -> None:
    """Give embeddings and head a row for each of these ids, if they have none; what the new rows hold is undecided."""
    num_rows = engines.whole_shape(_by_row(model)[0])[0]
    if added and max(added) >= num_rows:
        # transformers draws the new rows at random, on every rank for itself.
        model.resize_token_embeddings(max(added) + 1, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
        num_rows = model.config.get_text_config().vocab_size
    shapes = [engines.whole_shape(tensor) for tensor in _by_row(model)]
    if any(shape[0] != num_rows for shape in shapes):
        raise ModelError(
            f"{type(model).__name__} cannot be given {num_rows} rows for the added tokens (its embeddings and head "
            f"have {', '.join(str(shape[0]) for shape in shapes)}); add no tokens, or take another base."
        )


def rows_with_mean(tensor: torch.Tensor, own: Sequence[int], num_rows: int | None = None) -> torch.Tensor:
    """So many rows (None: as many as before), of which all but `own` are the mean of those."""
    is_own = torch.zeros(num_rows or tensor.shape[0], dtype=torch.bool, device=tensor.device)
    is_own[list(own)] = True
    rows = tensor.new_empty(len(is_own), *tensor.shape[1:])
    rows[: len(tensor)] = tensor
    rows[~is_own] = rows[is_own].mean(0, dtype=torch.float32).to(tensor.dtype)
    return rows


def check_added_are_trained(model: PeftModel, tokenizer: PreTrainedTokenizerBase, added: Set[int]) -> None:
    """Raises ConfigError when added tokens could not be told apart: all of them begin with the same row.

    The padding token is left out: the model neither reads nor says it.
    """
    tokens = [tokenizer.convert_ids_to_tokens(index) for index in sorted(added - {tokenizer.pad_token_id})]
    if not tokens:
        return
    base = model.get_base_model()
    names = {id(module): name.rpartition(".")[2] for name, module in base.named_modules()}
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    for module in filter(None, (embeddings, head)):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            rows = ", or set adapter.trainable_token_indices: added" if module is embeddings else ""
            raise ConfigError(
                f"{', '.join(map(repr, tokens))}: added to the tokenizer, but {names[id(module)]} is not trained, so "
                f"that all added rows would stay the same; put {names[id(module)]} into adapter.modules_to_save{rows}."
            )


def load_unquantised(
    base: str, settings: ModelBlock, tokenizer: PreTrainedTokenizerBase, added: Set[int], dtype: torch.dtype
) -> PreTrainedModel:
    """The base once more in `dtype`, with the same rows added, whole on the CPU of the rank that calls.

    What quantising took away is in this one, so the adapter is merged into it. Under ZeRO-3 it is the last one loaded.
    """
    engines.end_zero_init()
    precision = next(name for name, known in DTYPES.items() if known == dtype)
    model = load_base(base, settings.model_copy(update={"load_in_4bit": False}), precision)
    fit_vocabulary(model, tokenizer, added, settings)
    return model


def row_names(model: PreTrainedModel) -> set[str]:
    """The names of the parameters with a row for each token."""
    by_row = {id(tensor) for tensor in _by_row(model)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in by_row}


def _by_row(model: PreTrainedModel) -> list[torch.Tensor]:
    """The tensors with a row for each token: embeddings, head and its bias; tied ones once."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, *([] if head is None else [head.weight, head.bias])]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())
