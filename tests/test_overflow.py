"""Steps that overflow: which module is named, and that nothing else changes."""

import functools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, deepspeed_json, engine_of, run_ranks
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config

import train
from launch import engine as engines
from launch import overflow
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.overflow import Overflow

FP16 = {"max_steps": 4, "precision": "fp16", "save_steps": 100}
NO_EVALUATION = {"test_size": 0}
WIDE = "model.layers.1.mlp.down_proj"
FIRST_GRADIENT = "a gradient is not: from the loss back, first that of"


def trained(arguments: list[str], *, watches: bool = True) -> list[int]:
    """train.py's main in fp16 on a CPU; how many hooks the modules have in each step."""
    CPU_Accelerator.is_fp16_supported = lambda self: True
    overflow.SKIPS_BEFORE_A_LOOK = overflow.SKIPS_BEFORE_A_LOOK if watches else 10**9
    real_step, hooks = train.engines.step, []

    def counted_step(engine: Any, learning_rate: float) -> tuple[float, bool]:
        modules = list(engine.module.modules())
        hooks.append(sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules))
        hooks[-1] += sum(len(p._backward_hooks or ()) for p in engine.module.parameters())
        return real_step(engine, learning_rate)

    train.engines.step = counted_step
    assert train.main(arguments) == int("max_bad_steps" in str(arguments))
    return hooks


