"""The step against plain transformers + peft on one process, and token accuracy against a slow loop."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import World, launch, run_ranks
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from launch import batching
from launch import engine as engines
from launch.adapter import add_adapter
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.data import prepare
from launch.head import LossHead, find_head
from launch.model import load_base, tokenizer_and_template
from launch.packing import batch_loss, collate, forward_arguments
from launch.recipe import Recipe
from launch.samples import Samples
from launch.starting_adapter import fingerprint_starting_adapter, start_from

SOFT_PROMPTS = {
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
}
ADAPTER = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


def perturb(model: torch.nn.Module) -> None:
    """B starts at zero, which hides half of the gradients."""
    for index, (_, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(index)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def samples_of(recipe: Recipe) -> tuple[Samples, Samples]:
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(recipe, Path(directory), lambda: tokenizer_and_template(recipe))
        return prepared.samples("train"), prepared.samples("evaluation")


def our_step(recipe_path: Path) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of step 0 through the real engine."""
    recipe = load_recipe(recipe_path)
    settings = recipe.train
    samples, _ = samples_of(recipe)
    engines.quiet_libraries()
    accelerator = engines.create_accelerator(recipe, "fp32")
    base = load_base(recipe.model.name_or_path, recipe.model, "fp32")
    name = recipe.model.name_or_path
    model = add_adapter(base, recipe.adapter, base=name, seed=settings.seed, dtype=torch.float32)
    start = fingerprint_starting_adapter(recipe.adapter)
    start_from(recipe.adapter, start, model)
    if start is None:
        perturb(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = engines.start_engine(accelerator, model, settings)
    ids = batching.step_samples(0, len(samples), settings.global_batch_size, 10_000, settings.seed)
    lengths = samples.lengths[ids].tolist()
    adapter, budget = recipe.adapter, settings.max_tokens_per_micro_batch
    accepts = forward_arguments(base)
    packed = adapter.num_virtual_tokens == 0 and "position_ids" in accepts
    module, _ = find_head(base)
    head = LossHead(module, positions_at_once=3) if module is not None else None
    mine = batching.lay_out(ids, lengths, budget, dist.get_world_size(), padded=not packed)[dist.get_rank()]
    sums = torch.zeros(3, dtype=torch.float64)
    for index, micro_batch in enumerate(mine):
        batch = collate(samples, micro_batch, accelerator.device, packed=packed)
        virtual_columns = adapter.num_virtual_columns
        loss, micro_sums = batch_loss(engine, batch, accepts=accepts, virtual_columns=virtual_columns, head=head)
        engines.backward(engine, loss / int(samples.num_trained[ids].sum()), is_last=index == len(mine) - 1)
        sums += micro_sums
    dist.all_reduce(sums)
    gradients = {name: safe_get_full_grad(p).numpy().copy() for name, p in engines.trainable_parameters(engine)}
    return float(sums[0] / sums[2]), gradients


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_loss_and_gradients_are_those_of_transformers_and_peft(world: World, num_ranks: int) -> None:
    path = world.recipe("one-step", adapter=ADAPTER, train={"max_tokens_per_micro_batch": 128})
    assert_our_step_is_theirs(path, num_ranks)


def assert_our_step_is_theirs(path: Path, num_ranks: int) -> None:
    """Loss and every gradient, none of which is zero."""
    assert_equal_steps(run_ranks(num_ranks, our_step, path)[0], run_ranks(1, their_step, path)[0])


def assert_equal_steps(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]]) -> None:
    """(loss, gradients) of both sides."""
    (loss, gradients), (expected, reference) = ours, theirs
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert np.abs(gradient).max() > 0, f"{name} gets no gradient, so its equality says nothing"
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )


def their_model(recipe: Recipe) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32)
    torch.manual_seed(recipe.train.seed)
    if getattr(recipe.adapter, "init_from", None):
        return PeftModel.from_pretrained(base, recipe.adapter.init_from, is_trainable=True)
    given = {key: value for key, value in recipe.adapter.model_dump().items() if key not in ("type", "init_from")}
    if recipe.adapter.type == "lora":
        lists = {key: list(value) or None for key, value in given.items() if isinstance(value, tuple)}
        config = LoraConfig(task_type="CAUSAL_LM", **given | lists)
    else:
        source = {"tokenizer_name_or_path": recipe.model.name_or_path} if given.get("prompt_tuning_init_text") else {}
        config = SOFT_PROMPTS[recipe.adapter.type](task_type="CAUSAL_LM", **given, **source)
    return get_peft_model(base, config)


