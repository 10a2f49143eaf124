"""The sentence about memory that did not suffice names the terms, and what it names does fit."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT
from test_plan import CONFIG_14B, case_of_14b, hardware

from launch.config import load_recipe
from launch.forecast import terms_of
from launch.hardware import GPUS
from launch.out_of_memory import Device, Tried, sentence, sentence_without_plan
from launch.plan import Case, find_base, read_sharding

GB = 10**9
NEARLY_FULL = Device(True, GPUS["v100-32gb"].memory_bytes, 200_000_000, 31 * GB)
SHORT = Device(True, GPUS["v100-32gb"].memory_bytes, 200_000_000, 12 * GB)


def tried(tokens: int, longest: int = 920) -> Tried:
    return Tried("in a trial", tokens, tokens, longest, longest)


def case(*overrides: str, gpus: int = 4) -> Case:
    return case_of_14b(hardware(gpus=gpus), *overrides)


def number_after(name: str, said: str) -> int:
    return int(said.split(f"{name}=")[1].split()[0].rstrip(",."))


def needed(one: Case, layout: str, tokens: int, longest: int = 920) -> int:
    batch = one.sizes(tokens, longest, tokens)
    return sum(terms_of(one, read_sharding(layout), batch, is_gpu=True).values())


def test_the_largest_budget_that_fits_is_named() -> None:
    one = case("train.max_tokens_per_micro_batch=65536")
    said = sentence(tried(40_000), NEARLY_FULL, one, read_sharding("zero3_no_offload"))
    assert said.startswith(
        "No GPU memory was left in a trial, of at most 40,000 tokens and 40,000 trained ones; this rank had 31 GB, and "
        "200 MB of 34.1 GB were free; by the plan that takes "
    )
    assert "(logits or backward 17.2 GB, activations 17.2 GB, weights 7.08 GB, " in said and "optimizer" not in said
    assert said.endswith(", the largest that fits by the plan.")
    budget = number_after("train.max_tokens_per_micro_batch", said)
    assert 920 <= budget < 40_000
    assert (
        needed(one, "zero3_no_offload", budget) <= NEARLY_FULL.total_bytes < needed(one, "zero3_no_offload", budget + 1)
    )


def test_where_no_budget_fits_activations_are_made_again() -> None:
    overrides = ("train.gradient_checkpointing=false", "data.max_length=4096", "train.max_tokens_per_micro_batch=4096")
    said = sentence(tried(4096, 4096), NEARLY_FULL, case(*overrides), read_sharding("zero3_no_offload"))
    assert said.endswith(": set train.gradient_checkpointing=true, for no budget fits without.")
    assert "(activations " in said
    assert needed(case(*overrides[1:]), "zero3_no_offload", 4096, 4096) <= NEARLY_FULL.total_bytes


def test_where_that_does_not_help_another_layout_is_named() -> None:
    """ZeRO-2 has all 28 GB on each GPU."""
    one = case("data.max_length=3680")
    said = sentence(tried(3680, 3680), NEARLY_FULL, one, read_sharding("zero2_no_offload"))
    assert ": start with --config_file configs/accelerate/zero3_no_offload.yaml" in said
    assert said.endswith(", for no budget fits this layout.") and "(weights 28.3 GB" in said


def test_where_nothing_fits_samples_must_be_shorter() -> None:
    one = case("data.max_length=60000", "train.max_tokens_per_micro_batch=60000")
    said = sentence(tried(60_000, 60_000), NEARLY_FULL, one, read_sharding("zero3"))
    length = number_after("data.max_length", said)
    assert said.endswith("for a sample of 60,000 tokens fits in no layout.") and 920 < length < 60_000
    fits, does_not = (needed(one, "zero3", tokens, tokens) for tokens in (length, length + 1))
    assert fits <= NEARLY_FULL.total_bytes < does_not


def test_what_should_fit_says_who_may_have_the_rest() -> None:
    said = sentence(tried(3680), SHORT, case(), read_sharding("zero3_no_offload"))
    assert "this rank had 12 GB, and 200 MB of 34.1 GB were free" in said
    assert said.endswith(
        ", which should have fitted: end other processes that use this GPU, or set "
        "train.max_tokens_per_micro_batch=2760, three quarters of it."
    )


@pytest.mark.parametrize(
    ("overrides", "tokens", "longest", "remedy"),
    [
        ([], 3680, 500, "set train.max_tokens_per_micro_batch=2760, three quarters of it"),
        (["train.max_tokens_per_micro_batch=1000"], 1000, 700, "=750 data.max_length=750, three quarters of it"),
        (["train.gradient_checkpointing=false"], 920, 920, "set train.gradient_checkpointing=true"),
        ([], 920, 920, "set data.max_length=690, three quarters of the longest sample's, or take a layout that shares"),
    ],
)
def test_without_a_plan_three_quarters_are_tried(overrides: list[str], tokens: int, longest: int, remedy: str) -> None:
    recipe = load_recipe(ROOT / "configs/recipes/qwen1.5-14b-lora.yaml", overrides)
    said = sentence_without_plan(tried(tokens, longest), NEARLY_FULL, recipe, "it does not know 'opt'.")
    assert remedy in said and said.endswith("(no plan can say more: it does not know 'opt').")


def test_the_host_counts_what_is_offloaded_to_it() -> None:
    one = replace(case(), base=find_base(case().recipe, CONFIG_14B))
    batch = one.sizes(920, 920, 920)
    on_gpu, on_host = (terms_of(one, read_sharding("zero3"), batch, is_gpu=is_gpu) for is_gpu in (True, False))
    assert (on_gpu["weights"], on_gpu["optimizer"]) == (0, 0)
    assert on_host["weights"] == pytest.approx(28.3e9 / 4, rel=0.01) and on_host["optimizer"] > 0
    assert "CUDA and NCCL" in on_gpu and "CUDA and NCCL" not in on_host
    assert json.dumps(on_host)
