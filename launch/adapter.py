"""The adapter on the base model: LoRA or a soft prompt."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from launch.errors import ConfigError, first_line
from launch.recipe import AdapterBlock, LoraBlock
from launch.trained_shapes import FAMILY_TARGETS

ADAPTER_NAME = "default"  # PEFT's own
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names

_CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "lora": LoraConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
}


def add_adapter(
    model: torch.nn.Module, adapter: AdapterBlock, *, base: str, seed: int, dtype: torch.dtype
) -> PeftModel:
    """Freeze the base and add the adapter, all its parameters in `dtype`. `base` is where the tokenizer is loaded from.

    PEFT would keep fp32 adapters on a 16-bit base, and DeepSpeed, which takes its type from the first trainable
    parameter, would then run fp16 without a loss scaler. DeepSpeed keeps the fp32 masters itself.
    Raises ConfigError when a target matches no module, or is one that cannot have the adapter's options.
    """
    check_targets(model, adapter)
    torch.manual_seed(seed)  # the same numbers on every rank, however many there are
    with _token_rows_on_any_device():
        config = peft_config(adapter, _model_type(model), base)
        try:
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
        except ValueError as error:
            if "ParamWrapper does not work" not in str(error):
                raise
            raise ConfigError(
                f"adapter: the experts of a {type(model).__name__} are one tensor, and {first_line(error)}; change "
                "that, or name adapter.target_modules without the experts."
            ) from None
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    assert trained_kinds(name for name, parameter in peft_model.named_parameters() if parameter.requires_grad)
    return peft_model


def with_token_ids(adapter: AdapterBlock, added: Collection[int]) -> AdapterBlock:
    """The adapter with the ids that `trainable_token_indices: added` stands for.

    Raises ConfigError when no token was added.
    """
    if not isinstance(adapter, LoraBlock) or adapter.trainable_token_indices != "added":
        return adapter
    if not added:
        raise ConfigError(
            "adapter.trainable_token_indices = added, but the tokenizer has every token of the recipe already; name "
            "others in model.extra_special_tokens, or leave it out."
        )
    return adapter.model_copy(update={"trainable_token_indices": tuple(sorted(added))})


def trained_kinds(names: Iterable[str]) -> list[str]:
    """What is trained, from the names of the trained parameters: lora_A, lora_B, lm_head, ...

    Of the base nothing may be: AssertionError for a name that is no adapter's.
    """
    kinds: dict[str, None] = {}  # a set that keeps its order
    for name in names:
        found = re.search(
            rf"\.(lora_\w+|trainable_tokens_delta)\.{ADAPTER_NAME}\b"
            rf"|(?:^|\.)(\w+)\.modules_to_save\.{ADAPTER_NAME}\."
            rf"|^(prompt_encoder)\.{ADAPTER_NAME}\.",
            name,
        )
        assert found, f"{name} belongs to the base model and must not be trained"
        kinds[found[1] or found[2] or found[3]] = None
    return list(kinds)


def exported_state(model: PeftModel, masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `PeftModel.from_pretrained` reads, from the whole fp32 values of everything trained, by parameter name.

    Of a soft prompt PEFT stores what the encoder makes, and would ask it in training mode, with its dropout.
    """
    config = model.peft_config[ADAPTER_NAME]
    if not config.is_prompt_learning:
        return dict(
            get_peft_model_state_dict(
                model, state_dict=dict(masters), adapter_name=ADAPTER_NAME, save_embedding_layers=False
            )
        )
    prefix = f"prompt_encoder.{ADAPTER_NAME}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in masters.items()}
    if config.peft_type == "PROMPT_TUNING":
        return {"prompt_embeddings": weights["embedding.weight"]}
    encoder = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](config)
    encoder.load_state_dict(weights)
    with torch.no_grad():
        made = encoder.eval()(torch.arange(config.num_virtual_tokens)[None])[0]  # [virtual tokens, embedding]
    return {"prompt_embeddings": made.contiguous()}


def check_targets(model: torch.nn.Module, adapter: AdapterBlock) -> None:
    """Every name must match a module: PEFT is content when a single target does, and ignores other patterns."""
    if not isinstance(adapter, LoraBlock):
        return
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())})
    paths = [name for name, _ in model.named_modules()]
    targets = adapter.target_modules or ()
    if isinstance(targets, str):
        _check_expression(targets, paths, names)
        targets = ()
    for key, listed in (("target_modules", targets), ("modules_to_save", adapter.modules_to_save)):
        for target in listed:
            if not any(path == target or path.endswith(f".{target}") for path in paths):
                near = difflib.get_close_matches(target, names, n=1)
                hint = f"did you mean {near[0]}? It has" if near else "it has"
                raise ConfigError(
                    f"adapter.{key}: no module of the model is named {target!r}; {hint} {', '.join(names)}."
                )
    if adapter.rank_pattern or adapter.alpha_pattern or adapter.trainable_token_indices:
        config = _maybe_include_all_linear_layers(peft_config(adapter, _model_type(model), ""), model)
        adapted = [path for path in paths if check_target_module_exists(config, path)]
        _check_patterns(adapter, adapted)
        _check_token_ids(adapter, model, adapted)


