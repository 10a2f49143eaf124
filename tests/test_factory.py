"""A user's own nn.Module, filled from a `.pth` state dict: trained exactly, resumed, merged into its state dict."""

import pickle
from pathlib import Path
from typing import Any

import own_model
import pytest
import torch
from conftest import World, build_tokenizer, deepspeed_json, launch, make_rows, run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_reference import assert_equal_steps, our_step, perturb, samples_of
from test_resume import stop_at
from torch.nn import functional

import train
from launch import batching
from launch import engine as engines
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.errors import LaunchError
from launch.model import check_adapter_fits, load_base

LORA = {"r": 4, "lora_dropout": 0.0, "target_modules": ["query_key_value", "dense"]}


def factory(name: str = "build") -> str:
    return f"{Path(own_model.__file__).resolve()}:{name}"


@pytest.fixture(scope="module")
def own_world(world: World) -> World:
    """The rows of the tiny world, the user's weights and a directory with a tokenizer."""
    torch.manual_seed(0)
    model = own_model.build()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.inv_freq.mul_(1.5)  # a buffer that the file must bring
    torch.save(model.state_dict(), world.directory / "own.pth")
    build_tokenizer([row["input"] + row["output"] for row in make_rows(50)]).save_pretrained(world.directory / "tok")
    return world


def own_recipe(world: World, name: str, built_by: str = "build", **blocks: dict[str, Any]) -> Path:
    model = {
        "name_or_path": str(world.directory / "own.pth"),
        "factory": factory(built_by),
        "tokenizer": str(world.directory / "tok"),
    }
    blocks = {"model": model, "adapter": LORA} | blocks
    return world.recipe(name, **blocks)


