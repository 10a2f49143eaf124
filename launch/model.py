"""The tokenizer and the base model, by hub id, by local path, or built on the spot."""

import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from launch import factory, tiny
from launch.adapter import check_targets, with_token_ids
from launch.attention import attention_in_use
from launch.data import Tools
from launch.errors import ConfigError, ModelError, TemplateError, first_line
from launch.findings import Check, Finding, after
from launch.fingerprint import TINY_ROWS, fingerprint_tiny
from launch.model_files import base_config, base_directory
from launch.modes import as_at_start
from launch.packing import forward_arguments
from launch.quantisation import check_usable, is_quantised, keep_layout, quantisation
from launch.recipe import TINY_MODEL_NAME, LoraBlock, ModelBlock, PrefixTuningBlock, Recipe
from launch.remote_code import loading_class
from launch.shapes import quantised_sentence
from launch.shards import find_code_in_pickles
from launch.templates import ChatTemplate, load_chat_template
from launch.token_findings import find_token_faults
from launch.weight_files import quantised_as

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
        add_tokens(tokenizer, recipe.model)
    else:
        name = recipe.model.tokenizer and str(Path(recipe.model.tokenizer).expanduser())
        tokenizer = load_tokenizer(name or base or resolve_base(recipe), recipe.model)
    return tokenizer, choose_template(recipe.data.template, tokenizer)


def load_tokenizer(base: str, model: ModelBlock) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the recipe's tokens. Raises ModelError when it cannot be loaded."""
    with _loading(f"The tokenizer of {base}", model):
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    add_tokens(tokenizer, model)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, model: ModelBlock) -> None:
    """Add the recipe's tokens in its order; those that are there keep their ids, and are special from now on."""
    given = {
        "extra_special_tokens": list(model.extra_special_tokens),
        "eos_token": model.eos_token,
        "pad_token": model.pad_token,
    }
    tokenizer.add_special_tokens(
        {name: tokens for name, tokens in given.items() if tokens}, replace_extra_special_tokens=False
    )


def added_token_ids(tokenizer: PreTrainedTokenizerBase, base: str, model: ModelBlock) -> set[int]:
    """The ids of the tokenizer that the base's own does not have, so that the base was not trained on them."""
    if model == model.without_tokens:
        return set()
    own = load_tokenizer(base, model.without_tokens).get_vocab().values()
    return set(tokenizer.get_vocab().values()) - set(own)


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


def checks_of_base(recipe: Recipe, tools: Callable[[], Tools], rows: Sequence[Check] = ()) -> list[Check]:
    """Those that need libraries but no weight, of a base that is there; `tools` gives tokenizer and template.

    The tiny one need not have been built. `rows` look at the rows, which need the tokenizer.
    """
    is_tiny = recipe.model.name_or_path == TINY_MODEL_NAME
    base = TINY_MODEL_NAME if is_tiny else resolve_base(recipe)
    is_ours = recipe.model.factory is not None or is_tiny  # without files of transformers

    def config() -> list[Finding]:
        if not is_ours:
            _config(base, recipe.model)
        return []

    def fits() -> list[Finding]:
        check_adapter_fits(base, recipe)
        return []

    def can_be_quantised() -> list[Finding]:
        if recipe.model.load_in_4bit:
            check_usable()
        return []

    def pickles() -> Iterator[Finding]:
        if not is_ours:
            yield from find_code_in_pickles(base_directory(recipe.model))

    def tokens() -> Iterator[Finding]:
        yield from find_token_faults(*tools(), base_config(recipe.model), recipe.model)

    return [after(config, [fits, after(tokens, rows)]), can_be_quantised, pickles]


