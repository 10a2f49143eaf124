"""What an evaluation costs: cairn's, one of the loss alone, and one that hands all logits to compute_metrics.

Every side evaluates the same samples in a process of its own, in turn; the times count only when losses and right
tokens are equal. See benchmarks/README.md.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides import CORES, ROOT, forget_peak, in_new_process, peak_mib, versions

sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from peft import PeftModel
from prepare_rows import machine
from torch.nn import functional
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from launch import engine as engines
from launch.adapter import add_adapter
from launch.deadline import Deadline
from launch.job import Job, evaluate
from launch.packing import collate, forward_arguments, probe
from launch.recipe import Recipe
from launch.sample_attention import one_by_one
from launch.samples import Samples
from launch.watchdog import Watchdog

MAX_MIB, MAX_RATIO = 1024, 1.1  # above the model; of the seconds of a loss-only pass
TOLERANCE = 1e-5
Options = dict[str, Any]
Result = dict[str, float]  # loss_sum and num_correct, or nothing but the first
Evaluation = Callable[[], Result]


# ---- what all sides evaluate ----


def samples_of(options: Options, num_samples: int) -> Samples:
    """Random tokens, each of them twice in a row; all but the first of a sample are trained."""
    length = options["tokens"]
    ids = np.random.default_rng(0).integers(0, options["vocab"], (options["samples"], (length + 1) // 2), np.int32)
    ids = np.repeat(ids, 2, axis=1)[:num_samples, :length]
    is_trained = np.ones(ids.shape, np.bool_)
    is_trained[:, 0] = False
    lengths = np.full(num_samples, length)
    return Samples(ids.ravel(), is_trained.ravel(), np.cumsum(lengths) - lengths, lengths, lengths - 1)


def adapted(options: Options, recipe: Recipe) -> PeftModel:
    """A small Qwen2 with LoRA; its head is its embeddings, so that it likes to say a token again, and is half right."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options["vocab"],
        hidden_size=options["width"],
        intermediate_size=options["width"] * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=options["width"] // 64,
        num_key_value_heads=options["width"] // 64,
        tie_word_embeddings=True,
    )
    return add_adapter(Qwen2ForCausalLM(config), recipe.adapter, base="", seed=0, dtype=torch.float32)


def recipe_of(options: Options, work: Path) -> Recipe:
    """Nothing is loaded by it."""
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "random"},
            "data": {"train": "random", "template": "qwen2", "max_length": options["tokens"]},
            "train": {"max_tokens_per_micro_batch": options["budget"]},
            "adapter": {"target_modules": "all-linear"},
            "run": {"name": "evaluation", "output_dir": str(work)},
        }
    )


def job_of(options: Options, work: Path) -> Job:
    """As train.py makes it, on one rank that holds the whole model."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_DEEPSPEED": "true"}
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / "configs/deepspeed/zero2_no_offload.json")
    engines.quiet_libraries()
    recipe = recipe_of(options, work)
    accelerator = engines.create_accelerator(recipe, "fp32")
    model = adapted(options, recipe)
    accepts = forward_arguments(model.get_base_model())
    engine = engines.start_engine(accelerator, model, recipe.train)
    watchdog = Watchdog(1e6, work / "stacks.txt", print)
    held_out = samples_of(options, options["samples"])
    none: Any = None  # the tokenizer, which no evaluation asks
    probed = probe("auto", 0, engine, model.get_base_model(), held_out, accelerator.device)
    return Job(
        recipe,
        accelerator,
        engine,
        model,
        none,
        held_out,
        held_out,
        packed=probed.packed,
        accepts=accepts,
        head=probed.head,
        identity={},
        watchdog=watchdog,
        deadline=Deadline(None),
    )


# ---- the sides: what is built first, then what is timed ----


def cairn(options: Options, work: Path) -> Evaluation:
    """`evaluate`, as train.py calls it."""
    job = job_of(options, work)

    def timed() -> Result:
        found = evaluate(job)
        assert found is not None
        return {"loss_sum": found[0].loss_sum, "num_correct": found[0].num_correct}

    return timed


def loss_only(options: Options, work: Path) -> Evaluation:
    """The same micro-batches, of whose whole logits nothing but the cross-entropy is computed."""
    job = job_of(options, work)

    @torch.no_grad()
    def timed() -> Result:
        job.engine.eval()
        loss_sum = 0.0
        for ids in job.micro_batches(job.held_out, range(len(job.held_out))):
            batch = collate(job.held_out, ids, job.accelerator.device, packed=True)
            with one_by_one(batch.lengths):
                logits = job.engine(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    logits_to_keep=batch.column_index,
                ).logits[0]
            loss_sum += functional.cross_entropy(logits, batch.targets, reduction="sum").item()
        return {"loss_sum": loss_sum}

    return timed


def compute_metrics(options: Options, work: Path) -> Evaluation:
    """transformers' Trainer, which gathers the logits of all samples before it counts the right ones."""
    samples = samples_of(options, options["reference_samples"])
    rows = []
    for index in range(len(samples)):
        ids = torch.from_numpy(samples.sample(index)[0])
        rows.append({"input_ids": ids, "labels": ids})
    num_tokens = int(samples.num_trained.sum())

    def counts(prediction: Any) -> Result:
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"num_correct": int(right.sum())}

    arguments = TrainingArguments(
        output_dir=str(work / "output"),
        per_device_eval_batch_size=options["budget"] // options["tokens"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = adapted(options, recipe_of(options, work))
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=counts)
    trainer.remove_callback(PrinterCallback)

    def timed() -> Result:
        found = trainer.evaluate()
        return {"loss_sum": found["eval_loss"] * num_tokens, "num_correct": found["eval_num_correct"]}

    return timed


