"""How cairn's cost grows: with the ranks, the model and the length of its rows, the number of rows, and of GPUs.

`steps`: the same optimizer steps on some numbers of ranks (CPU, gloo, ZeRO-3 without offload, one thread each), every
collective timed from without. `gather` is in all-gathers and on their handles, `reduce` in reduce-scatters and
all-reduces, both from the moment when the last rank has entered that collective; `wait` is what a rank is held up in
collectives before that moment; `compute` is the rest of the step. The ranks' clock is the machine's, so moments
compare, and nothing is added to the step: no barrier, no message. A loss or a gradient norm that is not the same on all
numbers of ranks ends it with exit code 1. `growth`: a step on one rank, by width and by length. `rows`: choosing and
laying out a step's samples. `world`: how alike the shares of many ranks are. See benchmarks/README.md.
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
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sides import CORES, FILES, MAX_VOCAB_SIZE, ROOT, build_tokenizer, json_row, middle, questions_and_answers, versions

sys.path.insert(0, str(ROOT))

import torch
import training
from gpu.throughput import full_pairs
from prepare_rows import machine
from training import TOLERANCE, Figures, LaunchFailedError

from launch import batching
from launch import engine as engines

SHOWN = ("compute", "gather", "reduce", "wait")
WARMUP = 2  # steps before those that are measured
INDEX_RANKS, INDEX_BATCH, INDEX_STEPS = 8, 64, 300  # of `rows`: ranks, samples, steps
WORLD_BATCH, WORLD_STEPS = 64, 5  # of `world`: samples of a step for each rank, steps
BUDGET = 8192  # tokens of a micro-batch, of both
MAX_INDEX_SHARE, MAX_IMBALANCE = 0.01, 0.03  # of a step, of the mean: what is wanted of `rows` and `world`
SETTING = {"learning_rate": 1e-5, "precision": "fp32", "gradient_checkpointing": False, "warmup": WARMUP}  # of recipes
METHODS = {  # of torch's ProcessGroup, through which all collectives go
    "gather": ("_allgather_base", "all_gather_single", "allgather", "allgather_into_tensor_coalesced"),
    "reduce": ("allreduce", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter"),
    "other": ("barrier", "broadcast", "alltoall", "alltoall_base", "all_to_all_single", "reduce", "scatter"),
}
Collective = list[Any]  # kind, moments: entered, left; where its handle is waited for, when that began and ended
Lengths = npt.NDArray[np.int64]
say = partial(print, file=sys.stderr, flush=True)  # while it is under way


# ---- a rank: train.py, timed from without ----


def as_rank(work: Path) -> int:
    """Train the recipe in `work`; the moments of this rank's collectives and steps go into a file beside it."""
    from launch import preemption

    preemption.end_with_parent()
    noted: dict[str, list[Any]] = {"collectives": [], "steps": []}
    note_collectives(noted["collectives"])
    note_steps(noted["steps"])
    import train

    exit_code = train.main([str(work / "recipe.yaml")])
    (work / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(noted), encoding="utf-8")
    return exit_code