def _check_patterns(adapter: LoraBlock, adapted: Sequence[str]) -> None:
    """By PEFT's own rule: the key is a regular expression for the end of a path, and the first that matches decides."""
    for key, pairs in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        patterns = [pattern for pattern, _ in pairs]
        for pattern in patterns:
            try:
                matches = any(re.match(rf"(.*\.)?({pattern})$", path) for path in adapted)
            except re.error as error:
                raise ConfigError(f"adapter.{key}: {pattern!r} is not a regular expression: {error}.") from None
            if not matches:
                leaves = sorted({path.rpartition(".")[2] for path in adapted})
                raise ConfigError(
                    f"adapter.{key}: {pattern!r} matches the path of no module that LoRA adapts; these are "
                    f"{', '.join(leaves)}, such as {adapted[-1]}."
                )
        deciding = {get_pattern_key(patterns, path) for path in adapted}
        for pattern in patterns:
            if pattern not in deciding:
                raise ConfigError(
                    f"adapter.{key}: {pattern!r} decides nothing, since keys before it match all that it matches; put "
                    "it before them."
                )


def _check_token_ids(adapter: LoraBlock, model: torch.nn.Module, adapted: Sequence[str]) -> None:
    """Each is a row of the embeddings, and these are trained in no other way."""
    if not adapter.trainable_token_indices:
        return
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(embeddings, torch.nn.Embedding):
        raise ConfigError(
            f"adapter.trainable_token_indices needs token embeddings of transformers, and a {type(model).__name__} "
            "has none; leave it out."
        )
    assert isinstance(model, PreTrainedModel)
    assert adapter.trainable_token_indices != "added", "with_token_ids comes before"
    head, largest = model.get_output_embeddings(), max(adapter.trainable_token_indices)
    if largest >= embeddings.num_embeddings:
        raise ConfigError(
            f"adapter.trainable_token_indices has {largest}, but the model has embeddings for the ids 0 to "
            f"{embeddings.num_embeddings - 1}; take ids of its vocabulary."
        )
    tied = [embeddings, head] if model.config.tie_word_embeddings else [embeddings]
    for path in [name for name, module in model.named_modules() if any(module is one for one in tied)]:
        saved = [name for name in adapter.modules_to_save if path == name or path.endswith(f".{name}")]
        if saved or path in adapted:
            key = "modules_to_save" if saved else "target_modules"
            raise ConfigError(
                f"adapter.trainable_token_indices trains rows of {path}, which adapter.{key} trains as well; keep one."
            )


def _model_type(model: torch.nn.Module) -> str | None:
    return str(model.config.model_type) if isinstance(model, PreTrainedModel) else None


@contextmanager
def _token_rows_on_any_device() -> Iterator[None]:
    """Under ZeRO-3, PEFT 0.21 takes the rows of trained tokens from rank zero by way of a GPU, which a CPU run lacks.

    Every rank gathers the whole weight for that, so each can take the rows by itself.
    """

    def rows_of(layer: TrainableTokensLayer, weight: torch.Tensor, rows: list[int], width: int) -> torch.Tensor:
        with gather_params_ctx([weight], modifier_rank=None):
            return weight[rows].clone()

    original = TrainableTokensLayer._collect_token_weights
    TrainableTokensLayer._collect_token_weights = rows_of
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = original


def _check_expression(expression: str, paths: list[str], names: list[str]) -> None:
    if expression == "all-linear":
        return
    try:
        matches = any(re.fullmatch(expression, path) for path in paths)
    except re.error as error:
        raise ConfigError(
            f"adapter.target_modules = {expression!r} is neither all-linear nor a regular expression: {error}."
        ) from None
    if not matches:
        example = next(path for path in reversed(paths) if path.rpartition(".")[2] in names)
        raise ConfigError(
            f"adapter.target_modules = {expression!r} matches no module; it must match whole paths, such as {example}."
        )


def peft_config(adapter: AdapterBlock, model_type: str | None, base: str) -> PeftConfig:
    """PEFT's config of the recipe's adapter: the keys are PEFT's own. `base` is where TEXT finds its tokenizer.

    `model_type` is None for what is no model of transformers, whose methods PEFT's wrapper for CAUSAL_LM wants.
    """
    given = adapter.model_dump(exclude={"type", "init_from"})
    given["task_type"] = None if model_type is None else "CAUSAL_LM"
    if isinstance(adapter, LoraBlock):
        targets = adapter.target_modules or FAMILY_TARGETS.get(model_type or "") or "all-linear"
        given["target_modules"] = targets if isinstance(targets, str) else list(targets)
        for key in ("modules_to_save", "trainable_token_indices"):
            given[key] = list(given[key]) or None
    if given.get("prompt_tuning_init") == "TEXT":
        given["tokenizer_name_or_path"] = base
    config: PeftConfig = _CONFIGS[adapter.type](**given)
    return config
