"""The largest micro-batches of a run: which they are, and that a run which has tried them is none the other for it."""

import ctypes
import gc
import json
import math
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World, deepspeed_json, run_ranks, start_ranks
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from launch import batching, job, runs, worst_case
from launch.checkpoint import path_of_step

SETTINGS = {"max_steps": 3, "save_steps": 3, "eval_steps": 2, "max_tokens_per_micro_batch": 132, "weight_decay": 0.1}


# ---- which they are ----


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=80),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(100, 300),
    st.booleans(),
)
def test_no_micro_batch_of_a_short_run_is_larger(
    sizes: list[tuple[int, int]], batch: int, num_ranks: int, budget: int, padded: bool
) -> None:
    """All steps of such a run are laid out."""
    lengths = np.array([length for length, _ in sizes])
    num_trained = np.minimum([trained for _, trained in sizes], lengths)
    total = math.ceil(2.5 * len(sizes))
    every = []
    for step in range(min(math.ceil(total / batch), 32)):
        ids = batching.step_samples(step, len(sizes), batch, total, seed=1)
        ranks = batching.lay_out(ids, lengths[ids].tolist(), budget, num_ranks, padded=padded)
        every += [micro_batch for rank in ranks for micro_batch in rank if micro_batch]

    def cells(ids: list[int]) -> int:
        return int(lengths[ids].max()) * len(ids) if padded else int(lengths[ids].sum())

    def trained(ids: list[int]) -> int:
        return int(num_trained[ids].sum())

    most_trained, most_tokens = batching.largest_micro_batches(
        lengths,
        num_trained,
        global_batch_size=batch,
        total_samples=total,
        seed=1,
        max_tokens=budget,
        num_ranks=num_ranks,
        padded=padded,
    )
    assert (trained(most_trained), cells(most_trained)) >= max((trained(ids), cells(ids)) for ids in every)
    assert (cells(most_tokens), trained(most_tokens)) >= max((cells(ids), trained(ids)) for ids in every)
    assert cells(most_tokens) <= budget


