"""The LoRA adapter on the base model."""

import difflib

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from launch.config import AdapterBlock
from launch.errors import ConfigError

ADAPTER_NAME = "default"  # PEFT's own


def add_adapter(model: PreTrainedModel, adapter: AdapterBlock, *, seed: int, dtype: torch.dtype) -> PeftModel:
    """Freeze the base and add the adapter, all its parameters in `dtype`.

    PEFT would keep fp32 adapters on a 16-bit base, and DeepSpeed, which takes its type from the first trainable
    parameter, would then run fp16 without a loss scaler. DeepSpeed keeps the fp32 masters itself.
    Raises ConfigError when a target matches no module.
    """
    check_targets(model, adapter)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=list(adapter.target_modules),
        modules_to_save=list(adapter.modules_to_save) or None,
    )
    torch.manual_seed(seed)  # the same matrices A on every rank, whatever its number
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return peft_model


def check_targets(model: torch.nn.Module, adapter: AdapterBlock) -> None:
    """Every named target must match a module: PEFT is content when a single one does."""
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())})
    paths = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "modules_to_save"):
        for target in getattr(adapter, key):
            if not any(path == target or path.endswith(f".{target}") for path in paths):
                near = difflib.get_close_matches(target, names, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(
                    f"adapter.{key}: no module of the model is named {target!r}; {hint}It has {', '.join(names)}."
                )
