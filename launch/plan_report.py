"""A plan for people and for programs: the recommendation and its commands, the terms, every layout in one table."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from launch import speed
from launch.config import dump_recipe
from launch.errors import ConfigError
from launch.plan import LARGEST_BUDGET_TOKENS, RESERVED_SHARE, Case, Choice, read_sharding, way_of
from launch.recipe import Recipe
from launch.runs import write_text
from launch.table import format_bytes, format_table

NOT_MEASURED = "not measured"


def plan_lines(case: Case, found: Sequence[Choice], chosen: Choice | None, arguments: Sequence[str]) -> str:
    """All of it; `arguments` are the recipe and the overrides as they were given."""
    lines = [*_recommendation(case, found, chosen, arguments), "", format_table(_case_rows(case))]
    if chosen is not None:
        lines += ["", *_terms(case, chosen)]
    return "\n".join([*lines, "", *_table(case, found, chosen)])


def plan_json(case: Case, found: Sequence[Choice], chosen: Choice | None, arguments: Sequence[str]) -> str:
    """The same for programs; seconds are best and worst, and none of them is measured."""
    tree = {
        "recommended": None if chosen is None else found.index(chosen),
        "command": None if chosen is None else command(case, chosen, arguments),
        "hardware": asdict(case.hardware),
        "precision": case.precision,
        "packed": case.packed,
        "num_parameters": case.base.num_parameters,
        "choices": [asdict(one) for one in found],
    }
    return json.dumps(tree, indent=1)


def command(case: Case, chosen: Choice, arguments: Sequence[str], accelerate_file: Path | None = None) -> str:
    """What starts the run as planned; on several nodes, what each of them is to run."""
    hardware = case.hardware
    words = ["accelerate", "launch", "--config_file", str(accelerate_file or chosen.accelerate_file)]
    if accelerate_file is None:
        words += ["--num_processes", str(hardware.num_ranks)]
    if hardware.num_nodes > 1:
        words += ["--num_machines", str(hardware.num_nodes), "--machine_rank", "RANK"]
        words += ["--main_process_ip", "ADDRESS", "--main_process_port", "29500"]
        words += ["--deepspeed_multinode_launcher", "standard"]  # each node starts its own, as Slurm does
    given = [word for word in arguments if word.partition("=")[0] not in changes(case.recipe, chosen)]
    changed = [f"{key}={str(value).lower()}" for key, value in changes(case.recipe, chosen).items()]
    return shlex.join([*words, "train.py", *given, *([] if accelerate_file else changed)])


def changes(recipe: Recipe, chosen: Choice) -> dict[str, int | bool]:
    """The values of the recipe that the choice has otherwise."""
    wanted: dict[str, tuple[int | bool, int | bool]] = {
        "model.load_in_4bit": (recipe.model.load_in_4bit, chosen.load_in_4bit),
        "train.gradient_checkpointing": (recipe.train.gradient_checkpointing, chosen.gradient_checkpointing),
        "train.max_tokens_per_micro_batch": (recipe.train.max_tokens_per_micro_batch, chosen.budget_tokens),
    }
    return {key: after for key, (before, after) in wanted.items() if before != after}


def write_plan(case: Case, chosen: Choice, directory: Path) -> str:
    """accelerate.yaml and recipe.yaml as planned, into a directory that has neither; what starts them.

    Raises ConfigError when one of them is there.
    """
    accelerate_file, recipe_file = directory / "accelerate.yaml", directory / "recipe.yaml"
    for path in (accelerate_file, recipe_file):
        if path.exists():
            raise ConfigError(f"--write: {path} is there, and nothing is written over; name another directory.")
    settings = yaml.safe_load(chosen.accelerate_file.read_text(encoding="utf-8"))
    settings |= {"num_processes": case.hardware.num_ranks, "num_machines": case.hardware.num_nodes}
    tree = case.recipe.model_dump(mode="json")
    for key, value in changes(case.recipe, chosen).items():
        block, _, name = key.partition(".")
        tree[block][name] = value
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(accelerate_file, yaml.safe_dump(settings, sort_keys=False))
        write_text(recipe_file, dump_recipe(Recipe.model_validate_json(json.dumps(tree))))
    except OSError as error:
        raise ConfigError(f"--write: {directory} cannot be written: {error.strerror or error}.") from None
    return command(case, chosen, [str(recipe_file)], accelerate_file)


def layout_name(one: Choice) -> str:
    """The layout and how its layers run, for a sentence."""
    again = "with" if one.gradient_checkpointing else "without"
    return f"{one.layout} {'in 4 bits ' if one.load_in_4bit else ''}{again} gradient checkpointing"


# ---- the parts of the text ----


def _recommendation(case: Case, found: Sequence[Choice], chosen: Choice | None, arguments: Sequence[str]) -> list[str]:
    if chosen is None:
        return [format_table([("nothing fits", _nearest(case, found))])]
    room = "the least that fits" if chosen.is_tight else f"leaves {RESERVED_SHARE:.0%} of the GPU free"
    why = "the only one that fits" if len(_fitting(found)) == 1 else f"the fastest by the figures below that {room}"
    rows = [
        ("recommended", f"{layout_name(chosen)}, {chosen.budget_tokens:,} tokens a micro-batch"),
        ("because", f"{why}; {_beside(case, found, chosen)}"),
    ]
    if chosen.load_in_4bit != case.recipe.model.load_in_4bit:
        rows.append(("but", "the base is then in another type than the recipe says, which changes the results"))
    start = command(case, chosen, arguments).replace(" train.py", " \\\n    train.py")
    return [format_table(rows), "", f"  {start}"]


def _nearest(case: Case, found: Sequence[Choice]) -> str:
    """The layout that lacks least, and what helps."""
    hardware, longest = case.hardware, case.longest_tokens
    short_of_host = [one for one in found if one.obstacle == "host memory"]
    if short_of_host:
        one = min(short_of_host, key=lambda one: one.demand.host_bytes)
        return (
            f"{layout_name(one)} would, but takes {format_bytes(one.demand.host_bytes)} of a node's memory, which has "
            f"{format_bytes(hardware.host_memory_bytes or 0)}; ask for more of it"
        )
    one, has = min(found, key=lambda one: one.demand.gpu_bytes), format_bytes(hardware.gpu.memory_bytes)
    return (
        f"{layout_name(one)} lacks least: it takes {format_bytes(one.demand.gpu_bytes)} of a GPU for a sample of "
        f"{longest:,} tokens, which has {has}; lower data.max_length, or take more GPUs"
    )


def _beside(case: Case, found: Sequence[Choice], chosen: Choice) -> str:
    """What keeping the whole model, or offloading all of it, would mean."""
    alike = [one for one in found if one.load_in_4bit == chosen.load_in_4bit]
    replicated = [one for one in alike if one.layout.startswith("zero2")]
    said = []
    if read_sharding(chosen.layout).stage == 3:
        if all(one.obstacle for one in replicated):
            said.append("the whole model on each GPU (ZeRO-2) does not fit")
        elif all(one.obstacle or one.is_tight for one in replicated):
            said.append("the whole model on each GPU (ZeRO-2) leaves less than that")
    if not read_sharding(chosen.layout).offload_param:
        times = [_times_slower(case, chosen, tokens) for tokens in (chosen.budget_tokens, case.longest_tokens)]
        least, most = min(times), max(times)
        said.append(
            f"zero3, which offloads the weights, would take {_range(least, most)} times as long ({NOT_MEASURED})"
        )
    return "; ".join(said) or "without offload nothing fits"


def _times_slower(case: Case, chosen: Choice, tokens: int) -> float:
    """zero3, which offloads everything, over the chosen layout, both with this budget and in the worst case."""
    model = case.model(chosen.load_in_4bit)
    seconds = []
    for layout in ("zero3", chosen.layout):
        sharding = read_sharding(layout)
        way = way_of(case, sharding, chosen.load_in_4bit, chosen.gradient_checkpointing)
        work = speed.work_of(model, sharding, case.hardware.num_ranks, case.micro_batch(tokens), way)
        seconds.append(speed.seconds_of_step(work, case.hardware, 1).worst)
    return seconds[0] / seconds[1]


def _case_rows(case: Case) -> list[tuple[str, str]]:
    hardware, model = case.hardware, case.model(case.recipe.model.load_in_4bit)
    memory = hardware.host_memory_bytes
    nodes = "" if hardware.num_nodes == 1 else f" on each of {hardware.num_nodes} nodes"
    host = "not known" if memory is None else format_bytes(memory)
    share = "every token" if case.trained_share == 1 else f"{case.trained_share:.0%} of the tokens"
    how = "packed" if case.packed else "padded"
    guess = "" if case.base.is_known else "; its layers are not known to plan, so activations are a guess"
    base = case.base
    return [
        ("base", f"{base.family}, {base.num_parameters:,} parameters in {base.num_layers} layers{guess}"),
        ("trained", f"{model.num_trained:,} parameters ({case.recipe.adapter.type})"),
        (
            "hardware",
            f"{hardware.gpus_per_node} x {hardware.gpu.name} ({format_bytes(hardware.gpu.memory_bytes)}){nodes}, "
            f"joined by {hardware.interconnect}; memory of a node {host}",
        ),
        ("precision", case.precision),
        ("samples", f"up to {case.longest_tokens:,} tokens, {how}, {share} trained"),
    ]


def _terms(case: Case, chosen: Choice) -> list[str]:
    """The demand of the chosen layout, and its work."""
    demand, work, seconds = chosen.demand, chosen.work, chosen.seconds
    step = f"{chosen.num_micro_batches} micro-batches a rank, {_range(seconds.best, seconds.worst)} s"
    rows = [
        ("network", f"{format_bytes(work.network_bytes)} received by a GPU in a micro-batch"),
        ("PCIe", f"{format_bytes(work.pcie_bytes)} a micro-batch, {format_bytes(work.step_pcie_bytes)} a step"),
        ("compute", f"{work.flops / 1e12:,.3g} TFLOP a micro-batch"),
        ("a step", f"{step} ({NOT_MEASURED}), bound by {seconds.bound}"),
    ]
    return [
        f"  {'one GPU':<22}{format_bytes(demand.gpu_bytes):>10}",
        *_sums(demand.gpu),
        f"  {'memory of a node':<22}{format_bytes(demand.host_bytes):>10}",
        *_sums(demand.host),
        f"  {'disk':<22}{format_bytes(sum(demand.disk.values())):>10}",
        *_sums(demand.disk),
        "",
        format_table(rows),
    ]


def _sums(terms: Mapping[str, int]) -> list[str]:
    assumed = ("CUDA and NCCL", "fragmentation", "processes")
    return [
        f"    {name:<20}{format_bytes(count):>10}" + ("  assumed" if name in assumed else "")
        for name, count in terms.items()
    ]


def _table(case: Case, found: Sequence[Choice], chosen: Choice | None) -> list[str]:
    settings = case.recipe.train
    lines = [
        f"All layouts; seconds of a step of {settings.global_batch_size} samples of {case.longest_tokens:,} tokens, "
        f"{NOT_MEASURED}.",
        "",
        f"  {'layout':<24}{'bits':<5}{'again':<5}{'most':>7}{'tokens':>7}{'GPU':>9}{'node':>9}  seconds",
    ]
    for one in found:
        mark = "> " if one is chosen else "  "
        bits = 4 if one.load_in_4bit else 8 * case.value_bytes
        most = "more" if one.largest_budget_tokens >= LARGEST_BUDGET_TOKENS else f"{one.largest_budget_tokens:,}"
        start = f"{mark}{one.layout:<24}{bits:<5}{'yes' if one.gradient_checkpointing else 'no':<5}"
        sizes = f"{format_bytes(one.demand.gpu_bytes):>9}{format_bytes(one.demand.host_bytes):>9}"
        end = one.obstacle or _range(one.seconds.best, one.seconds.worst)
        lines.append(f"{start}{most:>7}{one.budget_tokens:>7,}{sizes}  {end}")
    return [*lines, "", *_legend()]


def _legend() -> list[str]:
    return [
        "  again: the backward pass computes the layers' activations again (gradient",
        "  checkpointing). most: the largest budget that fits, in tokens; 0 where not",
        "  even the longest sample does. tokens: the budget that GPU and seconds are of.",
    ]


def _fitting(found: Sequence[Choice]) -> list[Choice]:
    return [one for one in found if not one.obstacle]


def _range(low: float, high: float) -> str:
    """Two digits are more than is known."""
    first, second = f"{low:.2g}", f"{high:.2g}"
    return first if first == second else f"{first}-{second}"
