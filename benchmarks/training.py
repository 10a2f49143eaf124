"""How fast training is on CPU, and in how much memory: cairn, transformers' Trainer and TRL on the same rows.

A time counts only where every step has cairn's loss and gradient norm; of what trains something else by design, the
table says so. Every run is a launch of its own, and the sides take turns. See benchmarks/README.md.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sides import CORES, FILES, ROOT, build_tokenizer, json_row, questions_and_answers, versions

sys.path.insert(0, str(ROOT))

import torch
import transformers
from peft import LoraConfig, get_peft_model
from prepare_rows import machine
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Config

from launch import runs
from launch.batching import step_samples

R = 16
TOLERANCE = 1e-5  # of the loss and the gradient norm in fp32, relative
WANTED = {"transformers, all": 3.5, "transformers": 3.5, "TRL, packed": 2.0}  # times as many answer tokens a second
Figures = dict[str, Any]


class LaunchFailedError(Exception):
    """With what was said."""


@dataclass(frozen=True)
class Side:
    """Who trains."""

    layout: str = ""  # of cairn, in configs/accelerate
    is_trl: bool = False
    instead: str = ""  # what it trains by design where that is not what cairn trains
    distributed: bool = False  # it needs a process group on one rank, too


SIDES = {
    "cairn": Side(layout="zero2_no_offload"),
    "cairn, ZeRO-3": Side(layout="zero3_no_offload"),
    "transformers, all": Side(instead="every token of the rows, the questions too"),
    "transformers": Side(),
    "TRL": Side(is_trl=True),
    "TRL, padding-free": Side(is_trl=True),
    "TRL, packed": Side(is_trl=True, instead="other rows in each step: it packs all rows before it takes a batch"),
}


# ---- what all sides start from ----


def small_config(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace, vocab_size: int) -> Qwen2Config:
    """A small Qwen2; the embeddings may have more rows than the tokenizer has tokens."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def make(work: Path, options: argparse.Namespace, pairs: list[tuple[str, str]], vocab_size: int) -> dict[str, Any]:
    """`base`, `adapter`, `rows.jsonl`, `ordered.jsonl` and the recipe; the setting without the number of ranks."""
    tokenizer = build_tokenizer(pairs, vocab_size)
    tokenizer.save_pretrained(work / "base")
    make_model(work, small_config(tokenizer, options, vocab_size), torch.float32)
    return make_rows(work, options, tokenizer, pairs)