def test_of_a_long_run_it_is_found_soon() -> None:
    """The largest of 500,000 rows and three epochs stands in one step of 47,000."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 200, 500_000)
    num_trained = lengths // 2
    lengths[123_456], num_trained[123_456] = 2048, 2000
    start = time.process_time()
    found = batching.largest_micro_batches(
        lengths,
        num_trained,
        global_batch_size=32,
        total_samples=1_500_000,
        seed=0,
        max_tokens=2048,
        num_ranks=4,
        padded=False,
    )
    assert time.process_time() - start < 1
    assert found == ([123_456], [123_456])


# ---- that nothing is left of them ----


def trained_with(rehearses: bool, fp16: bool, is_nan: bool, arguments: list[str]) -> tuple[int, list[int]]:
    """train.py's main, with or without; the tokens of what was tried, in which each loss may be not a number."""
    tried: list[int] = []
    real_rehearse, real_loss = worst_case.rehearse, job.batch_loss

    def rehearse(running: job.Job, largest: worst_case.Largest) -> None:
        def loss(model: Any, batch: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            tried.append(batch.input_ids.numel())
            loss_sum, sums = real_loss(model, batch, **named)
            if len(tried) in (3, 4) and model.zero_optimization_stage() == 3:
                coordinator = model.optimizer.parameter_offload.get_param_coordinator()
                assert coordinator.is_complete_trace(), "it fetches ahead, which takes memory as well"
            return loss_sum * math.nan if is_nan else loss_sum, sums

        job.batch_loss = loss
        real_rehearse(running, largest)
        job.batch_loss = real_loss

    train.worst_case.rehearse = rehearse if rehearses else lambda running, largest: None
    if fp16:
        CPU_Accelerator.is_fp16_supported = lambda self: True
    return train.main(arguments), tried


P_TUNING = {"type": "p_tuning", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM"}
WAYS = {
    "zero3 offload": (3, True, "fp32", {}, False),
    "zero3 fp16": (3, False, "fp16", {}, False),
    "one rank": (3, False, "fp16", {}, False),
    "zero3 p-tuning": (3, False, "fp32", {"adapter": P_TUNING}, False),
    "zero3 not a number": (3, True, "fp32", {}, True),
    "zero2 offload fp16": (2, True, "fp16", {}, False),
    "zero2 offload not a number": (2, True, "fp16", {}, True),
    "zero2 loraplus": (2, False, "fp32", {"train": {"loraplus_lr_ratio": 4.0}}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_bitwise_that_without(world: World, way: str) -> None:
    """With dropout, gradient checkpointing, and under fp16 a scale that overflows at first."""
    stage, offload, precision, blocks, is_nan = WAYS[way]
    path = deepspeed_json(world.directory, stage, initial_scale_power=18, hysteresis=2, loss_scale_window=3)
    if not offload:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for name in ("offload_param", "offload_optimizer"):
            tree["zero_optimization"].pop(name, None)
        path = world.directory / f"no-offload-{stage}.json"
        path.write_text(json.dumps(tree), encoding="utf-8")
    of_train = SETTINGS | {"precision": precision, "gradient_checkpointing": True} | blocks.get("train", {})
    adapter = blocks.get("adapter", {"lora_dropout": 0.2})
    found = []
    for rehearses in (True, False):
        name = f"{way}-{rehearses}".replace(" ", "-")
        recipe = world.recipe(name, train=of_train, adapter=adapter)
        num_ranks = 1 if way == "one rank" else 2
        ends = run_ranks(num_ranks, trained_with, rehearses, precision == "fp16", is_nan, [str(recipe)], deepspeed=path)
        assert [exit_code for exit_code, _ in ends] == [0] * num_ranks
        assert (len(ends[0][1]), ends[0][1]) == (5 if rehearses else 0, ends[-1][1]), "all ranks try the same"
        checkpoint = path_of_step(world.run_directory(name), 3)
        curve = [(record["step"], record["loss"], record["gradient_norm"]) for record in world.metrics(name, "train")]
        evaluated = [(record["step"], record["loss"]) for record in world.metrics(name, "evaluation")]
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        told = {key: state[key] for key in ("adam_step", "scaler", "skipped_steps")}
        found.append((load_file(checkpoint / "optimizer.safetensors"), curve, evaluated, told))
    (tensors, *others), (expected, *their_others) = found
    assert others == their_others
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


# ---- and when they do not fit ----


@pytest.fixture(scope="module")
def long_rows(world: World) -> Path:
    rows = [{"input": "stone", "output": " ".join(["cairn"] * 900)}] * 40
    path = world.directory / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained_in_little(limited_rank: int, place: str, arguments: list[str]) -> int:
    """train.py's main; from then on this rank gets no more than 20 MB of addresses than it has.

    It finds none that other tests or the trial left: tensors get addresses of their own (M_MMAP_THRESHOLD of
    mallopt(3)), and what nobody holds any more has gone before.
    """
    assert ctypes.CDLL(None).mallopt(-3, 1 << 16) == 1
    module = worst_case if hasattr(worst_case, place) else train
    real = getattr(module, place)

    def limited(*given: Any) -> Any:
        if os.environ["RANK"] == str(limited_rank):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + 20_000_000, resource.RLIM_INFINITY))
        return real(*given)

    setattr(module, place, limited)
    return train.main(arguments)


LITTLE: dict[str, dict[str, Any]] = {
    "data": {"max_length": 1024, "test_size": 2},
    "train": {"max_steps": 3, "max_tokens_per_micro_batch": 16_384, "global_batch_size": 36},
}


@pytest.mark.parametrize(
    ("limited_rank", "place", "where"),
    [
        (0, "rehearse", "in a trial of the largest micro-batches"),
        pytest.param(1, "rehearse", "in a trial of the largest micro-batches", marks=pytest.mark.slow),
        pytest.param(1, "evaluate_if_due", "in a micro-batch", marks=pytest.mark.slow),
    ],
)
def test_a_rank_without_memory_ends_the_run_with_what_to_lower(
    world: World, long_rows: Path, capfd: pytest.CaptureFixture[str], limited_rank: int, place: str, where: str
) -> None:
    recipe = world.recipe(
        f"little-{limited_rank}-{place}", **LITTLE | {"data": LITTLE["data"] | {"train": str(long_rows)}}
    )
    start = time.monotonic()
    children = start_ranks(limited_rank + 1, trained_in_little, limited_rank, place, [str(recipe)])
    for _, receiver in children:
        assert receiver.poll(100), "a rank hangs"
    assert time.monotonic() - start < 60
    result = children[limited_rank][1].recv()
    assert result == (True, 1), result[1]
    said = capfd.readouterr().err
    status = runs.read_status(world.run_directory(recipe.stem))
    assert status["state"] == "failed" and "may_go_on" not in status
    assert f"No memory was left {where}, of at most" in status["reason"]
    assert "activations" in status["reason"] and "train.max_tokens_per_micro_batch=" in status["reason"]
    assert status["reason"].removeprefix("rank 1: ") in said


@pytest.mark.slow
def test_a_base_that_does_not_fit_is_one_sentence(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On the second of two ranks under ZeRO-2, where each has the whole: 67 MB of it, and 40 MB are left."""
    shutil.copytree(world.base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = Qwen2Config.from_pretrained(str(tmp_path / "base"), intermediate_size=87_000)
    Qwen2ForCausalLM(config).save_pretrained(str(tmp_path / "base"))
    recipe = world.recipe("large", model={"name_or_path": str(tmp_path / "base")})
    children = start_ranks(
        2, trained_in_little, 1, "adapted_base", [str(recipe)], deepspeed=deepspeed_json(tmp_path, 2)
    )
    (first, _), (_, second) = children
    assert second.poll(100), "the rank hangs"
    assert second.recv() == (True, 1)
    first.kill()  # as the launcher does: it waits in the store, where DeepSpeed makes its groups
    reason = runs.read_status(world.run_directory("large"))["reason"]
    assert reason.startswith("rank 1: No memory was left while base and engine were made; this rank had "), reason
    assert "python -m launch plan RECIPE" in capfd.readouterr().err


def test_who_is_asked_to_end_since_another_rank_failed_does_not_say_that_it_was_preempted(tmp_path: Path) -> None:
    """The launcher asks the others to end when one has; before the first step they do so at once."""
    runs.begin(tmp_path, 0, "recipe")
    runs.write_failure(tmp_path, "No memory was left.")
    runs.leave(tmp_path, "preempted", "asked to stop")
    assert runs.read_status(tmp_path)["state"] == "failed"
    runs.begin(tmp_path, 0, "recipe")
    runs.leave(tmp_path, "preempted", "asked to stop")
    assert runs.read_status(tmp_path)["state"] == "preempted"


def asked_to_stop(arguments: list[str]) -> int:
    """train.py's main; SIGTERM comes in the trial."""

    def loss(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    job.batch_loss = loss
    return train.main(arguments)


@pytest.mark.slow
def test_a_stop_in_the_trial_ends_it_at_once(world: World) -> None:
    recipe = world.recipe("asked")
    ((child, _),) = start_ranks(1, asked_to_stop, [str(recipe)])
    child.join(50)
    assert child.exitcode == 128 + signal.SIGTERM
    status = runs.read_status(world.run_directory("asked"))
    assert (status["state"], status["reason"]) == (
        "preempted",
        "asked to stop before the first step; there was nothing to save yet",
    )
