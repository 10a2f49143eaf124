"""The optimizer step is exact: whatever the ranks, the micro-batches, the ZeRO stage and the packing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import World, build_base, deepspeed_json, launch, make_rows, run_ranks
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import train

STEPS = 20


def curve(world: World, name: str) -> list[tuple[float, float]]:
    return [(record["loss"], record["gradient_norm"]) for record in world.metrics(name, "train")]


def evaluation_counts(world: World, name: str) -> list[tuple[int, int, int]]:
    return [(r["step"], r["num_correct"], r["num_tokens"]) for r in world.metrics(name, "evaluation")]


@pytest.fixture(scope="module")
def reference(world: World) -> str:
    """One rank, ZeRO-3 with offload, packed, everything in few micro-batches."""
    recipe = world.recipe("reference", train={"max_steps": STEPS, "max_tokens_per_micro_batch": 1024, "eval_steps": 5})
    launch(recipe, 1)
    return "reference"


@pytest.mark.parametrize(
    ("num_ranks", "max_tokens", "stage", "packing"),
    [
        pytest.param(1, 128, 3, "auto", marks=pytest.mark.slow),
        (2, 128, 3, "auto"),
        pytest.param(2, 1024, 3, "auto", marks=pytest.mark.slow),
        pytest.param(4, 256, 3, "auto", marks=pytest.mark.slow),
        pytest.param(3, 128, 3, "auto", marks=pytest.mark.slow),
        pytest.param(1, 256, 3, "off", marks=pytest.mark.slow),
        pytest.param(2, 256, 3, "off", marks=pytest.mark.slow),
        pytest.param(2, 128, 2, "auto", marks=pytest.mark.slow),
        pytest.param(2, 128, 1, "auto", marks=pytest.mark.slow),
    ],
)
def test_any_layout_gives_the_same_curve(
    world: World, reference: str, num_ranks: int, max_tokens: int, stage: int, packing: str
) -> None:
    name = f"ranks{num_ranks}-tokens{max_tokens}-zero{stage}-{packing}"
    settings = {"max_steps": STEPS, "max_tokens_per_micro_batch": max_tokens, "packing": packing, "eval_steps": 5}
    launch(world.recipe(name, train=settings), num_ranks, deepspeed=deepspeed_json(world.directory, stage))
    expected, found = curve(world, reference), curve(world, name)
    assert len(expected) == STEPS
    assert expected[0][0] > 1.05 * expected[-1][0], "the reference must learn for its equality to mean something"
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert other == pytest.approx(one, rel=1e-5), f"step {step}: {other} is not {one}"
    assert evaluation_counts(world, name) == evaluation_counts(world, reference)
    padding = [record["padding_share"] for record in world.metrics(name, "train")]
    assert (max(padding) > 0.05) == (packing == "off")


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [{}, {"packing": "off"}, {"gradient_checkpointing": True}], ids=str)
def test_ranks_without_a_sample_keep_in_step(world: World, blocks: dict[str, Any]) -> None:
    """2 samples a step on 4 ranks: two of them have nothing to train on."""
    settings = {"max_steps": 3, "global_batch_size": 2, **blocks}
    for num_ranks in (1, 4):
        launch(world.recipe(f"empty-{num_ranks}-{len(blocks)}", train=settings), num_ranks)
    one, four = (curve(world, f"empty-{num_ranks}-{len(blocks)}") for num_ranks in (1, 4))
    for expected, found in zip(one, four, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    shutil.rmtree(world.run_directory(f"empty-1-{len(blocks)}"))
    shutil.rmtree(world.run_directory(f"empty-4-{len(blocks)}"))


def forward_calls(arguments: list[str]) -> int:
    """How often a layer of the model is computed in a whole run."""
    calls = 0
    forward = Qwen2MLP.forward

    def counted(self: Qwen2MLP, *inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(self, *inputs)

    Qwen2MLP.forward = counted
    assert train.main(arguments) == 0
    return calls


@pytest.mark.slow
def test_gradient_checkpointing_computes_twice_and_changes_nothing(world: World, reference: str) -> None:
    calls = []
    for name, on in (("gradient-checkpointing", True), ("no-gradient-checkpointing", False)):
        settings = {"max_steps": STEPS, "eval_steps": 5, "gradient_checkpointing": on}
        calls.append(run_ranks(2, forward_calls, [str(world.recipe(name, train=settings))])[0])
    assert calls[0] > 1.4 * calls[1]
    name = "gradient-checkpointing"
    for one, other in zip(curve(world, reference), curve(world, name), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_leaking_model_is_seen_and_padded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """OPT takes position_ids and logits_to_keep and still lets packed samples see each other."""
    rows = make_rows(50)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_base(tmp_path / "base", [row["input"] + row["output"] for row in rows], family="opt")
    opt = World(tmp_path, base, tmp_path / "rows.jsonl")
    launch(opt.recipe("auto"), 2)
    assert "see each other" in capfd.readouterr().out
    launch(opt.recipe("off", train={"packing": "off"}), 1)
    for one, other in zip(curve(opt, "off"), curve(opt, "auto"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_the_last_step_is_divided_by_its_own_tokens(world: World) -> None:
    """40 samples, 1.5 epochs, 8 a step: 60 samples in 7 full steps and one of 4, on 3 ranks."""
    for name, num_ranks in (("epochs-1", 1), ("epochs-3", 3)):
        launch(world.recipe(name, train={"max_steps": None, "num_train_epochs": 1.5}), num_ranks)
    assert len(curve(world, "epochs-1")) == 8
    trained = [record["trained_tokens"] for record in world.metrics("epochs-1", "train")]
    assert trained[-1] < min(trained[:-1])
    for one, other in zip(curve(world, "epochs-1"), curve(world, "epochs-3"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