def make_model(work: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str = "cpu") -> None:
    """A random base and a random LoRA on all of its linear layers, whose B is not zero, so that all has a gradient."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(work / "base")
        lora = LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(str(work / "adapter"))


def make_rows(
    work: Path, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    """The rows that are short enough, and those of every step one behind the other; a recipe; the setting."""
    lines, lengths, trained = [], [], []
    for pair in pairs:
        line = json_row(*pair)
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        if len(encoded["input_ids"]) <= options.max_length:
            lines.append(line)
            lengths.append(len(encoded["input_ids"]))
            trained.append(sum(encoded["assistant_masks"]))
    num_steps, size = options.warmup + options.steps, options.global_batch_size
    ids = [
        sample for step in range(num_steps) for sample in step_samples(step, len(lines), size, num_steps * size, seed=0)
    ]
    (work / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (work / "ordered.jsonl").write_text("".join(lines[sample] for sample in ids), encoding="utf-8")
    recipe = {
        "model": {"name_or_path": str(work / "base")},
        "data": {
            "train": str(work / "rows.jsonl"),
            "template": "qwen2",
            "test_size": 0.0,
            "max_length": options.max_length,
            "overlong": "error",
        },
        "adapter": {
            "r": R,
            "lora_alpha": 2 * R,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "init_from": str(work / "adapter"),
        },
        "train": {
            "global_batch_size": size,
            "max_tokens_per_micro_batch": options.budget,
            "max_steps": num_steps,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "constant",
            "precision": options.precision,
            "gradient_checkpointing": options.gradient_checkpointing,
            "save_steps": 10 * num_steps,
            "save_seconds": 1e6,  # no save within the steps
            "logging_steps": 1,
        },
        "run": {"name": "run", "output_dir": str(work / "runs"), "merge": False},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return {
        "steps": num_steps,
        "global_batch_size": size,
        "max_length": options.max_length,
        "budget_tokens": options.budget,
        "learning_rate": options.learning_rate,
        "precision": options.precision,
        "gradient_checkpointing": options.gradient_checkpointing,
        "tokens_per_step": sum(lengths[sample] for sample in ids) / num_steps,
        "trained_share": sum(trained[sample] for sample in ids) / sum(lengths[sample] for sample in ids),
    }


# ---- the launches ----


def launch(name: str, side: Side, work: Path, num_ranks: int, trl_python: str | None, *changes: str) -> Figures:
    """Train once; what happened in every step. `changes` are of cairn's recipe; LaunchFailedError when it fails."""
    run = work / "runs"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    if side.layout:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"configs/accelerate/{side.layout}.yaml", "--num_processes", str(num_ranks)]
        command += ["train.py", str(work / "recipe.yaml"), *changes]
    else:
        command = [str(trl_python if side.is_trl else sys.executable)]
        if num_ranks > 1 or side.distributed:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
        command += [str(ROOT / "benchmarks/training_sides.py"), name, str(work), str(run)]
    threads = {"OMP_NUM_THREADS": str(max(1, CORES // num_ranks))}
    offline = {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | threads | offline, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise LaunchFailedError(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{name} on {num_ranks} rank(s) failed.")
    if not side.layout:
        figures: Figures = json.loads((run / "figures.json").read_text(encoding="utf-8"))
        return figures
    records = [record for record in runs.read_metrics(run / "run") if record["kind"] == "train"]
    return {
        "seconds": [record["trained_tokens"] / record["trained_tokens_per_second"] for record in records],
        "loss": [record["loss"] for record in records],
        "gradient_norm": [record["gradient_norm"] for record in records],
        "trained_tokens": [record["trained_tokens"] for record in records],
        "peak_bytes": max(record["peak_memory_bytes"] for record in records),
        "versions": versions(),
    }


def first_difference(found: Figures, expected: Figures, tolerance: float) -> str | None:
    """The first step whose loss or gradient norm is another, in words; of a step that fp16 skipped there is none."""
    for key in ("loss", "gradient_norm"):
        for step, (one, other) in enumerate(zip(found[key], expected[key], strict=True), start=1):
            if tolerance > TOLERANCE and not all(value is not None and math.isfinite(value) for value in (one, other)):
                continue
            if not abs(one - other) <= tolerance * abs(other):
                return f"{key.replace('_', ' ')} of step {step}: {one:.7g} against {other:.7g}"
    return None


# ---- the whole ----


def measure(options: argparse.Namespace, work: Path, vocab_size: int) -> list[Figures]:
    """Every side in turn on every number of ranks, `--repeats` times over; ends at the first difference."""
    pairs = questions_and_answers(options.source)
    setting = make(work, options, pairs, vocab_size)
    share = setting["tokens_per_step"] / (setting["global_batch_size"] * setting["max_length"])
    print(
        f"\nvocabulary {vocab_size:,}: {setting['tokens_per_step']:,.0f} tokens a step of {options.global_batch_size} "
        f"rows, which fill {share:.0%} of what is padded to {options.max_length}"
    )
    found: list[Figures] = []
    for num_ranks in options.ranks:
        (work / "setting.json").write_text(json.dumps(setting | {"ranks": num_ranks}), encoding="utf-8")
        expected: Figures = {}
        of_ranks: list[Figures] = []
        for repeat in range(options.repeats):
            for name in options.sides:
                figures = launch(name, SIDES[name], work, num_ranks, options.trl_python)
                expected = expected or figures
                difference = None if SIDES[name].instead else first_difference(figures, expected, TOLERANCE)
                if difference:
                    sys.exit(f"{name} and {options.sides[0]} differ on {num_ranks} rank(s): {difference}")
                rate = rate_of(figures, expected, options.warmup)
                one = {"vocab": vocab_size, "ranks": num_ranks, "side": name, "repeat": repeat + 1, "rate": rate}
                of_ranks.append(one | figures)
                print(f"{repeat + 1}/{options.repeats} {name}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        print(f"\n{table(of_ranks, num_ranks)}", flush=True)
        found += of_ranks
    return found


def rate_of(figures: Figures, expected: Figures, warmup: int) -> float:
    """Answer tokens a second in the steps that are not for warming up."""
    counted = figures["trained_tokens"]
    tokens = expected["trained_tokens"] if counted[0] is None else counted
    return float(sum(tokens[warmup:]) / sum(figures["seconds"][warmup:]))


def table(found: list[Figures], num_ranks: int) -> str:
    """Medians by side, the spread, and what the first side is against each; 80 columns."""
    lines = [f"{f'{num_ranks} rank(s)':20}{'tokens/s':>10}{'min - max':>18}{'MiB':>9}{'cairn':>8}{'wanted':>9}"]
    first = statistics.median(one["rate"] for one in found if one["side"] == found[0]["side"])
    for side in dict.fromkeys(one["side"] for one in found):
        rates = [one["rate"] for one in found if one["side"] == side]
        mib = max(one["peak_bytes"] for one in found if one["side"] == side) / 2**20
        spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
        ratio = f"{first / statistics.median(rates):.2f}x"
        wanted = f">= {WANTED[side]}x" if side in WANTED else ""
        lines.append(f"{side:20}{statistics.median(rates):>10,.0f}{spread:>18}{mib:>9,.0f}{ratio:>8}{wanted:>9}")
    return "\n".join(line.rstrip() for line in lines)


def notes(sides: dict[str, Side], measured: list[Figures]) -> str:
    """What is compared with what, and the versions in each environment."""
    texts = ["tokens/s: in the steps after those for warming up; MiB: peak of rank zero, its imports included"]
    texts += [f"{name} trains {side.instead}; its loss is not compared" for name, side in sides.items() if side.instead]
    environments = {sides[one["side"]].is_trl: one["versions"] for one in measured}
    texts += [", ".join(f"{name} {number}" for name, number in found.items()) for found in environments.values()]
    return "\n".join(line for text in texts for line in textwrap.wrap(text, 80))


def arguments() -> argparse.ArgumentParser:
    """What this and the scripts in gpu/ have in common."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT.parent / "shared/data", help=f"holds {' and '.join(FILES)}")
    parser.add_argument("--trl-python", help="python of an environment with TRL and PEFT (benchmarks/README.md)")
    parser.add_argument("--repeats", type=int, default=2, help="launches of each side, in turn")
    parser.add_argument("--steps", type=int, default=4, help="that are measured")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--global-batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--json", type=Path, help="write every run here")
    return parser


def refuse_missing_rows(source: Path) -> None:
    """Exit code 2 where the rows are not there."""
    missing = [str(source / name) for name in FILES if not (source / name).is_file()]
    if missing:
        print(f"There is no {missing[0]}; give the directory of {' and '.join(FILES)} as --source.", file=sys.stderr)
        sys.exit(2)


def main() -> int:
    """Measure, compare, print."""
    parser = arguments()
    parser.description = __doc__
    parser.add_argument("--vocab", type=int, nargs="+", default=[48_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer rows are left out")
    parser.add_argument("--budget", type=int, default=2048, help="tokens (cells, where padded) of a micro-batch")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: all; cairn is always one"
    )
    options = parser.parse_args()
    options.precision, options.gradient_checkpointing = "fp32", False
    refuse_missing_rows(options.source)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options.sides = [name for name in SIDES if name == "cairn" or name in options.sides]  # the others are held to it
    options.sides = [name for name in options.sides if options.trl_python or not SIDES[name].is_trl]
    about = machine()
    print(f"{about['cpu']}, {CORES} cores, {about['platform']}")
    found = []
    try:
        for vocab_size in options.vocab:
            with tempfile.TemporaryDirectory() as directory:
                found += measure(options, Path(directory), vocab_size)
    except LaunchFailedError as error:
        sys.exit(str(error))
    print(f"\n{notes({name: SIDES[name] for name in options.sides}, found)}")
    if options.json:
        result = {"machine": about, "options": vars(options) | {"source": str(options.source)}, "runs": found}
        options.json.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