def check_adapter_fits(base: str, recipe: Recipe) -> None:
    """Find a misspelt target before the weights are read, on a model without weights.

    Of a factory's model the names and shapes of the weights are compared as well. `base` may be the name of the tiny
    one, which need not have been built. `add_adapter` checks again.
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
    model = build_skeleton(base, recipe.model)
    if model is not None:
        check_skeleton(model, recipe)


def build_skeleton(base: str, settings: ModelBlock) -> PreTrainedModel | None:
    """The base on the meta device, without its weights; None, said aloud, for remote code that wants values."""
    config = (
        tiny.tiny_config(tiny.build_tiny_tokenizer(TINY_ROWS)) if base == TINY_MODEL_NAME else _config(base, settings)
    )
    reference = _auto_map(config).get(loading_class(config.model_type, _auto_map(config)))
    if settings.trust_remote_code and reference:
        with _loading(f"The base model {base}", settings):
            model_class = get_class_from_dynamic_module(reference, base, revision=settings.revision)
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    else:
        raise ModelError(f"{base} is a {type(config).__name__}, for which transformers has no causal language model.")
    try:
        with torch.device("meta"):  # the class itself: from_config would partition it under ZeRO-3
            skeleton = model_class(config)
    except Exception as error:
        if not reference:
            raise
        # Nobody knows what remote code does when it is made; it may want values, which a meta tensor has not.
        note = f"{model_class.__name__} cannot be made without weights, so its targets are checked with them"
        print(f"{note}: {type(error).__name__}: {first_line(error)}.", file=sys.stderr, flush=True)
        return None
    assert isinstance(skeleton, PreTrainedModel)
    return skeleton


def check_skeleton(skeleton: PreTrainedModel, recipe: Recipe) -> None:
    """Raises ConfigError for an adapter that does not fit the model, which needs no weights."""
    adapter = recipe.adapter
    any_token = {0}  # which ones are added is known once the tokenizer is there
    check_targets(skeleton, with_token_ids(adapter, any_token))
    if isinstance(adapter, PrefixTuningBlock) and "past_key_values" not in forward_arguments(skeleton):
        raise ConfigError(
            f"adapter.type = prefix_tuning needs a forward that takes past_key_values, and that of "
            f"{type(skeleton).__name__} does not; take another adapter.type."
        )
    if isinstance(adapter, LoraBlock) and recipe.model.load_in_4bit:
        head = skeleton.get_output_embeddings()
        for path, module in skeleton.named_modules():
            saved = any(path == name or path.endswith(f".{name}") for name in adapter.modules_to_save)
            if saved and isinstance(module, torch.nn.Linear) and module is not head:
                raise ConfigError(
                    f"adapter.modules_to_save: {path} is in 4 bits, which cannot be trained; make it one of "
                    "adapter.target_modules, or set model.load_in_4bit to false."
                )


def load_base(base: str, model: ModelBlock, precision: str) -> torch.nn.Module:
    """The base model in the run's precision; under ZeRO-3 each rank holds its share only (zero.Init). A collective.

    With `load_in_4bit` each rank quantises the whole model, and ZeRO-3 shares it out when the engine starts.
    """
    dtype = DTYPES[precision]
    if model.factory is not None:
        return factory.build_filled(model.factory, Path(base), dtype)
    quantised = {"quantization_config": quantisation(model, dtype)} if model.load_in_4bit else {}
    config = _config(base, model)
    loader = getattr(transformers, loading_class(config.model_type, _auto_map(config)))
    with _loading(f"The base model {base}", model):
        loaded, found = loader.from_pretrained(
            base,
            output_loading_info=True,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            **quantised,
        )
    for fault in ("missing_keys", "mismatched_keys"):
        if found[fault]:
            name = sorted(map(str, found[fault]))[0]
            raise ModelError(
                f"The weights of {base} are not whole: {name} is {fault.removesuffix('_keys')} "
                f"({len(found[fault])} such tensors); transformers would fill them with random numbers."
            )
    if is_quantised(loaded) and loaded.hf_quantizer.pre_quantized:
        raise ModelError(quantised_sentence(base, quantised_as(config.to_dict()) or "4 bits"))
    as_asked, in_use = attention_in_use(loaded, model.attn_implementation)
    if not as_asked:
        raise ModelError(
            f"model.attn_implementation = {model.attn_implementation}, but {base} computes with {in_use}; set "
            "model.attn_implementation to that, or take another base."
        )
    if model.load_in_4bit:
        keep_layout(loaded)
    if model.trust_remote_code and (model.load_in_4bit or not is_deepspeed_zero3_enabled()):
        _fill_tables(loaded)
    assert isinstance(loaded, torch.nn.Module)
    return loaded


def _fill_tables(model: PreTrainedModel) -> None:
    """Compute the tensors that no checkpoint has, such as those of rotary positions: buffers and plain attributes.

    Outside zero.Init, where what is quantised is built as well, transformers 5 builds on the meta device, where they
    come out unfilled, and knows how to fill those of its own models only. Weights that nothing initialises take no
    memory here.
    """
    in_file = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers() if name not in in_file]
    attributes = [
        (path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]
    if not buffers and not attributes:
        return
    with no_init_weights():
        computed = type(model)(model.config)
    for name in buffers:
        model.get_buffer(name).copy_(computed.get_buffer(name))
    for path, name in attributes:
        setattr(model.get_submodule(path), name, getattr(computed.get_submodule(path), name))


def enable_gradient_checkpointing(model: PeftModel) -> None:
    """Compute activations again in the backward pass. Raises ModelError when the model does not do that.

    transformers also makes the embeddings' output need a gradient: remote code has the reentrant kind of checkpointing,
    under which layers whose inputs need none, as behind a frozen embedding, would get none themselves.
    """
    base = model.get_base_model()
    try:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"{first_line(error)}; set train.gradient_checkpointing to false.") from None


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


@contextmanager
def _loading(what: str, model: ModelBlock) -> Iterator[None]:
    """Makes a ModelError of what loading raises, of remote code whatever that raises."""
    try:
        with as_at_start():  # it may be fetched into a cache that users share
            yield
    except pickle.UnpicklingError:
        raise ModelError(f"{what} holds more in its pickles than tensors, and code is not unpickled.") from None
    except (OSError, ValueError, ImportError) as error:
        if "does not support an attention implementation" in str(error):
            attention = model.attn_implementation
            raise ModelError(f"{what} has no {attention} attention; set model.attn_implementation to eager.") from None
        raise ModelError(f"{what} cannot be loaded: {first_line(error)}.") from None
    except Exception as error:
        if not model.trust_remote_code or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{what} cannot be loaded: its own code failed with {type(error).__name__}: {first_line(error)}; it "
            f"may have been written for another version than transformers {transformers.__version__}."
        ) from error


def _config(base: str, model: ModelBlock) -> PretrainedConfig:
    """Never None for trust_remote_code: transformers would ask on the terminal."""
    with _loading(f"config.json of {base}", model):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    return config


def _auto_map(config: PretrainedConfig) -> dict[str, str]:
    return getattr(config, "auto_map", None) or {}