def own_loss(model: torch.nn.Module, token_ids: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """The summed loss of one sample alone, by the plain forward."""
    output = model(input_ids=token_ids[None])
    logits = output[0] if isinstance(output, tuple) else output.logits
    places = torch.nonzero(trained)[:, 0]
    return functional.cross_entropy(logits[0, places - 1], token_ids[places], reduction="sum")


def their_step(path: Path, built_by: str) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of step 0 by torch and peft alone, one sample after the other."""
    recipe = load_recipe(path)
    samples, _ = samples_of(recipe)
    base = getattr(own_model, built_by)()
    base.load_state_dict(torch.load(recipe.model.name_or_path, weights_only=True))
    torch.manual_seed(recipe.train.seed)
    model = get_peft_model(base, LoraConfig(lora_alpha=16, **LORA))
    perturb(model)
    ids = batching.step_samples(0, len(samples), 8, 10_000, recipe.train.seed)
    rows = [tuple(torch.from_numpy(array) for array in samples.sample(index)) for index in ids]
    loss = sum(own_loss(model, *row) for row in rows) / sum(int(trained.sum()) for _, trained in rows)
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("built_by", "num_ranks", "stage"),
    [
        ("build", 2, 3),
        pytest.param("build_packable", 2, 3, marks=pytest.mark.slow),
        pytest.param("build", 3, 2, marks=pytest.mark.slow),
        pytest.param("build_packable", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_torch_and_peft(
    own_world: World, built_by: str, num_ranks: int, stage: int
) -> None:
    path = own_recipe(own_world, f"own-{built_by}-{stage}", built_by, train={"max_tokens_per_micro_batch": 160})
    ours = run_ranks(num_ranks, our_step, path, deepspeed=deepspeed_json(own_world.directory, stage))[0]
    assert_equal_steps(ours, run_ranks(1, their_step, path, built_by)[0])


def filled(path: Path, precision: str) -> tuple[dict[str, Any], int, int] | str:
    """(whole tensors, elements of the model, elements that this rank keeps), or the sentence of a refusal."""
    recipe = load_recipe(path)
    engines.quiet_libraries()
    engines.create_accelerator(recipe, precision)
    try:
        model = load_base(recipe.model.name_or_path, recipe.model, precision)
    except LaunchError as error:
        return str(error)
    whole = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with engines.whole_parameter(tensor) as value:
            whole[name] = value.float().numpy().copy()
    kept = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())
    return whole, sum(torch.Size(engines.whole_shape(parameter)).numel() for parameter in model.parameters()), kept


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_gets_what_rank_zero_reads(own_world: World, stage: int) -> None:
    path = own_recipe(own_world, "filled")
    expected = torch.load(own_world.directory / "own.pth", weights_only=True)
    results = run_ranks(3, filled, path, "fp32", deepspeed=deepspeed_json(own_world.directory, stage))
    for whole, size, kept in results:
        assert whole.keys() == expected.keys()
        assert all(torch.equal(torch.from_numpy(whole[name]), expected[name]) for name in expected)
        assert size / 3 <= kept < size / 2 if stage == 3 else kept == size


def test_a_buffer_is_as_exact_as_in_the_file_or_refused(own_world: World) -> None:
    """zero.Init makes 16-bit what a constructor makes, buffers too, and rounds them."""
    expected = torch.load(own_world.directory / "own.pth", weights_only=True)["inv_freq"]
    ((whole, _, _),) = run_ranks(1, filled, own_recipe(own_world, "own-bf16"), "bf16")
    assert torch.equal(torch.from_numpy(whole["inv_freq"]), expected)
    path = own_recipe(own_world, "own-table", "build_with_a_table")
    (sentence,) = run_ranks(1, filled, path, "bf16")
    assert "the buffer scale is made in torch.float32, but under ZeRO-3 in torch.bfloat16 with rounded" in sentence
    ((_, size, kept),) = run_ranks(1, filled, path, "bf16", deepspeed=deepspeed_json(own_world.directory, 2))
    assert kept == size


def answer(model: torch.nn.Module, token_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy generation by the plain forward."""
    for _ in range(num_tokens):
        token_ids = [*token_ids, int(model(input_ids=torch.tensor([token_ids]))[0][0, -1].argmax())]
    return token_ids


@pytest.mark.slow
@pytest.mark.parametrize("modules_to_save", [[], ["final_layernorm"]], ids=["lora", "norm"])
def test_a_run_is_stopped_resumed_elsewhere_and_merged(own_world: World, modules_to_save: list[str]) -> None:
    """Straight on 2 ranks under ZeRO-3 = stopped there and resumed on 3 ranks under ZeRO-2; and what it leaves."""
    settings = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "learning_rate": 2e-2}
    adapter = LORA | {"modules_to_save": modules_to_save}
    blocks: dict[str, Any] = {"train": settings, "adapter": adapter, "run": {"merge_dtype": "float32"}}
    for name in ("own-straight", "own-stopped"):
        blocks["run"] = {"name": f"{name}-{len(modules_to_save)}", "merge": True, "merge_dtype": "float32"}
        own_recipe(own_world, name, **blocks)
    straight, stopped = (own_world.directory / f"own-{kind}.yaml" for kind in ("straight", "stopped"))
    launch(straight, 2)
    assert [code for code, _ in run_ranks(2, stop_at, 2, [str(stopped)])] == [0, 0]
    launch(stopped, 3, deepspeed=deepspeed_json(own_world.directory, 2))
    directories = [load_recipe(path).run_directory for path in (straight, stopped)]
    states = [load_file(path_of_step(directory, 6) / "optimizer.safetensors") for directory in directories]
    assert states[0].keys() == states[1].keys()
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, rtol=1e-4, atol=1e-5)

    base = own_model.build()
    state = torch.load(own_world.directory / "own.pth", weights_only=True)
    base.load_state_dict(state)
    merged_state = torch.load(directories[1] / "merged" / "model.pth", mmap=True, weights_only=True)
    assert merged_state.keys() == state.keys()
    assert merged_state["lm_head.weight"].data_ptr() == merged_state["word_embeddings.weight"].data_ptr()
    assert torch.equal(merged_state["inv_freq"], state["inv_freq"])
    assert not (directories[1] / "merged" / "tensors").exists()
    merged = own_model.build()
    merged.load_state_dict(merged_state)
    prompt = [5, 17, 30, 8]
    with torch.no_grad():
        before = base(torch.tensor([prompt]))[0]
        tuned = PeftModel.from_pretrained(base, directories[1] / "adapter").eval()
        expected, found = tuned(input_ids=torch.tensor([prompt]))[0], merged(torch.tensor([prompt]))[0]
        assert (expected - before).abs().max() > 0.1, "the adapter must matter"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert answer(merged, prompt, 8) == answer(tuned, prompt, 8)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


