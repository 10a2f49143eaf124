"""The adapter on the base model: LoRA or a soft prompt."""

import difflib
import re
from collections.abc import Callable, Mapping

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
from transformers import PreTrainedModel

from launch.errors import ConfigError
from launch.recipe import AdapterBlock, LoraBlock

ADAPTER_NAME = "default"  # PEFT's own

_CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "lora": LoraConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
}

# Targets of LoRA when the recipe names none, by config.model_type; other families get all linear layers but the head.
_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILY_TARGETS: dict[str, tuple[str, ...]] = {
    "qwen2": _SEVEN,
    "qwen3": _SEVEN,
    "llama": _SEVEN,
    "chatglm": ("query_key_value",),
    "baichuan": ("W_pack",),
}


def add_adapter(
    model: torch.nn.Module, adapter: AdapterBlock, *, base: str, seed: int, dtype: torch.dtype
) -> PeftModel:
    """Freeze the base and add the adapter, all its parameters in `dtype`. `base` is where the tokenizer is loaded from.

    PEFT would keep fp32 adapters on a 16-bit base, and DeepSpeed, which takes its type from the first trainable
    parameter, would then run fp16 without a loss scaler. DeepSpeed keeps the fp32 masters itself.
    Raises ConfigError when a target matches no module.
    """
    check_targets(model, adapter)
    torch.manual_seed(seed)  # the same numbers on every rank, however many there are
    peft_model = get_peft_model(
        model, _peft_config(model, adapter, base), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False
    )
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return peft_model


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
    """Every named target must match a module: PEFT is content when a single one does."""
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
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(
                    f"adapter.{key}: no module of the model is named {target!r}; {hint}It has {', '.join(names)}."
                )


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


def _peft_config(model: torch.nn.Module, adapter: AdapterBlock, base: str) -> PeftConfig:
    """The recipe's keys are PEFT's own."""
    given = adapter.model_dump(exclude={"type"})
    if isinstance(model, PreTrainedModel):
        given["task_type"] = "CAUSAL_LM"  # PEFT's wrapper for it wants the methods of transformers' models
    if isinstance(adapter, LoraBlock):
        family = model.config.model_type if isinstance(model, PreTrainedModel) else ""
        targets = adapter.target_modules or FAMILY_TARGETS.get(family) or "all-linear"
        given["target_modules"] = targets if isinstance(targets, str) else list(targets)
        given["modules_to_save"] = list(adapter.modules_to_save) or None
    if given.get("prompt_tuning_init") == "TEXT":
        given["tokenizer_name_or_path"] = base
    config: PeftConfig = _CONFIGS[adapter.type](**given)
    return config