def scaled(world: World, tensor: str, factor: float) -> str:
    """A copy of the base with these weights so many times as large."""
    directory = world.directory / tensor
    if not directory.exists():
        shutil.copytree(world.base, directory)
        tensors = load_file(directory / "model.safetensors")
        tensors[tensor] *= factor
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "stage", "checkpointing"),
    [(1, 3, True), (1, 2, False), (2, 3, False), (2, 2, True)],
)
def test_the_first_module_whose_output_overflows_is_named(
    world: World, num_ranks: int, stage: int, checkpointing: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    base = {"name_or_path": scaled(world, f"{WIDE}.weight", 3e4)}
    settings = {**FP16, "gradient_checkpointing": checkpointing}
    recipe = world.recipe(f"wide-{num_ranks}-{stage}", model=base, data=NO_EVALUATION, train=settings)
    run_ranks(num_ranks, trained, [str(recipe)], deepspeed=deepspeed_json(world.directory, stage))
    (said,) = re.findall(r"Steps 1 to 3 were skipped: (.*)\.\n", capfd.readouterr().out)
    expected = rf"the output of {WIDE} \(Linear\) is infinite \(fp16 ends at 65,504\), and its largest input was (\S+)"
    assert (found := re.fullmatch(expected, said)), said
    assert 1 < float(found[1]) < 1000


def test_the_end_of_such_a_run_names_it_and_the_remedy(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    base = {"name_or_path": scaled(world, f"{WIDE}.weight", 3e4)}
    recipe = world.recipe("ends", model=base, data=NO_EVALUATION, train=FP16)
    run_ranks(1, trained, [str(recipe), "train.max_bad_steps=3"])
    log, said = capfd.readouterr()
    assert f"Steps 1 to 3 were skipped: the output of {WIDE} (Linear) is infinite" in log
    assert f"Failed: The last 3 steps were skipped, since the output of {WIDE} (Linear) is infinite" in said
    assert "start another run.name with train.precision=fp32" in said and "; there is no checkpoint." in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "stage", "checkpointing"),
    [
        (1, 2, False),
        (1, 3, True),
        (2, 3, False),
        (2, 2, True),
    ],
)
def test_gradients_that_overflow_are_named_and_a_good_step_takes_the_hooks_away(
    world: World, num_ranks: int, stage: int, checkpointing: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the weights are bitwise those of a run that has none."""
    config = deepspeed_json(world.directory, stage, initial_scale_power=21, hysteresis=1)
    settings = {**FP16, "max_steps": 9, "gradient_checkpointing": checkpointing}
    hooks, weights, names = [], [], [f"{word}-{num_ranks}-{stage}" for word in ("watched", "unwatched")]
    for name in names:
        recipe = world.recipe(name, data=NO_EVALUATION, train=settings)
        rank = functools.partial(trained, watches=name == names[0])
        hooks.append(run_ranks(num_ranks, rank, [str(recipe)], deepspeed=config)[-1])
        weights.append(load_file(path_of_step(world.run_directory(name), 9) / "optimizer.safetensors"))
    skipped = [record["skipped_steps"] for record in world.metrics(names[0], "train")]
    num_in_a_row = sum(count == step for step, count in enumerate(skipped, 1))  # of the first steps; more may follow
    assert 2 < num_in_a_row < 7
    has_more = [ours > theirs for ours, theirs in zip(*hooks, strict=True)]
    assert has_more == [2 <= step <= num_in_a_row for step in range(9)], hooks
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0].keys() | weights[1].keys())
    out = capfd.readouterr().out
    (said,) = re.findall(r"Steps 1 to 3 were skipped: (.*); the scale goes on down\.\n", out)
    first = r"a gradient is not: from the loss back, first that of (the output of )?model\.layers\.\S+( \(.*\))?"
    assert re.fullmatch(f"every output is finite, but at a loss scale of 524,288 {first}", said), said
    assert f"skipped {num_in_a_row}" in out


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_a_soft_prompt_has_the_names_of_the_base(world: World, adapter: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = {"name_or_path": scaled(world, f"{WIDE}.weight", 3e4)}
    soft = {"type": adapter, "num_virtual_tokens": 4}
    recipe = world.recipe(f"soft-{adapter}", model=model, adapter=soft, data=NO_EVALUATION, train=FP16)
    run_ranks(1, trained, [str(recipe)])
    assert f"Steps 1 to 3 were skipped: the output of {WIDE} (Linear) is infinite" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            Overflow(1, "the output of m (Linear)", math.inf, 61234.5, 2.0),
            "the output of m (Linear) is infinite (fp16 ends at 65,504), and its largest input was 61,234",
        ),
        (
            Overflow(1, "the output of m (Embedding)", math.nan, -1.0, None),
            "the output of m (Embedding) is not a number",
        ),
        (
            Overflow(1, "the output of m (Linear)", math.nan, math.inf, None),
            "the output of m (Linear) is not a number, and so was its input, which was computed between two modules",
        ),
        (Overflow(2, "m.weight", math.inf, -1.0, None), f"every output is finite, but {FIRST_GRADIENT} m.weight"),
        (
            Overflow(0, "", math.nan, -1.0, 1.0),
            "every output and gradient of each rank is finite at a loss scale of 1, but the sum of the gradients is "
            "not",
        ),
    ],
)
def test_what_was_found_is_a_sentence(found: Overflow, sentence: str) -> None:
    assert str(found) == sentence


# ---- what the libraries do in fp32 ----


def in_fp32(recipe_path: Path) -> dict[str, float]:
    """The largest differences of norms and of attention to what fp32 gives, over the largest value there is."""
    CPU_Accelerator.is_fp16_supported = lambda self: True
    recipe = load_recipe(recipe_path)
    engines.quiet_libraries()
    engine = engine_of(recipe, "fp16")
    base = engine.module.get_base_model()
    layer = base.model.layers[0]
    worst = dict.fromkeys(("norm", "attention"), 0.0)
    real_attention = functional.scaled_dot_product_attention

    def compare(part: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.dtype == torch.float16 and expected.dtype == torch.float32
        worst[part] = max(worst[part], float((found - expected).abs().max() / expected.abs().max()))

    def enlarge(module: torch.nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output / output.abs().amax(-1, keepdim=True) * torch.linspace(1e3, 6e4, output.shape[1])[:, None].half()

    def see_norm(module: torch.nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
        exact = given[0].float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        compare("norm", output, exact * module.weight.float())

    def see_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        query = 50 * query  # scores of hundreds, between which a softmax in fp16 could not tell
        output = real_attention(query, key, value, **named)
        mask = named.pop("attn_mask", None)
        exact = real_attention(query.float(), key.float(), value.float(), attn_mask=mask, **named)
        compare("attention", output, exact)
        return output

    base.get_input_embeddings().register_forward_hook(enlarge)
    layer.input_layernorm.register_forward_hook(see_norm)
    functional.scaled_dot_product_attention = see_attention
    logits = engine(input_ids=torch.arange(3, 40)[None], use_cache=False).logits
    assert torch.isfinite(logits).all() and logits.dtype == torch.float16
    return worst


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_norms_and_softmax_are_those_of_fp32(world: World, family: str) -> None:
    """Squares of what the norms get would be infinite in fp16; nothing of ours may change what the models do."""
    model = {}
    if family == "llama":
        tokenizer = AutoTokenizer.from_pretrained(world.base)
        config = {**Qwen2Config.from_pretrained(world.base).to_dict(), "architectures": None, "model_type": "llama"}
        LlamaForCausalLM(LlamaConfig.from_dict(config)).save_pretrained(world.directory / "llama")
        tokenizer.save_pretrained(world.directory / "llama")
        model = {"name_or_path": str(world.directory / "llama")}
    (worst,) = run_ranks(1, in_fp32, world.recipe(f"fp32-{family}", model=model))
    assert 0 < worst["norm"] <= 2**-10 and 0 < worst["attention"] <= 2**-10, worst
