"""Tokens a second and memory on GPUs: what `launch plan` chooses, beside transformers' Trainer with PEFT, and TRL.

A random model of a published shape, LoRA of r = 16 on all linear layers; on real rows, or on rows that are all full.
On a machine without a GPU the shape `toy` runs everything but the GPU's part. See benchmarks/gpu/README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import training
import transformers
import yaml
from sides import ROOT, build_tokenizer, in_new_process, json_row, questions_and_answers
from training import Figures, LaunchFailedError, Side
from transformers import AutoConfig

from launch import plan
from launch.activations import adapter_bytes
from launch.hardware import find_hardware
from launch.recipe import Recipe
from launch.shapes import Base, base_of_config, read_config

SHAPES = {
    "qwen2-7b": "qwen2-7b-instruct.json",
    "llama-3-8b": "llama-3-8b.json",
    "qwen1.5-14b": "qwen1.5-14b-chat.json",
}
TOY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50_000,
    "tie_word_embeddings": False,
}
TOLERANCES = {"fp32": training.TOLERANCE, "bf16": 0.05, "fp16": 0.05}
SIDES = {
    "cairn": Side(layout="planned"),
    "cairn, zero3": Side(layout="zero3"),  # weights and optimizer in host memory
    "transformers": training.SIDES["transformers"],
    "transformers, ZeRO-3": Side(distributed=True),  # the same, by transformers
    "TRL": training.SIDES["TRL"],
    "TRL, padding-free": training.SIDES["TRL, padding-free"],
    "TRL, packed": training.SIDES["TRL, packed"],
}
OFFLOADED = ("cairn, zero3", "transformers, ZeRO-3")  # only where they are asked for
GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """The layout, and how it is run."""

    case: plan.Case
    layout: str
    gradient_checkpointing: bool
    budget_tokens: int

    @property
    def terms(self) -> dict[str, int]:
        """Bytes of a GPU that the plan forecasts for them, by name."""
        case, sharding = self.case, plan.read_sharding(self.layout)
        way = plan.way_of(case, sharding, False, self.gradient_checkpointing)
        fixed = plan.fixed_gpu_bytes(case, case.model(False), sharding, self.gradient_checkpointing)
        adapters = adapter_bytes(case.base, plan.adapted_of(case), way, is_masked=case.is_masked)
        return fixed | plan.micro_batch_bytes(case, adapters, way, self.budget_tokens)


# ---- what all sides start from ----


def full_pairs(pairs: list[tuple[str, str]], tokenizer: Any, max_length: int, num_rows: int) -> list[tuple[str, str]]:
    """Answers so long that a row fills `max_length` tokens but for a few."""
    texts = cycle(answer for _, answer in pairs)
    found = []
    for number in range(num_rows):
        question, answer = f"{number}.", next(texts)
        while _num_tokens(tokenizer, question, answer) <= max_length:
            answer += "\n" + next(texts)
        low, high = 0, len(answer)
        while high - low > 1:
            middle = (low + high) // 2
            fits = _num_tokens(tokenizer, question, answer[:middle]) <= max_length
            low, high = (middle, high) if fits else (low, middle)
        found.append((question, answer[:low]))
    return found


def _num_tokens(tokenizer: Any, question: str, answer: str) -> int:
    messages = json.loads(json_row(question, answer))["messages"]
    return len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])


def make_base(work: Path, config: dict[str, Any], precision: str) -> dict[str, float]:
    """In a process of its own, whose GPU memory is free afterwards; on the CPU where the GPU is too small for it."""
    transformers.logging.set_verbosity_error()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    own = {name: value for name, value in config.items() if name != "model_type"}
    built = AutoConfig.for_model(config["model_type"], max_position_embeddings=8192, **own)
    base = base_of_config(config, "the shape")
    needed = 1.2 * base.num_parameters * dtype.itemsize
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed
    training.make_model(work, built, dtype, "cuda" if fits else "cpu")
    return {}


def planned(options: argparse.Namespace, work: Path, base: Base, trained_share: float) -> Planned:
    """What `launch plan` says for this recipe here; the options may overrule it."""
    recipe = Recipe.model_validate(yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8")))
    hardware = find_hardware(options.gpu, options.ranks, 1, options.host_memory, options.interconnect)
    case = plan.make_case(recipe, base, hardware, trained_share)
    chosen = plan.recommend(case, plan.choices(case))
    if chosen is None or chosen.load_in_4bit:
        sys.exit(f"Nothing that trains {options.shape} in 16 bits fits into {options.ranks} x {hardware.gpu.name}.")
    found = Planned(case, chosen.layout, chosen.gradient_checkpointing, chosen.budget_tokens)
    if options.layout:
        found = replace(found, layout=options.layout)
    if options.budget:
        found = replace(found, budget_tokens=options.budget)
    if options.checkpointing:
        found = replace(found, gradient_checkpointing=options.checkpointing == "on")
    return found


def prepare(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], Planned]:
    """Rows, recipe and model in `work`; the setting of all sides, and the plan."""
    config = TOY if options.shape == "toy" else read_config(ROOT / "tests/model_configs" / SHAPES[options.shape])
    pairs = questions_and_answers(options.source)
    tokenizer = build_tokenizer(pairs, 48_000)
    if options.rows == "full":
        num_rows = options.global_batch_size * (options.warmup + options.steps)
        pairs = full_pairs(pairs, tokenizer, options.max_length, num_rows)
    of_recipe = argparse.Namespace(**vars(options) | {"budget": options.max_length, "gradient_checkpointing": False})
    setting = training.make_rows(work, of_recipe, tokenizer, pairs)
    chosen = planned(options, work, base_of_config(config, options.shape), setting["trained_share"])
    setting |= {"budget_tokens": chosen.budget_tokens, "gradient_checkpointing": chosen.gradient_checkpointing}
    setting["ranks"] = options.ranks
    (work / "setting.json").write_text(json.dumps(setting), encoding="utf-8")
    in_new_process(make_base, work, config, options.precision)
    tokenizer.save_pretrained(work / "base")
    return setting, chosen


# ---- the launches ----


class UsedMemory:
    """The most that any GPU had in use while this context was open, as nvidia-smi says; None without one."""

    def __enter__(self) -> "UsedMemory":
        self.most_bytes: int | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        if torch.version.cuda is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._is_over.wait(0.5):
            try:
                done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            except (OSError, subprocess.SubprocessError):
                return
            used = max(int(line) for line in done.stdout.split()) * 2**20
            self.most_bytes = max(used, self.most_bytes or 0)


def measure(options: argparse.Namespace, work: Path, chosen: Planned, setting: dict[str, Any]) -> list[Figures]:
    """Every side in turn, `--repeats` times over; one that runs out of memory is left out from then on."""
    changes = [
        f"train.max_tokens_per_micro_batch={chosen.budget_tokens}",
        f"train.gradient_checkpointing={str(chosen.gradient_checkpointing).lower()}",
    ]
    found: list[Figures] = []
    expected: Figures = {}
    sides = list(options.sides)
    for repeat in range(options.repeats):
        for name in list(sides):
            side = SIDES[name]
            side = replace(side, layout=chosen.layout) if side.layout == "planned" else side
            try:
                with UsedMemory() as used:
                    figures = training.launch(name, side, work, options.ranks, options.trl_python, *changes)
            except LaunchFailedError as error:
                if "out of memory" not in str(error).lower():
                    raise
                print(f"{name} runs out of memory.", flush=True)
                sides.remove(name)
                continue
            expected = expected or figures
            if not side.instead:
                difference = training.first_difference(figures, expected, TOLERANCES[options.precision])
                if difference:
                    sys.exit(f"{name} and {options.sides[0]} differ: {difference}")
            answers = training.rate_of(figures, expected, options.warmup)
            rate = answers / setting["trained_share"] / options.ranks
            found.append({"side": name, "repeat": repeat + 1, "rate": rate, "used_bytes": used.most_bytes, **figures})
            print(f"{repeat + 1}/{options.repeats} {name}: {rate:,.0f} tokens/s a GPU", file=sys.stderr, flush=True)
    return found


# ---- the report ----


def heading(options: argparse.Namespace, setting: dict[str, Any], chosen: Planned) -> str:
    """What runs on what; 80 columns."""
    about = training.machine()
    checkpointing = "with" if chosen.gradient_checkpointing else "without"
    texts = [
        f"planned for {options.ranks} x {chosen.case.hardware.gpu.name}; {about['cpu']}, {about['platform']}",
        f"{options.shape}, {options.precision}, {setting['tokens_per_step']:,.0f} tokens a step of "
        f"{options.global_batch_size} rows, {setting['trained_share']:.0%} of them trained; {chosen.layout}, "
        f"{chosen.budget_tokens:,} tokens a micro-batch, {checkpointing} gradient checkpointing",
    ]
    return "\n".join(line for text in texts for line in textwrap.wrap(text, 80))


def table(found: list[Figures], chosen: Planned) -> str:
    """Medians by side, the spread, memory, and the share of the data sheet's peak; 80 columns."""
    base, gpu = chosen.case.base, chosen.case.hardware.gpu
    num_multiplied = base.num_parameters - base.vocab_size * base.hidden_size  # the embeddings are looked up
    executed = 6 if chosen.gradient_checkpointing else 4
    executed_title = f"{executed}P"
    lines = [f"{'':21}{'tokens/s':>10}{'min - max':>18}{'GiB':>7}{'used':>7}{'4P':>8}{executed_title:>8}"]
    for name in dict.fromkeys(one["side"] for one in found):
        runs = [one for one in found if one["side"] == name]
        rates = [one["rate"] for one in runs]
        rate = statistics.median(rates)
        used = max((one["used_bytes"] or 0) for one in runs)
        shares = [rate * number * num_multiplied / (gpu.half_tflops * 1e12) for number in (4, executed)]
        spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
        gib = max(one["peak_bytes"] for one in runs) / GIB
        used_text = f"{used / GIB:.1f}" if used else "-"
        lines.append(f"{name:21}{rate:>10,.0f}{spread:>18}{gib:>7.1f}{used_text:>7}{shares[0]:>8.1%}{shares[1]:>8.1%}")
    return "\n".join(lines)