def their_loss(model: torch.nn.Module, samples: Samples, ids: list[int]) -> torch.Tensor:
    """Hugging Face's own loss on padded rows."""
    rows = [samples.sample(index) for index in ids]
    longest = max(len(token_ids) for token_ids, _ in rows)
    input_ids, labels = torch.zeros(len(ids), longest, dtype=torch.int64), torch.full((len(ids), longest), -100)
    mask = torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, (token_ids, trained) in enumerate(rows):
        input_ids[row, : len(token_ids)] = torch.from_numpy(token_ids)
        mask[row, : len(token_ids)] = 1
        labels[row, : len(token_ids)][trained] = torch.from_numpy(token_ids[trained])
    loss: torch.Tensor = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    return loss


def their_step(path: Path) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of step 0 by transformers and peft alone; in a child, since autograd's threads do not fork."""
    recipe = load_recipe(path)
    samples, _ = samples_of(recipe)
    model = their_model(recipe)
    if not getattr(recipe.adapter, "init_from", None):
        perturb(model)
    loss = their_loss(model, samples, batching.step_samples(0, len(samples), 8, 10_000, recipe.train.seed))
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


def their_run(path: Path) -> tuple[dict[str, Any], list[float]]:
    """Weights and gradient norms of a whole run by torch's AdamW, clipping and transformers' schedule."""
    recipe = load_recipe(path)
    settings = recipe.train
    samples, _ = samples_of(recipe)
    model = their_model(recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if settings.loraplus_lr_ratio:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=settings.learning_rate,
            loraplus_lr_ratio=settings.loraplus_lr_ratio,
            loraplus_weight_decay=settings.weight_decay,
        )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)
    norms = []
    for step in range(settings.max_steps):
        loss = their_loss(model, samples, batching.step_samples(step, len(samples), 8, 10_000, settings.seed))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}, norms


@pytest.mark.slow
@pytest.mark.parametrize("loraplus", [None, 4.0])
def test_whole_runs_end_with_the_same_weights(
    world: World, loraplus: float | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clipping bites in every step, weight decay is on, and the learning rate warms up and decays."""
    settings = {"max_steps": 6, "max_grad_norm": 0.3, "weight_decay": 0.1, "warmup_steps": 2}
    adapter = ADAPTER | {"use_dora": True} if loraplus else ADAPTER
    name = f"six-steps-{loraplus}"
    path = world.recipe(name, adapter=adapter, train=settings | {"loraplus_lr_ratio": loraplus})
    launch(path, 2)
    kinds = "lora_A, lora_B, lora_magnitude_vector, lm_head" if loraplus else "lora_A, lora_B, lm_head"
    assert f"%): {kinds} a stop gets" in " ".join(capfd.readouterr().out.split())
    expected, norms = run_ranks(1, their_run, path)[0]
    assert min(norms) > 0.3
    assert [r["gradient_norm"] for r in world.metrics(name, "train")] == pytest.approx(norms, rel=1e-4)
    found = load_file(path_of_step(world.run_directory(name), 6) / "optimizer.safetensors")
    for parameter, weights in expected.items():
        difference = np.abs(found[f"{parameter}.master"] - weights).max() / np.abs(weights).max()
        assert difference < 1e-4, f"{parameter} differs by {difference:.1e}"


def test_token_accuracy_is_that_of_a_slow_loop(world: World) -> None:
    path = world.recipe("accuracy", train={"max_steps": 1})
    launch(path, 2)
    _, held_out = samples_of(load_recipe(path))
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).eval()  # B is zero at step 0
    correct = total = 0
    with torch.no_grad():
        for index in range(len(held_out)):
            token_ids, trained = held_out.sample(index)
            logits = model(input_ids=torch.from_numpy(token_ids)[None]).logits[0]
            for position in range(1, len(token_ids)):
                if trained[position]:
                    total += 1
                    correct += int(logits[position - 1].argmax()) == token_ids[position]
    before = world.metrics("accuracy", "evaluation")[0]
    assert (before["step"], before["num_correct"], before["num_tokens"]) == (0, correct, total)