def note_collectives(noted: list[Collective]) -> None:
    """Of this process, from now on."""
    from torch.distributed import ProcessGroup, Work

    pending: dict[int, tuple[Any, Collective]] = {}
    real_wait = Work.wait

    def timed(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            entered = time.monotonic()
            work = method(*arguments, **named)
            noted.append([kind, entered, time.monotonic()])
            pending[id(work)] = work, noted[-1]  # the work is kept, so that no other has its id
            return work

        return call

    def wait(work: Any, *arguments: Any) -> Any:
        began = time.monotonic()
        result = real_wait(work, *arguments)
        pending.pop(id(work), (None, []))[1].extend((began, time.monotonic()))
        return result

    for kind, methods in METHODS.items():
        for name in methods:
            setattr(ProcessGroup, name, timed(kind, getattr(ProcessGroup, name)))
    Work.wait = wait


def note_steps(noted: list[Figures]) -> None:
    """What train.py tells the log after each step, and the moment."""
    from launch.report import RunLog

    real_step = RunLog.step

    def step(log: RunLog, done: int, sums: list[float], num_tokens: int, **named: Any) -> None:
        one = {"ended": time.monotonic(), "cpu_seconds": time.process_time(), "seconds": named["seconds"]}
        one |= {"loss": sums[0] / sums[2], "gradient_norm": named["gradient_norm"]}
        noted.append(one | {"num_tokens": num_tokens})
        real_step(log, done, sums, num_tokens, **named)

    RunLog.step = step


# ---- the launches, and what their ranks noted ----


def launch(work: Path, num_ranks: int) -> list[Figures]:
    """Train once with ZeRO-3; what each rank noted. LaunchFailedError when it fails."""
    shutil.rmtree(work / "runs", ignore_errors=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "configs/accelerate/zero3_no_offload.yaml", "--num_processes", str(num_ranks)]
    command += ["benchmarks/scaling.py", "--as-rank", str(work)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise LaunchFailedError(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\nIt failed on {num_ranks} rank(s).")
    return [json.loads((work / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]


def measured_steps(ranks: list[Figures]) -> list[Figures]:
    """Of each step after those for warming up: what rank zero noted, means of the ranks' parts, CPU seconds of all."""
    found = []
    for step in range(WARMUP, len(ranks[0]["steps"])):
        inside, cpu_seconds = [], 0.0
        for rank in ranks:
            before, this = rank["steps"][step - 1 : step + 1]
            cpu_seconds += this["cpu_seconds"] - before["cpu_seconds"]
            inside.append([one for one in rank["collectives"] if before["ended"] < one[1] < this["ended"]])
        seconds = statistics.mean(rank["steps"][step]["seconds"] for rank in ranks)
        parts = {part: total / len(ranks) for part, total in seconds_in_collectives(inside).items()}
        parts["compute"] = seconds - sum(parts.values())
        one = ranks[0]["steps"][step] | {"seconds": seconds, "cpu_seconds": cpu_seconds}
        one |= {f"{part}_seconds": parts[part] for part in SHOWN}
        found.append(one | {"num_collectives": len(inside[0])})
    return found


def seconds_in_collectives(ranks: list[list[Collective]]) -> dict[str, float]:
    """Sums over the ranks, which all enter the same collectives in the same order: before all are there, and after."""
    kinds = [[kind for kind, *_ in rank] for rank in ranks]
    if any(of_rank != kinds[0] for of_rank in kinds) or "other" in kinds[0]:
        sys.exit("The ranks' collectives are not the same, or there is one that is neither a gather nor a reduction.")
    found = {"gather": 0.0, "reduce": 0.0, "wait": 0.0}
    for of_ranks in zip(*ranks, strict=True):
        all_are_here = max(entered for _, entered, *_ in of_ranks)
        for kind, *moments in of_ranks:
            for begin, end in zip(moments[::2], moments[1::2], strict=True):  # in the call, and on its handle
                waited = min(max(all_are_here - begin, 0.0), end - begin)
                found["wait"] += waited
                found[kind] += end - begin - waited
    return found


def spread(steps: list[Figures]) -> str:
    """Of their seconds."""
    return f"{min(step['seconds'] for step in steps):.2f} - {max(step['seconds'] for step in steps):.2f}"


# ---- steps ----


def measure_steps(options: argparse.Namespace, pairs: list[tuple[str, str]]) -> list[Figures]:
    """The same steps on each number of ranks; ends where a loss or a gradient norm is another."""
    found: list[Figures] = []
    setting = argparse.Namespace(**(vars(options) | SETTING | {"max_length": 512}))
    with tempfile.TemporaryDirectory() as directory:
        training.make(Path(directory), setting, pairs, options.vocab)
        for num_ranks in options.ranks:
            ranks = launch(Path(directory), num_ranks)
            noted = {key: [step[key] for step in ranks[0]["steps"]] for key in ("loss", "gradient_norm")}
            found.append({"ranks": num_ranks, "steps": measured_steps(ranks)} | noted)
            say(f"{num_ranks} rank(s): {middle(found[-1]['steps'])['seconds']:.2f} s a step")
    print(f"\n{table_of_steps(found)}")
    for key in ("loss", "gradient_norm"):
        pairs_of_key = [pair for run in found for pair in zip(run[key], found[0][key], strict=True)]
        worst = max(abs(one / other - 1) if math.isfinite(one / other) else math.inf for one, other in pairs_of_key)
        print(f"largest difference of a {key.replace('_', ' ')}: {worst:.1e} (wanted: at most {TOLERANCE:.0e})")
        if worst > TOLERANCE:
            sys.exit("The steps depend on the number of ranks.")
    return found


def table_of_steps(found: list[Figures]) -> str:
    """The median step and its parts; 80 columns."""
    titles = "".join(f"{part:>8}" for part in SHOWN)
    lines = [f"{'ranks':>5}{'s a step':>10}{'min - max':>14}{titles}{'calls':>7}{'CPU s':>7}"]
    for run in found:
        step = middle(run["steps"])
        line = f"{run['ranks']:>5}{step['seconds']:>10.3f}{spread(run['steps']):>14}"
        line += "".join(f"{step[f'{part}_seconds']:>8.3f}" for part in SHOWN)
        line += f"{step['num_collectives']:>7}{step['cpu_seconds']:>7.2f}"
        lines.append(f"{line}{' *' if run['ranks'] > CORES else ''}")
    if any(run["ranks"] > CORES for run in found):
        lines.append(f"* they share {CORES} cores: some of what is called compute is waiting for a core")
    return "\n".join(lines)


# ---- growth ----


def measure_growth(options: argparse.Namespace, pairs: list[tuple[str, str]]) -> list[Figures]:
    """A step of as many tokens on one rank: by width with rows of the middle length, and by length at `--width`."""
    length = sorted(options.lengths)[len(options.lengths) // 2]
    cases = [("width", width, length) for width in options.widths]
    cases += [("length", options.width, length) for length in options.lengths]
    tokenizer = build_tokenizer(pairs, options.vocab)
    done: dict[tuple[int, int], Figures] = {}
    for width, length in dict.fromkeys((width, length) for _, width, length in cases):
        size = options.tokens // length
        rows = full_pairs(pairs, tokenizer, length, size * (WARMUP + options.steps))
        changes = {"width": width, "max_length": length, "budget": options.tokens, "global_batch_size": size}
        setting = argparse.Namespace(**(vars(options) | SETTING | changes))
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            tokenizer.save_pretrained(work / "base")
            training.make_model(work, training.small_config(tokenizer, setting, options.vocab), torch.float32)
            made = training.make_rows(work, setting, tokenizer, rows)
            steps = measured_steps(launch(work, 1))
        flops = flops_of_token(options, width, length, made["trained_share"])
        seconds = statistics.median(step["seconds"] / step["num_tokens"] for step in steps)
        done[width, length] = {"flops_per_token": flops, "seconds_per_token": seconds, "steps": steps}
        say(f"width {width}, rows of {length}: {middle(steps)['seconds']:.2f} s a step")
    found = [{"by": by, "width": width, "length": length} | done[width, length] for by, width, length in cases]
    print(f"\n{table_of_growth(found)}", flush=True)
    return found


def flops_of_token(options: argparse.Namespace, width: int, length: int, trained_share: float) -> float:
    """Counted, forward and backward: no gradients of frozen weights; a token sees half of its row; the head's share."""
    inner = width * 11 // 4
    sizes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    frozen, lora = sum(a * b for a, b in sizes), sum(training.R * (a + b) for a, b in sizes)
    attention = 2 * 2 * width * length / 2 * 3  # two products, and both gradients of each
    return options.layers * (4.0 * frozen + 6.0 * lora + attention) + 4.0 * options.vocab * width * trained_share


def table_of_growth(found: list[Figures]) -> str:
    """Seconds of a step and of a token, and how much more than in the first line of its kind; 80 columns."""
    lines = []
    for by in dict.fromkeys(one["by"] for one in found):
        lines.append(f"{by:>7}{'s a step':>10}{'min - max':>15}{'tokens':>8}{'ms/token':>10}{'grows':>8}{'wanted':>10}")
        first, *_ = cases = [one for one in found if one["by"] == by]
        for one in cases:
            step, per_token = middle(one["steps"]), one["seconds_per_token"]
            line = f"{one[by]:>7,}{step['seconds']:>10.3f}{spread(one['steps']):>15}{step['num_tokens']:>8,}"
            line += f"{per_token * 1e3:>10.3f}{per_token / first['seconds_per_token']:>7.2f}x"
            wanted = f"<= {one['flops_per_token'] / first['flops_per_token']:.2f}x"
            lines.append(line if one is first else f"{line}{wanted:>10}")
    return "\n".join([*lines, "wanted: no faster than the counted operations of a token"])


# ---- rows, world ----


def lengths_of_rows(pairs: list[tuple[str, str]]) -> Lengths:
    """Tokens of the real rows; those are left out that the budget has no room for."""
    tokenizer = build_tokenizer(pairs, MAX_VOCAB_SIZE)
    messages = [json.loads(json_row(*pair))["messages"] for pair in pairs]
    found = np.array([len(tokenizer.apply_chat_template(one, return_dict=True)["input_ids"]) for one in messages])
    return found[found <= BUDGET]


def measure_rows(options: argparse.Namespace, lengths: Lengths, step_seconds: float | None) -> list[Figures]:
    """Index work of a step and its memory, as Job.micro_batches does it; the permutation of an epoch for itself."""
    lines = [f"\n{'':9}{'every step':>25}{'once an epoch':>33}"]
    lines += [f"{'rows':>9}{'ms':>8}{'KiB':>7}{'share':>8}{'wanted':>8}{'s':>11}{'MiB':>8}{'B/row':>7}{'ms/step':>9}"]
    found: list[Figures] = []
    for num_rows in options.num_rows:
        drawn = np.random.default_rng(0).choice(lengths, num_rows)

        def lay_out(step: int, drawn: Lengths = drawn) -> None:
            ids = batching.step_samples(step, len(drawn), INDEX_BATCH, len(drawn), seed=0)
            batching.lay_out(ids, drawn[ids].tolist(), BUDGET, INDEX_RANKS)

        batching.epoch_order.cache_clear()
        order_seconds, order_bytes = cost(batching.epoch_order, num_rows, 0, 0)
        steps = range(min(INDEX_STEPS, num_rows // INDEX_BATCH))
        seconds = statistics.median(cost(lay_out, step, is_traced=False)[0] for step in steps)
        step_bytes = max(cost(lay_out, step)[1] for step in steps)
        each_seconds = order_seconds * INDEX_BATCH / num_rows  # of the permutation, spread over the steps
        one = {"rows": num_rows, "step_seconds": seconds, "amortised_seconds": seconds + each_seconds}
        one |= {"step_bytes": step_bytes, "permutation_seconds": order_seconds}
        found.append(one | {"permutation_bytes": order_bytes})
        share = f"{(seconds + each_seconds) / step_seconds:.3%}" if step_seconds else "-"
        line = f"{num_rows:>9,}{seconds * 1e3:>8.3f}{step_bytes / 2**10:>7.1f}{share:>8}{f'< {MAX_INDEX_SHARE:.0%}':>8}"
        line += f"{order_seconds:>11.3f}{order_bytes / 2**20:>8.1f}{order_bytes / num_rows:>7.1f}"
        lines.append(f"{line}{each_seconds * 1e3:>9.3f}")
    of = f"the step of one rank above ({step_seconds:.2f} s)" if step_seconds else "a step; --parts steps measures one"
    growth = max(one["step_bytes"] for one in found) / found[0]["step_bytes"]
    print("\n".join([*lines, f"share: ms and ms/step of {of}\nKiB grow to {growth:.2f}x (wanted: 1.00x)"]), flush=True)
    return found


def cost(work: Callable[..., Any], *arguments: Any, is_traced: bool = True) -> tuple[float, int]:
    """(seconds, the peak of what Python and numpy allocate meanwhile); where that is traced, Python is slower."""
    if is_traced:
        tracemalloc.start()
    start = time.perf_counter()
    kept = work(*arguments)
    seconds, peak_bytes = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    del kept
    tracemalloc.stop()
    return seconds, peak_bytes


def measure_world(options: argparse.Namespace, lengths: Lengths) -> list[Figures]:
    """By how much the tokens of a step's fullest rank are above the mean, and how long laying it out takes."""
    lines = ["", f"{'ranks':>6}{'samples':>9}{'tokens each':>13}{'s':>8}{'imbalance':>12}{'worst':>8}{'wanted':>8}"]
    found: list[Figures] = []
    for num_ranks in options.world:
        size, steps = num_ranks * WORLD_BATCH, []
        drawn = np.random.default_rng(0).choice(lengths, WORLD_STEPS * size)
        for step in range(WORLD_STEPS):
            ids = batching.step_samples(step, len(drawn), size, len(drawn), seed=0)
            start = time.perf_counter()
            ranks = batching.lay_out(ids, drawn[ids].tolist(), BUDGET, num_ranks)
            seconds = time.perf_counter() - start
            tokens = [sum(int(drawn[micro_batch].sum()) for micro_batch in rank) for rank in ranks]
            mean = statistics.mean(tokens)
            steps.append({"seconds": seconds, "tokens_per_rank": mean, "imbalance": max(tokens) / mean - 1})
        means = {key: statistics.mean(one[key] for one in steps) for key in steps[0]}
        worst = max(one["imbalance"] for one in steps)
        lines.append(
            f"{num_ranks:>6,}{size:>9,}{means['tokens_per_rank']:>13,.0f}{means['seconds']:>8.3f}"
            f"{means['imbalance']:>12.2%}{worst:>8.2%}{f'< {MAX_IMBALANCE:.0%}':>8}"
        )
        found.append({"ranks": num_ranks, "steps": steps})
    print("\n".join(lines))
    return found


# ---- the whole ----


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["steps", "growth", "rows", "world"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--source", type=Path, default=ROOT.parent / "shared/data", help=f"holds {' and '.join(FILES)}")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="of steps")
    parser.add_argument("--global-batch-size", type=int, default=32, help="rows of a step, of steps")
    parser.add_argument("--budget", type=int, default=1024, help="tokens of a micro-batch, of steps; at least 512")
    parser.add_argument("--steps", type=int, default=3, help="that are measured, of steps and growth")
    parser.add_argument("--vocab", type=int, default=8000, help="of steps and growth")
    parser.add_argument("--layers", type=int, default=4, help="of steps and growth")
    parser.add_argument("--width", type=int, default=256, help="of steps, and of growth by length; a multiple of 64")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="of growth")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens of a row, of growth")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step, which is one micro-batch, of growth")
    parser.add_argument("--num-rows", type=int, nargs="+", default=[50_000, 500_000, 5_000_000], help="of rows")
    parser.add_argument("--world", type=int, nargs="+", default=[8, 64, 256, 1024], help="ranks, of world")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    training.refuse_missing_rows(options.source)
    engines.quiet_libraries()
    about, pairs = machine(), questions_and_answers(options.source)
    print(f"{about['cpu']}, {CORES} cores, {about['platform']}; a rank has one thread", flush=True)
    result: Figures = {"machine": about, "versions": versions(), "options": vars(options)}
    try:
        if "steps" in options.parts:
            result["steps"] = measure_steps(options, pairs)
        if "growth" in options.parts:
            result["growth"] = measure_growth(options, pairs)
    except LaunchFailedError as error:
        sys.exit(str(error))
    lengths = lengths_of_rows(pairs) if {"rows", "world"} & set(options.parts) else np.array([], np.int64)
    if "rows" in options.parts:
        of_one_rank = [middle(one["steps"])["seconds"] for one in result.get("steps", []) if one["ranks"] == 1]
        result["rows"] = measure_rows(options, lengths, of_one_rank[0] if of_one_rank else None)
    if "world" in options.parts:
        result["world"] = measure_world(options, lengths)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(as_rank(Path(sys.argv[2])) if sys.argv[1:2] == ["--as-rank"] else main())