def forecast_line(found: list[Figures], chosen: Planned) -> str:
    """What the plan said, and what came."""
    terms = chosen.terms
    allocated = sum(value for name, value in terms.items() if name not in ("CUDA and NCCL", "fragmentation"))
    text = f"plan: {allocated / GIB:.1f} GiB allocated, {sum(terms.values()) / GIB:.1f} GiB in use"
    runs = [one for one in found if one["side"] == "cairn"]
    if not runs or not torch.version.cuda:
        return f"{text}; not measured, for there is no GPU"
    measured = max(one["peak_bytes"] for one in runs)
    used = max((one["used_bytes"] or 0) for one in runs)
    return (
        f"{text}; measured {measured / GIB:.1f} ({measured / allocated - 1:+.0%}) and {used / GIB:.1f} "
        f"({used / sum(terms.values()) - 1:+.0%}); wanted: within 10%"
    )


def main() -> int:
    """Measure, compare, print."""
    parser = training.arguments()
    parser.description = __doc__
    parser.set_defaults(steps=8, warmup=2, global_batch_size=16, repeats=3)
    parser.add_argument("--shape", choices=["toy", *SHAPES], default="llama-3-8b")
    parser.add_argument("--precision", choices=list(TOLERANCES), default="bf16")
    parser.add_argument("--rows", choices=["mix", "full"], default="full", help="real ones, or of --max-length tokens")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=1, help="GPUs")
    parser.add_argument("--gpu", help="as `launch plan --gpu`; default: this machine's")
    parser.add_argument("--host-memory", help="as `launch plan --host-memory`")
    parser.add_argument("--interconnect", choices=["nvlink", "pcie"], help="as `launch plan --interconnect`")
    parser.add_argument("--layout", choices=plan.LAYOUTS, help="instead of the plan's")
    parser.add_argument("--budget", type=int, help="tokens of a micro-batch, instead of the plan's")
    parser.add_argument("--checkpointing", choices=["on", "off"], help="instead of the plan's")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[name for name in SIDES if name not in OFFLOADED])
    parser.add_argument("--directory", type=Path, help="for the model: as large as that, twice; default: TMPDIR")
    options = parser.parse_args()
    training.refuse_missing_rows(options.source)
    options.sides = [name for name in SIDES if name == "cairn" or name in options.sides]  # the others are held to it
    options.sides = [name for name in options.sides if options.trl_python or not SIDES[name].is_trl]
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        setting, chosen = prepare(options, Path(directory))
        print(f"{heading(options, setting, chosen)}\n", flush=True)
        try:
            found = measure(options, Path(directory), chosen, setting)
        except LaunchFailedError as error:
            sys.exit(str(error))
    print(f"{table(found, chosen)}\n\n{forecast_line(found, chosen)}")
    print(f"\n{training.notes({name: SIDES[name] for name in options.sides}, found)}")
    if options.json:
        about = training.machine() | {"gpu": chosen.case.hardware.gpu.name, "gpus": options.ranks}
        result = {"machine": about, "shape": options.shape, "setting": setting, "layout": chosen.layout}
        result |= {"forecast_bytes": chosen.terms, "runs": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
