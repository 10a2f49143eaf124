"""Tokens that the recipe adds: their rows in the base's embeddings and head."""

from collections.abc import Callable, Sequence, Set

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch import engine as engines
from launch.errors import ConfigError, ModelError
from launch.recipe import ModelBlock
from launch.shards import row_blocks

ROWS_MULTIPLE = 64  # which matrix units like


def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Set[int], settings: ModelBlock
) -> None:
    """Give the token ids that were added rows in embeddings and head; a collective, and the same rows on every rank.

    The rows of the tokens that the base was trained with stay as they are. Every other row becomes their mean, whether
    it was there before (a base may have more rows than tokens, all untrained) or is new, for which the number of rows
    grows to a multiple of 64. Nothing happens when no token was added. Raises ModelError for what cannot be resized.
    """
    set_token_ids(model, tokenizer, settings)
    if not added:
        return
    own = own_rows(model, tokenizer, added)
    add_rows(model, added)
    tensors = _by_row(model)
    with engines.written_whole(tensors), torch.no_grad():
        for tensor in tensors:
            _fill_others(tensor, own)


def set_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelBlock) -> None:
    """Tell the model's configs which end and padding tokens the recipe has given it."""
    for name in ("eos_token", "pad_token"):
        if getattr(settings, name) is not None:
            for config in filter(None, (model.config, model.generation_config)):
                setattr(config, f"{name}_id", getattr(tokenizer, f"{name}_id"))


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


def _fill_others(tensor: torch.Tensor, own: Sequence[int]) -> None:
    rows = with_mean(lambda first, last: tensor[first:last], own, tensor.shape, tensor.dtype)
    for first, last in row_blocks(tensor.shape):
        tensor[first:last] = rows(first, last)


def with_mean(
    read: Callable[[int, int], torch.Tensor], own: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> Callable[[int, int], torch.Tensor]:
    """[first, last) of the rows of a tensor of this shape: `own` as `read` gives them, all others the mean of those.

    Block by block and in fp64, so that the file of a base and the live one have the same mean.
    """
    is_own = torch.zeros(shape[0], dtype=torch.bool)
    is_own[list(own)] = True
    num_known = max(own) + 1  # behind them, `read` may have no rows
    total = torch.zeros(tuple(shape[1:]), dtype=torch.float64)
    for block in row_blocks([num_known, *shape[1:]]):
        total += read(*block)[is_own[slice(*block)]].to(dtype).sum(0, dtype=torch.float64).cpu()
    mean = (total / len(own)).to(dtype)

    def rows(first: int, last: int) -> torch.Tensor:
        found, end = mean.expand(last - first, *shape[1:]).clone(), min(last, num_known)
        if first < end:
            is_known = is_own[first:end]
            found[: end - first][is_known] = read(first, end)[is_known].to(mean)
        return found

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


def row_names(model: PreTrainedModel) -> set[str]:
    """The names of the parameters with a row for each token."""
    by_row = {id(tensor) for tensor in _by_row(model)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in by_row}


def _by_row(model: PreTrainedModel) -> list[torch.Tensor]:
    """The tensors with a row for each token: embeddings, head and its bias; tied ones once."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, *([] if head is None else [head.weight, head.bias])]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())