REFUSED: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda state: {name: t for name, t in state.items() if "layers.1.dense" not in name},
        "own.pth has no layers.1.dense.weight, which the model of",
    ),
    "unexpected": (lambda state: state | {"rope": torch.zeros(2)}, "own.pth has rope, which the model of"),
    "shape": (lambda state: state | {"inv_freq": torch.zeros(3)}, "inv_freq is [3] in "),
    "untied": (
        lambda state: state | {"lm_head.weight": state["lm_head.weight"] + 1},
        "word_embeddings.weight and lm_head.weight are one tensor in the model of",
    ),
    "nested": (lambda state: {"state_dict": state}, "is no state dict of tensors but a dict with state_dict; write it"),
    "a list": (lambda state: list(state.values()), "is no state dict of tensors but a list; write it"),
    "code": (lambda state: state | {"extra": pickle.Pickler}, "holds more than tensors, and code is not unpickled"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_weights_that_do_not_fit_are_refused_in_one_sentence(own_world: World, tmp_path: Path, fault: str) -> None:
    change, sentence = REFUSED[fault]
    state = torch.load(own_world.directory / "own.pth", weights_only=True)
    torch.save(change(dict(state)), tmp_path / "own.pth")
    recipe = load_recipe(own_recipe(own_world, "refused"), [f"model.name_or_path={tmp_path / 'own.pth'}"])
    with pytest.raises(LaunchError) as caught:
        check_adapter_fits(recipe.model.name_or_path, recipe)
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.factory=no.py:build", "model.factory = no.py:build: there is no file no.py."),
        ("model.factory=build", "is not valid: string should match pattern"),
        (f"model.factory={factory('built')}", "own_model.py has no function built; it has"),
        (f"model.factory={factory('build_what_fails')}", "raised KeyError: 'hidden_size' (own_model.py line "),
        (f"model.factory={factory('build_no_module')}", "returned a dict, not a torch.nn.Module."),
        ("model.factory=BROKEN", "the file raised NameError: name 'layers' is not defined (broken.py line 1)."),
        ("model.tokenizer=null", "factory and tokenizer go together"),
        ("model.load_in_4bit=true", "load_in_4bit needs a model of transformers; with a factory leave it out"),
        ("model.name_or_path=no.pth", "model.name_or_path = no.pth: there is no file no.pth."),
        ("model.name_or_path=README.md", "README.md cannot be read as a state dict: "),
        ("adapter.target_modules=[q_proj]", "no module of the model is named 'q_proj'"),
        ("adapter.target_modules=all-linear", "adapter.target_modules must name the layers of a model.factory"),
        ("train.gradient_checkpointing=true", "has no method gradient_checkpointing_enable(options)"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    own_world: World, tmp_path: Path, override: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = write(tmp_path / "broken.py", "model = layers()\n")
    override = override.replace("BROKEN", f"{broken}:build")
    assert run_ranks(1, train.main, [str(own_recipe(own_world, "wrong")), override]) == [1]
    said = capfd.readouterr().err
    assert said.startswith("Refused: ") and said.count("\n") == 1
    assert sentence in said


def test_a_soft_prompt_needs_a_model_of_transformers(own_world: World) -> None:
    path = own_recipe(own_world, "soft", adapter={"type": "prompt_tuning"})
    with pytest.raises(LaunchError, match=r"adapter\.type = prompt_tuning needs a model of transformers"):
        load_recipe(path)
