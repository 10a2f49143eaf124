"""The tokenizer and the base model, by hub id, by local path, or built on the spot."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from launch import factory, tiny
from launch.adapter import check_targets
from launch.errors import ModelError, TemplateError
from launch.fingerprint import TINY_ROWS, fingerprint_tiny
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.templates import ChatTemplate, load_chat_template

_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK_BYTES = 64, 65536
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_base(recipe: Recipe, *, show_progress: bool = False) -> str:
    """Where the base is: the recipe's name or path, or where the tiny model was built."""
    if recipe.model.name_or_path != TINY_MODEL_NAME:
        path = Path(recipe.model.name_or_path).expanduser()
        return str(path) if path.exists() else recipe.model.name_or_path
    directory = Path(recipe.run.output_dir) / "base-models" / f"{TINY_MODEL_NAME}-{fingerprint_tiny()}"
    return str(tiny.build_tiny_base(directory, TINY_ROWS, show_progress=show_progress))


def tokenizer_and_template(recipe: Recipe, base: str | None = None) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    """What turns the recipe's conversations into tokens; without `base`, the tiny base is not built for it."""
    if base is None and recipe.model.name_or_path == TINY_MODEL_NAME:
        tokenizer: PreTrainedTokenizerBase = tiny.build_tiny_tokenizer(TINY_ROWS)
    else:
        name = recipe.model.tokenizer and str(Path(recipe.model.tokenizer).expanduser())
        tokenizer = load_tokenizer(name or base or resolve_base(recipe), recipe.model)
    return tokenizer, choose_template(recipe.data.template, tokenizer)


def load_tokenizer(base: str, model: ModelBlock) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises ModelError when it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The tokenizer of {base} cannot be loaded: {_first_line(error)}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The chat template by name, with the tokenizer's special tokens; `tokenizer` takes the model's own.

    Raises TemplateError when there is none of that name, or the model has none.
    """
    tokens = {key: str(getattr(tokenizer, key) or "") for key in ("bos_token", "eos_token")}
    if name != "tokenizer":
        return replace(load_chat_template(name), **tokens)
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise TemplateError(
            "data.template is tokenizer, but this model has no chat template of its own; name one of templates/chat."
        )
    return ChatTemplate(name, source, **tokens)


def fingerprint_base(base: str, model: ModelBlock) -> str:
    """Tells two bases under one name apart: the hub's commit, or a digest of its code and samples of its weights."""
    directory = Path(base)
    if model.factory is not None:
        code, weights = Path(model.factory.rpartition(":")[0]).expanduser(), [directory]
    elif directory.is_dir():
        code, weights = directory / "config.json", sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    else:
        config = AutoConfig.from_pretrained(base, revision=model.revision, trust_remote_code=model.trust_remote_code)
        return f"commit {config._commit_hash}"
    digest = hashlib.sha256(code.read_bytes())
    for path in weights:
        size_bytes = path.stat().st_size
        digest.update(f"{path.name} {size_bytes}".encode())
        with path.open("rb") as file:
            for block in range(_FINGERPRINT_BLOCKS):  # the header is in the first one
                file.seek(block * size_bytes // _FINGERPRINT_BLOCKS)
                digest.update(file.read(_FINGERPRINT_BLOCK_BYTES))
    return f"sha256 {digest.hexdigest()}"


def check_adapter_fits(base: str, recipe: Recipe) -> None:
    """Find a misspelt target before the weights are read, on a model without weights.

    Skipped for remote code, whose modules are only known once it runs; `add_adapter` checks again in any case.
    Of a factory's model the names and shapes of the weights are compared as well.
    """
    if recipe.model.factory is not None:
        skeleton = factory.build_skeleton(recipe.model.factory)
        factory.check_weights(skeleton, Path(base), recipe.model.factory)
        if recipe.train.gradient_checkpointing and not hasattr(skeleton, "gradient_checkpointing_enable"):
            raise ModelError(
                f"train.gradient_checkpointing is true, but the model of {recipe.model.factory} has no method "
                "gradient_checkpointing_enable(options); add one, or set it to false."
            )
        check_targets(skeleton, recipe.adapter)
        return
    if recipe.model.trust_remote_code:
        return
    config = AutoConfig.from_pretrained(base, revision=recipe.model.revision)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{base} is a {type(config).__name__}, for which transformers has no causal language model.")
    with torch.device("meta"):  # the class itself: from_config would partition it under ZeRO-3
        skeleton = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    check_targets(skeleton, recipe.adapter)


def load_base(base: str, model: ModelBlock, precision: str) -> torch.nn.Module:
    """The base model in the run's precision; under ZeRO-3 each rank holds its share only (zero.Init). A collective."""
    if model.factory is not None:
        return factory.build_filled(model.factory, Path(base), DTYPES[precision])
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            base,
            output_loading_info=True,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPES[precision],
            attn_implementation=model.attn_implementation,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The base model {base} cannot be loaded: {_first_line(error)}") from None
    for fault in ("missing_keys", "mismatched_keys"):
        if found[fault]:
            name = sorted(map(str, found[fault]))[0]
            raise ModelError(
                f"The weights of {base} are not whole: {name} is {fault.removesuffix('_keys')} "
                f"({len(found[fault])} such tensors); transformers would fill them with random numbers."
            )
    assert isinstance(loaded, torch.nn.Module)
    return loaded


def serving_generation_config(model: torch.nn.Module, end_token_ids: list[int]) -> GenerationConfig:
    """The base's generation config with the trained end tokens added to those that stop."""
    base_config = getattr(model, "generation_config", None)
    config = GenerationConfig.from_dict(base_config.to_dict()) if base_config else GenerationConfig()
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # Sampling settings without sampling are an error on saving; transformers' own advice is to switch it on.
    config.do_sample = config.do_sample or any(
        getattr(config, name) not in (None, neutral) for name, neutral in (("temperature", 1.0), ("top_p", 1.0))
    )
    config.eos_token_id = sorted({*end_token_ids, *(stop for stop in stops if stop is not None)})
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
