"""The tokenizer and the base model, by hub id, by local path, or built on the spot."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from launch.config import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.errors import ModelError, TemplateError
from launch.templates import ChatTemplate, load_chat_template

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_base(recipe: Recipe, *, show_progress: bool = False) -> str:
    """What `from_pretrained` is given: the recipe's name or path, or where the tiny model was built."""
    if recipe.model.name_or_path != TINY_MODEL_NAME:
        return recipe.model.name_or_path
    from launch.tiny import build_tiny_base

    directory = Path(recipe.run.output_dir) / "base-models" / TINY_MODEL_NAME
    return str(build_tiny_base(directory, Path(recipe.data.train), show_progress=show_progress))


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that a run of this recipe would use, without building the tiny base for it."""
    if recipe.model.name_or_path == TINY_MODEL_NAME:
        return build_tiny_tokenizer(TINY_ROWS)
    return load_tokenizer(recipe.model.name_or_path, recipe.model)


def load_tokenizer(base: str, model: ModelBlock) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises ModelError when it cannot be loaded or gives no character offsets."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The tokenizer of {base} cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {base} is a slow one, which gives no character offsets to find the answers by."
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The chat template of the recipe with the tokenizer's special tokens; `tokenizer` takes the model's own."""
    tokens = {key: str(getattr(tokenizer, key) or "") for key in ("bos_token", "eos_token")}
    if name != "tokenizer":
        template = load_chat_template(name)
        return ChatTemplate(name, template.source, **tokens)
    source = tokenizer.chat_template
    if not isinstance(source, str) or "generation" not in source:
        raise TemplateError(
            "data.template is tokenizer, but the model's own chat template does not mark its answers with "
            "{% generation %}; name one of templates/chat instead."
        )
    return ChatTemplate(name, source, **tokens)


def load_base(base: str, model: ModelBlock, precision: str) -> PreTrainedModel:
    """The frozen base model in the run's precision; under ZeRO-3 each rank holds its share only (zero.Init)."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            base,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPES[precision],
            attn_implementation=model.attn_implementation,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The base model {base} cannot be loaded: {_first_line(error)}") from None
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def serving_generation_config(model: PreTrainedModel, end_token_ids: list[int]) -> GenerationConfig:
    """The base's generation config with the trained end tokens added to those that stop."""
    config = (
        GenerationConfig.from_dict(model.generation_config.to_dict()) if model.generation_config else GenerationConfig()
    )
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*end_token_ids, *(stop for stop in stops if stop is not None)})
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