SIDES: dict[str, Callable[[Options, Path], Evaluation]] = {
    "cairn": cairn,
    "loss only": loss_only,
    "compute_metrics": compute_metrics,
}


def run(side: str, options: Options, work: Path) -> dict[str, float]:
    """One evaluation, and the peak of memory above the model's."""
    timed = SIDES[side](options, work)
    before = forget_peak()
    begin, begin_cpu = time.monotonic(), time.process_time()
    result = timed()
    seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - begin_cpu
    return result | {"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": peak_mib() - before}


def first_difference(found: Result, expected: Result) -> str | None:
    """In words."""
    if abs(found["loss_sum"] - expected["loss_sum"]) > TOLERANCE * expected["loss_sum"]:
        return f"a loss sum of {found['loss_sum']:.7g} against {expected['loss_sum']:.7g}"
    if found.get("num_correct", expected["num_correct"]) != expected["num_correct"]:
        return f"{found['num_correct']} right tokens against {expected['num_correct']}"
    return None


# ---- the whole ----


def measure(options: Options, work: Path) -> list[dict[str, Any]]:
    """The sides in turn: all samples, then as many as compute_metrics has the memory for."""
    found = []
    cases: list[tuple[Options, tuple[str, ...]]] = [(options, ("cairn", "loss only"))]
    if options["reference_samples"]:
        cases.append((options | {"samples": options["reference_samples"]}, tuple(SIDES)))
    for of_case, sides in cases:
        for repeat in range(options["repeats"]):
            expected: Result = {}
            for side in sides:
                one = in_new_process(run, side, of_case, work)
                expected = expected or one
                if difference := first_difference(one, expected):
                    sys.exit(f"{side} and {sides[0]} differ on {of_case['samples']} samples: {difference}")
                found.append({"samples": of_case["samples"], "side": side, "repeat": repeat + 1, **one})
                print(f"{repeat + 1}/{options['repeats']} {side}: {one['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Medians by case, the spread, the peaks, and cairn beside what it must not exceed; 80 columns."""
    lines = [f"{'samples':>7}  {'':17}{'seconds':>9}{'min - max':>16}{'CPU s':>8}{'MiB above the model':>21}"]
    medians: dict[tuple[int, str], float] = {}
    mib: dict[tuple[int, str], float] = {}
    for case in dict.fromkeys((one["samples"], one["side"]) for one in found):
        runs = [one for one in found if (one["samples"], one["side"]) == case]
        seconds = [one["seconds"] for one in runs]
        medians[case], cpu = statistics.median(seconds), statistics.median(one["cpu_seconds"] for one in runs)
        mib[case] = max(one["mib"] for one in runs)
        spread = f"{min(seconds):.2f} - {max(seconds):.2f}"
        lines.append(f"{case[0]:>7,}  {case[1]:17}{medians[case]:>9.2f}{spread:>16}{cpu:>8.2f}{mib[case]:>21,.0f}")
    most = max(samples for samples, _ in medians)
    ratio = medians[most, "cairn"] / medians[most, "loss only"]
    lines += ["", f"cairn / loss only, {most:,} samples: {ratio:.2f} (wanted: at most {MAX_RATIO})"]
    lines += [f"cairn above the model: {mib[most, 'cairn']:,.0f} MiB (wanted: less than {MAX_MIB:,})"]
    return "\n".join(lines)


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--reference-samples", type=int, default=4, help="of compute_metrics; 0: without it")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sample")
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--width", type=int, default=64, help="hidden size, a multiple of 64")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch; a recipe's default is 4096")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every run here")
    parsed = parser.parse_args()
    options = {name: value for name, value in vars(parsed).items() if name != "json"}
    about = machine()
    gathered = options["samples"] * options["tokens"] * options["vocab"] * 4 / 2**30
    print(f"{about['cpu']}, {CORES} cores, {about['platform']}, torch {torch.__version__}")
    print(
        f"{options['samples']:,} samples of {options['tokens']:,} tokens, vocabulary {options['vocab']:,}: "
        f"{gathered:,.1f} GiB of logits; losses and right tokens must be equal on all sides\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        found = measure(options, Path(directory))
    print(table(found))
    if parsed.json:
        result = {"machine": about, "versions": versions(), "options": options, "runs": found}
        parsed.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
