"""One run of the benchmark of training.py by another trainer, on each of its ranks: `training_sides.py SIDE WORK RUN`.

All start from the same base and the same LoRA adapter, read the same rows in the same order, and make the same steps.
TRL's sides run in an environment that has none of this project's packages.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sides import ROOT, versions
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    logging,
)

IGNORED = -100
ZERO3_OFFLOAD = "configs/deepspeed/zero3_offload.json"

Setting = dict[str, Any]  # what training.py wrote into setting.json
Built = tuple[Trainer, Callable[[int], int | None]]  # (trainer, trained tokens of a step; None: those of its rows)


def options(setting: Setting, work: Path, num_ranks: int) -> dict[str, Any]:
    """What every trainer is told: as many rows at a time as fit the budget when each is padded to the longest."""
    per_rank = setting["global_batch_size"] // num_ranks
    most = setting["budget_tokens"] // setting["max_length"]
    rows = max(number for number in range(1, most + 1) if per_rank % number == 0)
    return {
        "output_dir": str(work / "output"),
        "max_steps": setting["steps"],
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": per_rank // rows,
        "learning_rate": setting["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": setting["gradient_checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if setting["gradient_checkpointing"] else None,
        "ddp_find_unused_parameters": False,
        "bf16": setting["precision"] == "bf16",
        "fp16": setting["precision"] == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": "gloo" if num_ranks > 1 and not torch.cuda.is_available() else None,
    }


def adapted_model(setting: Setting, work: Path) -> PeftModel:
    """The base in the precision of the run, and the adapter that all start from; PEFT keeps that in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[setting["precision"]]
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, str(work / "adapter"), is_trainable=True)


def rows_of(work: Path) -> list[dict[str, Any]]:
    """The rows of every step, one step behind the other."""
    return [json.loads(line) for line in (work / "ordered.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- the sides ----


def plain(setting: Setting, work: Path, num_ranks: int, *, answers_only: bool, deepspeed: str | None = None) -> Built:
    """What scripts do: each row padded to the longest that is allowed, and the logits of every position."""
    settings = None
    if deepspeed is not None:
        settings = json.loads((ROOT / deepspeed).read_text(encoding="utf-8"))
        settings["gradient_accumulation_steps"] = "auto"  # which cairn's loop counts by itself
        if not torch.cuda.is_available():
            import deepspeed as library

            library.ops.__compatible_ops__ = {}  # otherwise it compiles for CPUs for most of a minute
    given = options(setting, work, num_ranks)
    if deepspeed is not None:  # which takes gloo by itself where there is no GPU
        given |= {"use_cpu": False, "ddp_backend": None}
    arguments = TrainingArguments(**given, deepspeed=settings)
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    samples = []
    for row in rows_of(work):
        found = tokenizer.apply_chat_template(
            row["messages"],
            return_dict=True,
            return_assistant_tokens_mask=True,
            padding="max_length",
            max_length=setting["max_length"],
        )
        ids, is_there, is_answer = (found[key] for key in ("input_ids", "attention_mask", "assistant_masks"))
        is_target = is_answer if answers_only else is_there
        labels = [token_id if trained else IGNORED for token_id, trained in zip(ids, is_target, strict=True)]
        samples.append({"input_ids": ids, "attention_mask": is_there, "labels": labels})
    model = adapted_model(setting, work)
    return Trainer(model, arguments, default_data_collator, samples), lambda step: None


def trl(setting: Setting, work: Path, num_ranks: int, *, padding_free: bool = False, packing: bool = False) -> Built:
    """SFTTrainer on the answers; packed, a step is as many tokens as one of the others has on average."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    given = options(setting, work, num_ranks)
    rows = given["per_device_train_batch_size"]
    if packing:
        per_micro_batch = rows * num_ranks * setting["max_length"]
        given["gradient_accumulation_steps"] = max(1, round(setting["tokens_per_step"] / per_micro_batch))
    arguments = SFTConfig(
        **given,
        max_length=None if padding_free else setting["max_length"],
        padding_free=padding_free,
        packing=packing,
        assistant_only_loss=True,
    )
    trainer = SFTTrainer(
        adapted_model(setting, work),
        arguments,
        train_dataset=datasets.Dataset.from_list(rows_of(work)),
        processing_class=AutoTokenizer.from_pretrained(work / "base"),
    )
    per_step = rows * num_ranks * given["gradient_accumulation_steps"]
    packed = trainer.train_dataset

    def trained_tokens(step: int) -> int | None:
        """Of packed rows; the first label of each sample is not predicted, and is no answer."""
        if not packing:
            return None
        part = [packed[index % len(packed)]["labels"] for index in range(step * per_step, (step + 1) * per_step)]
        return sum(label != IGNORED for labels in part for label in labels)

    return trainer, trained_tokens


SIDES: dict[str, Callable[[Setting, Path, int], Built]] = {
    "transformers, all": partial(plain, answers_only=False),
    "transformers": partial(plain, answers_only=True),
    "transformers, ZeRO-3": partial(plain, answers_only=True, deepspeed=ZERO3_OFFLOAD),
    "TRL": trl,
    "TRL, padding-free": partial(trl, padding_free=True),
    "TRL, packed": partial(trl, packing=True),
}


# ---- one run ----


class Recorder(TrainerCallback):
    """The end of every step, its loss and its gradient norm."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer's step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """Of every step, since logging_steps is 1."""
        if "grad_norm" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


def peak_bytes() -> int:
    """Of this process: GPU memory where there is a GPU, resident memory otherwise; as launch/report.py counts."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_side(side: str, work: Path, run: Path) -> None:
    """Train; rank zero writes the figures of every step into `run`."""
    logging.set_verbosity_error()
    setting = json.loads((work / "setting.json").read_text(encoding="utf-8"))
    trainer, trained_tokens = SIDES[side](setting, work, setting["ranks"])
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    if trainer.is_world_process_zero():
        figures = {
            "seconds": [end - begin for begin, end in zip(recorder.ends, recorder.ends[1:], strict=False)],
            "loss": recorder.losses,
            "gradient_norm": recorder.norms,
            "trained_tokens": [trained_tokens(step) for step in range(setting["steps"])],
            "peak_bytes": peak_bytes(),
            "versions": versions(),
        }
        (run / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    run_side(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
