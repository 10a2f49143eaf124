"""What a start says about its memory: the plan's terms for its layout, what does not fit, how right that was."""

import ctypes
import json
from pathlib import Path

import pytest
from conftest import ROOT, World, deepspeed_json, launch, run_ranks
from test_plan import CONFIG_14B, QWEN_14B
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast

import train
from launch.config import load_recipe
from launch.forecast import findings, forecast, hardware_of_run, plan_line, what_plan_chooses
from launch.hardware import GPUS
from launch.plan import Case, choose, find_base, read_sharding

V100 = ("Tesla V100-SXM2-32GB", GPUS["v100-32gb"].memory_bytes)
HOST_BYTES = 380_000_000_000


def case_of_14b(gpu: tuple[str, int] = V100, *overrides: str) -> Case:
    recipe = load_recipe(ROOT / QWEN_14B, overrides)
    hardware = hardware_of_run(gpu, 4, 4, HOST_BYTES)
    return Case(recipe, find_base(recipe, CONFIG_14B), hardware, "fp16", True, 1.0)


@pytest.mark.parametrize("layout", ["zero3", "zero3_no_offload", "zero2_no_offload"])
def test_a_start_is_forecast_as_it_is_planned(layout: str) -> None:
    case, sharding = case_of_14b(), read_sharding(layout)
    checkpointing = case.recipe.train.gradient_checkpointing
    planned = choose(case, case.model(False), layout, gradient_checkpointing=checkpointing)
    expected = forecast(case, sharding, case.micro_batch(planned.budget_tokens), None)
    assert expected.terms == planned.demand.gpu
    assert expected.counted_bytes == expected.total_bytes - 1_000_000_000 - V100[1] // 20


def test_what_does_not_fit_is_said_and_stops_only_where_it_must() -> None:
    """28 GB of weights leave 6 GB of a V100; 40,000 tokens fit no GPU, but a run may have none as long."""
    case = case_of_14b()
    for layout, tokens, stops in (("zero3_no_offload", 7360, None), ("zero3_no_offload", 40_000, False)):
        sharding = read_sharding(layout)
        expected = forecast(case, sharding, case.micro_batch(tokens), None)
        found = list(findings(case, sharding, expected, what_plan_chooses(case), HOST_BYTES))
        assert [finding.stops for finding in found] == ([] if stops is None else [stops])
    assert "of a GPU by the plan's formulas, which has 34.1 GB; plan would choose zero3_no_offload" in found[0].sentence

    small = case_of_14b(("Tesla V100-PCIE-16GB", GPUS["v100-16gb"].memory_bytes))
    sharding = read_sharding("zero2_no_offload")
    expected = forecast(small, sharding, small.micro_batch(512), None)
    (found_whole,) = findings(small, sharding, expected, None, HOST_BYTES)
    assert found_whole.stops and found_whole.sentence.startswith("Here weights, adapter, gradients and optimizer take ")


def test_a_node_without_the_memory_is_said() -> None:
    case, sharding = case_of_14b(), read_sharding("zero3")
    expected = forecast(case, sharding, case.micro_batch(1024), None)
    (found,) = findings(case, sharding, expected, None, 20_000_000_000)
    assert not found.stops and "and 20 GB are left here; ask Slurm for more (--mem)" in found.sentence


def test_the_plan_is_compared_with_the_layout_that_runs() -> None:
    case = case_of_14b(V100, "train.max_tokens_per_micro_batch=7360", "train.gradient_checkpointing=true")
    chosen = what_plan_chooses(case)
    assert plan_line(case, read_sharding("zero3_no_offload"), chosen) == "chooses this, too"
    said = plan_line(case, read_sharding("zero3"), chosen)
    assert said.startswith("would choose zero3_no_offload with gradient checkpointing, 7,360 tokens a micro-batch; see")
    unknown = case_of_14b(("A GPU of tomorrow", 10**11))
    assert what_plan_chooses(unknown) is None and plan_line(unknown, read_sharding("zero3"), None) == ""


def test_a_run_compares_its_peak_with_the_forecast(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """On a CPU with what its process had before; metrics.jsonl keeps the error, and the tiny model's is not large."""
    launch(world.recipe("peak"), 2)
    (record,) = world.metrics("peak", "memory")
    said = capfd.readouterr().out
    assert "  memory        " in said and "a rank by the plan's formulas: Python and libraries" in said
    assert abs(record["forecast_error"]) < 0.25, record
    assert record["forecast_error"] == pytest.approx(record["forecast_bytes"] / record["peak_bytes"] - 1)
    assert "\nmemory  " in said and "than it was" in said


def trained_without_a_heap(arguments: list[str]) -> int:
    """train.py's main; what is freed goes back at once, as glibc, which keeps it, else makes it a third more.

    M_MMAP_THRESHOLD of mallopt(3).
    """
    assert ctypes.CDLL(None).mallopt(-3, 1 << 16) == 1
    return train.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_forecast_of_a_model_that_counts(world: World, tmp_path: Path, stage: int) -> None:
    """100 MB of weights and as much of activations on each rank: the forecast is within a fifth of the peak."""
    tokenizer = Qwen2TokenizerFast.from_pretrained(str(world.base))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(str(tmp_path / "base"))
    tokenizer.save_pretrained(str(tmp_path / "base"))
    name = f"peak-{stage}"
    recipe = world.recipe(name, model={"name_or_path": str(tmp_path / "base")}, train={"max_steps": 2})
    arguments = [str(recipe), "train.max_tokens_per_micro_batch=1024"]
    assert run_ranks(2, trained_without_a_heap, arguments, deepspeed=deepspeed_json(tmp_path, stage)) == [0, 0]
    (record,) = world.metrics(name, "memory")
    print(json.dumps(record))
    assert abs(record["forecast_error"]) < 0.2, record
