"""A base in 4 bits by bitsandbytes: what transformers is told, and what bitsandbytes must not do here.

Nothing of peft.prepare_model_for_kbit_training is needed. It freezes the base, as get_peft_model does; it casts what is
not quantised to fp32, which DeepSpeed casts back to the run's 16-bit type (trained embeddings and heads have fp32
masters); and it lets inputs require gradients, for the kind of gradient checkpointing that is not used here.
"""

import importlib

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from launch.errors import PreflightError, first_line
from launch.recipe import ModelBlock


def check_usable() -> None:
    """Quantise a few zeros. Raises PreflightError when bitsandbytes is not there, or not for this machine."""
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        functional.quantize_4bit(torch.zeros(64, device="cuda" if torch.cuda.is_available() else "cpu"))
    except (ImportError, OSError, RuntimeError) as error:
        raise PreflightError(
            f"model.load_in_4bit needs bitsandbytes, which does not work here ({first_line(error)}); install the "
            "version that requirements.txt names, or set model.load_in_4bit to false."
        ) from None


def quantisation(model: ModelBlock, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The recipe's keys are transformers' own; matrices are multiplied in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_layout(model: PreTrainedModel) -> None:
    """On CPUs with bf16 units, bitsandbytes packs a layer otherwise once it is evaluated, and does not pack it back.

    Gradients then end at that layer, and it computes in bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether `load_base` quantised it."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def quantised_line(model: ModelBlock, zero_stage: int) -> str:
    """How the base is quantised, and what ZeRO makes of that."""
    twice = ", its constants as well" if model.bnb_4bit_use_double_quant else ""
    kept = "keeps its share (ZeRO-3)" if zero_stage == 3 else f"keeps all of it (ZeRO-{zero_stage})"
    return f"4 bits, {model.bnb_4bit_quant_type}{twice}; each rank quantised the whole and {kept}"
