"""A base with code of its own: refused or warned of, trained to the same numbers, merged to stand alone."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, World, build_remote_base, deepspeed_json, launch, make_rows, run_ranks
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_cli import python_m_launch
from test_reference import perturb, samples_of, their_loss
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import train
from launch import batching
from launch import engine as engines
from launch.adapter import add_adapter
from launch.attention import attention_in_use
from launch.config import load_recipe
from launch.errors import ModelError
from launch.fingerprint import fingerprint_base
from launch.model import enable_gradient_checkpointing, load_base
from launch.packing import batch_loss, collate, forward_arguments
from launch.preflight import check_model
from launch.recipe import ModelBlock
from launch.remote_code import check_remote_code, loading_class

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRUST = {"trust_remote_code": True, "attn_implementation": "eager"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The remote-code model and 50 rows."""
    directory = tmp_path_factory.mktemp("remote")
    rows = make_rows(50)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_remote_base(directory / "base", [row["input"] + row["output"] for row in rows])
    return World(directory, base, directory / "rows.jsonl")


def our_gradients(path: Path, checkpointing: bool) -> tuple[dict[str, np.ndarray], float]:
    """(those of step 0 through the real engine, padded; forward passes of a layer in a micro-batch)."""
    recipe = load_recipe(path)
    samples, _ = samples_of(recipe)
    engines.quiet_libraries()
    accelerator = engines.create_accelerator(recipe, "fp32")
    base = load_base(recipe.model.name_or_path, recipe.model, "fp32")
    model = add_adapter(base, recipe.adapter, base="", seed=0, dtype=torch.float32)
    perturb(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    engine = engines.start_engine(accelerator, model, recipe.train)
    ids = batching.step_samples(0, len(samples), 8, 10_000, recipe.train.seed)
    layout = batching.lay_out(ids, samples.lengths[ids].tolist(), 256, dist.get_world_size(), padded=True)
    mine = layout[dist.get_rank()]
    passes = []
    base.model.layers[1].register_forward_hook(lambda *given: passes.append(1))
    for index, micro_batch in enumerate(mine):
        batch = collate(samples, micro_batch, accelerator.device, packed=False)
        loss, _ = batch_loss(engine, batch, accepts=forward_arguments(base))
        engines.backward(engine, loss / int(samples.num_trained[ids].sum()), is_last=index == len(mine) - 1)
    gradients = {name: safe_get_full_grad(p).numpy().copy() for name, p in engines.trainable_parameters(engine)}
    return gradients, len(passes) / len(mine)


def their_gradients(path: Path) -> dict[str, np.ndarray]:
    """By plain transformers and PEFT, without checkpointing."""
    recipe = load_recipe(path)
    samples, _ = samples_of(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, trust_remote_code=True, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(base, config)
    perturb(model)
    ids = batching.step_samples(0, len(samples), 8, 10_000, recipe.train.seed)
    their_loss(model, samples, ids).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_are_those_of_peft(world: World, checkpointing: bool) -> None:
    """With the model's own reentrant checkpointing, and without; none is zero."""
    path = world.recipe("gradients", model=TRUST, data={"template": "bluelm"})
    found, passes = run_ranks(2, our_gradients, path, checkpointing)[0]
    assert passes == (2 if checkpointing else 1)
    expected = run_ranks(1, their_gradients, path)[0]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, f"{name} gets no gradient, so its equality says nothing"
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


def logits_as_loaded(path: Path) -> np.ndarray:
    """By the base alone, through `load_base`."""
    recipe = load_recipe(path)
    engines.quiet_libraries()
    engines.create_accelerator(recipe, "fp32")
    base = load_base(recipe.model.name_or_path, recipe.model, "fp32").eval()
    assert all(torch.isfinite(buffer).all() for buffer in base.buffers())
    with engines.written_whole(base.parameters()), torch.no_grad():
        return base(input_ids=torch.arange(20)[None]).logits.numpy().copy()


@pytest.mark.parametrize(
    ("stage", "in_4_bits"), [(2, False), pytest.param(3, False, marks=pytest.mark.slow), (3, True)]
)
def test_what_no_checkpoint_has_is_computed(world: World, stage: int, in_4_bits: bool, tmp_path: Path) -> None:
    """Plain from_pretrained of transformers 5 leaves it unfilled, and the loss of published models is then nan."""
    shutil.copytree(world.base, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text(encoding="utf-8")) | {"has_table": True}
    (tmp_path / "base/config.json").write_text(json.dumps(config), encoding="utf-8")
    model = TRUST | {"name_or_path": str(tmp_path / "base"), "load_in_4bit": in_4_bits}
    path = world.recipe("table", model=model)
    (found,) = run_ranks(1, logits_as_loaded, path, deepspeed=deepspeed_json(tmp_path, stage))
    if in_4_bits:
        (expected,) = run_ranks(1, logits_as_loaded, path, deepspeed=deepspeed_json(tmp_path, 2))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        return
    made = get_class_from_dynamic_module("modeling_tiny.TinyForCausalLM", str(tmp_path / "base"))
    whole = made(made.config_class.from_pretrained(tmp_path / "base")).eval()
    whole.load_state_dict(load_file(tmp_path / "base/model.safetensors"))
    with torch.no_grad():
        np.testing.assert_allclose(found, whole(input_ids=torch.arange(20)[None]).logits.numpy(), rtol=1e-5, atol=1e-5)


def test_begin_and_end_are_ids_and_a_row_cannot_write_them(world: World) -> None:
    rows = [{"input": "石 头\n\n ，", "output": "路  标"}, {"input": "a </s> b", "output": "<s> c"}]
    path = world.directory / "ends.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(path), "template": "bluelm", "test_size": 0}
    samples, _ = samples_of(load_recipe(world.recipe("ends", model=TRUST, data=data)))
    tokenizer = AutoTokenizer.from_pretrained(world.base, trust_remote_code=True)
    assert (tokenizer.is_fast, tokenizer.bos_token_id, tokenizer.eos_token_id) == (False, 1, 2)
    for index, row in enumerate(rows):
        ids, is_trained = samples.sample(index)
        assert (ids[0], ids[-1], list(ids).count(1), list(ids).count(2)) == (1, 2, 1, 1)
        assert is_trained[-1] and not is_trained[0]
        assert tokenizer.decode(ids[is_trained]) == f"{row['output']}</s>"
        assert tokenizer.decode(ids[~is_trained]) == f"<s>[|Human|]:{row['input']}[|AI|]:"


# ---- what may run ----


def with_a_tripwire(world: World, name: str) -> tuple[Path, Path]:
    """(a copy of the base whose code leaves a file when it runs, that file)."""
    copy, wire = world.directory / name, world.directory / f"{name}-ran"
    if not copy.exists():
        shutil.copytree(world.base, copy)
        for path in copy.glob("*.py"):
            source = path.read_text(encoding="utf-8")
            path.write_text(f"{source}\nopen({str(wire)!r}, 'w').close()\n", encoding="utf-8")
    return copy, wire


def test_without_permission_nothing_runs(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    copy, wire = with_a_tripwire(world, "wired")
    recipe = world.recipe("unasked", model={"name_or_path": str(copy)}, data={"template": "bluelm"})
    sentence = (
        f"Refused: config.json of {copy} asks for code of its own (configuration_tiny.TinyConfig, "
        "modeling_tiny.TinyForCausalLM), for which transformers has no substitute and which would run with your "
        "rights; read it, and set model.trust_remote_code: true to let it.\n"
    )
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert capfd.readouterr().err == sentence
    for command in ("check", "data", "preview"):
        assert python_m_launch(command, recipe) == (2, "", sentence)
    assert not wire.exists()
    assert python_m_launch("check", recipe, "model.trust_remote_code=true", "model.attn_implementation=eager")[0] == 0
    assert wire.exists(), "the tripwire works"


def test_a_tokenizer_of_its_own_is_code_too(world: World, tmp_path: Path) -> None:
    """The model is transformers' own Falcon, which the auto_map of its config does not change."""
    config = {"model_type": "falcon", "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(world.base / "tokenizer_config.json", tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json of x .* \(tokenization_tiny\.TinyTokenizer\)"):
        check_remote_code(ModelBlock(name_or_path="x"), tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    check_remote_code(ModelBlock(name_or_path="x"), tmp_path, None)


@pytest.fixture
def hub_id(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The base as the hub's owner/tiny, in a cache without a network; its auto_map names its own repository."""
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(world.base, snapshot)
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {name: f"owner/tiny--{reference}" for name, reference in config["auto_map"].items()}
    tokenizer = json.loads((snapshot / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["auto_map"]["AutoTokenizer"] = ["owner/tiny--tokenization_tiny.TinyTokenizer", None]
    config["auto_map"] |= tokenizer["auto_map"] | {"AutoModel": "owner/tiny--no_such_file.TinyModel"}
    (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (snapshot / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "owner/tiny"


@pytest.mark.parametrize(("revision", "named"), [(None, "the present one"), ("main", "main")])
def test_code_of_the_hub_needs_a_commit(hub_id: str, revision: str | None, named: str) -> None:
    model = ModelBlock(name_or_path=hub_id, revision=revision, trust_remote_code=True)
    with pytest.raises(ModelError) as caught:
        check_model(model)
    assert str(caught.value) == (
        "model.trust_remote_code would run whatever code owner/tiny holds on the day of the run; set model.revision to "
        f"the commit whose code you have read ({named} is {COMMIT})."
    )


def test_code_of_another_repository_is_refused(hub_id: str, tmp_path: Path) -> None:
    config = next(tmp_path.rglob("config.json"))
    config.write_text(config.read_text(encoding="utf-8").replace("owner/tiny--", "someone/else--"), encoding="utf-8")
    model = ModelBlock(name_or_path=hub_id, revision=COMMIT, trust_remote_code=True)
    for block in (model, ModelBlock(name_or_path=str(config.parent), trust_remote_code=True)):
        with pytest.raises(ModelError, match=r"takes its code from someone/else \(someone/else--configuration_tiny\."):
            check_model(block)


def test_changed_code_is_another_base(world: World) -> None:
    copy, _ = with_a_tripwire(world, "changed")
    (copy / "README.md").write_text("not code", encoding="utf-8")
    trusted, not_run = ModelBlock(name_or_path="x", trust_remote_code=True), ModelBlock(name_or_path="x")
    assert fingerprint_base(str(world.base), trusted) != fingerprint_base(str(copy), trusted)
    assert fingerprint_base(str(world.base), not_run) == fingerprint_base(str(copy), not_run)


@pytest.mark.parametrize(
    ("model_type", "auto_map", "expected"),
    [
        ("chatglm", ["AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"], "AutoModel"),
        ("chatglm", ["AutoConfig", "AutoModel", "AutoModelForCausalLM"], "AutoModelForCausalLM"),
        ("baichuan", ["AutoConfig", "AutoModelForCausalLM"], "AutoModelForCausalLM"),
        ("qwen2", [], "AutoModelForCausalLM"),
        ("unheard_of", ["AutoConfig", "AutoModel"], "AutoModelForCausalLM"),
    ],
)
def test_loading_classes(model_type: str, auto_map: list[str], expected: str) -> None:
    assert loading_class(model_type, auto_map) == expected


def test_a_family_of_another_loading_class_loads(world: World, tmp_path: Path) -> None:
    """As ChatGLM's, whose language model is called AutoModel; of an unknown family that would be one without a head."""
    base = tmp_path / "chatglm"
    shutil.copytree(world.base, base)
    code, config = base / "configuration_tiny.py", base / "config.json"
    code.write_text(code.read_text(encoding="utf-8").replace("cairn_tiny", "chatglm"), encoding="utf-8")
    text = config.read_text(encoding="utf-8").replace("AutoModelForCausalLM", "AutoModel")
    config.write_text(text.replace("cairn_tiny", "chatglm"), encoding="utf-8")
    block = ModelBlock(name_or_path=str(base), trust_remote_code=True, attn_implementation="eager")
    assert type(load_base(str(base), block, "fp32")).__name__ == "TinyForCausalLM"
    config.write_text(text, encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"auto_map of .* names no AutoModelForCausalLM \(it has AutoConfig, AutoModel\)"
    ):
        check_model(block)


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("tokenization_tiny.py", "None.nothing", "The tokenizer of {} cannot be loaded: its own code failed with Attr"),
        ("configuration_tiny.py", "import no_such_package", "config.json of {} cannot be loaded: This modeling file"),
        (
            "modeling_tiny.py",
            "1 / 0",
            "The base model {} cannot be loaded: its own code failed with ZeroDivisionError: ",
        ),
    ],
)
def test_code_that_fails_is_one_sentence(world: World, tmp_path: Path, file: str, line: str, sentence: str) -> None:
    base = tmp_path / file.partition("_")[0]
    shutil.copytree(world.base, base)
    (base / file).write_text(f"{(base / file).read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    recipe = world.recipe("failing", model=TRUST | {"name_or_path": str(base)}, data={"template": "bluelm"})
    code, _, err = python_m_launch("check", recipe)
    assert code == 2 and f"\nRefused: {sentence.format(base)}" in err


def test_targets_are_checked_before_the_weights_are_there(world: World, tmp_path: Path) -> None:
    """Unless the code cannot be made without them, which is said."""
    base = tmp_path / "hollow"
    shutil.copytree(world.base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    hollow = "hollow has no weights that transformers loads: model.safetensors, "
    recipe = world.recipe("hollow", model=TRUST | {"name_or_path": str(base)}, data={"template": "bluelm"})
    misspelt = "adapter.target_modules=[q_porj]"
    code, _, err = python_m_launch("check", recipe, misspelt)
    assert code == 2 and hollow in err
    assert "no module of the model is named 'q_porj'; did you mean q_proj? It has down_proj, emb" in err
    path = base / "modeling_tiny.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("self.post_init()", "self.post_init(); torch.ones(1).item()"), encoding="utf-8")
    code, _, err = python_m_launch("check", recipe, misspelt)
    assert code == 2 and hollow in err and "q_porj" not in err
    assert "\nTinyForCausalLM cannot be made without weights, so its targets are checked with th" in err


def test_attention_that_the_code_has_not(world: World) -> None:
    block = ModelBlock(name_or_path=str(world.base), trust_remote_code=True)
    with pytest.raises(ModelError, match=r"has no sdpa attention; set model\.attn_implementation to eager\.$"):
        load_base(str(world.base), block, "fp32")
    eager = block.model_copy(update={"attn_implementation": "eager"})
    in_use = "of the model's own code (TinyForCausalLM), which does not look at model.attn_implementation"
    assert attention_in_use(load_base(str(world.base), eager, "fp32"), "eager") == (True, in_use)


# ---- a whole run ----


def logits_of_merged(directory: Path, base: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(of the merged model alone, of base and adapter), by plain transformers and PEFT."""
    tokens = torch.tensor([ids])
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged", trust_remote_code=True, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, directory / "adapter").eval()
    with torch.no_grad():
        return merged(tokens).logits.numpy(), adapted(tokens).logits.numpy()


@pytest.mark.slow
def test_a_run_from_the_hub_ends_with_a_model_that_stands_alone(
    hub_id: str, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = TRUST | {"name_or_path": hub_id, "revision": COMMIT}
    settings = {"max_steps": 3, "gradient_checkpointing": True, "learning_rate": 3e-2}
    recipe = world.recipe("hub", model=model, data={"template": "bluelm"}, train=settings, run={"merge": True})
    launch(recipe, 2)
    said = capfd.readouterr().err
    assert said.count("Warning: ") == 1 and (
        "configuration_tiny.py, modeling_tiny.py, tokenization_tiny.py of owner/tiny at "
        f"{COMMIT} run with your rights; the model is loaded by AutoModelForCausalLM.\n" in said
    )
    directory = world.run_directory("hub")
    code = {"configuration_tiny.py", "modeling_tiny.py"}
    assert {path.name for path in (directory / "merged").glob("*.py")} == code | {"tokenization_tiny.py"}
    assert {path.name for path in (directory / "adapter").glob("*.py")} == {"tokenization_tiny.py"}
    config = json.loads((directory / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    shutil.rmtree(tmp_path / "models--owner--tiny")  # the merged model needs no hub
    for part in ("merged", "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(directory / part, trust_remote_code=True)
        assert tokenizer("<s>路 标</s>", add_special_tokens=False)["input_ids"][0] == 1
    ids = tokenizer("<s>[|Human|]:石 头[|AI|]:", add_special_tokens=False)["input_ids"]
    merged, adapted = run_ranks(1, logits_of_merged, directory, world.base, ids)[0]
    assert np.abs(merged - adapted).max() < 0.01 * np.abs(adapted).max()


@pytest.mark.slow
def test_code_that_wants_values_is_merged_and_not_read_again(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ZeRO-3 makes it with values; transformers 5 makes whatever it loads without."""
    shutil.copytree(world.base, tmp_path / "base")
    path = tmp_path / "base" / "modeling_tiny.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("self.post_init()", "self.post_init(); torch.ones(1).item()"), encoding="utf-8")
    model = TRUST | {"name_or_path": str(tmp_path / "base")}
    recipe = world.recipe("values", model=model, data={"template": "bluelm"}, run={"merge": True})
    launch(recipe, 2)
    assert (
        "TinyForCausalLM cannot be made without weights, so the merged model was not read again"
        in capfd.readouterr().err
    )
    merged = load_file(world.run_directory("values") / "merged" / "model.safetensors")
    assert merged.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_prefix_tuning_needs_a_forward_that_takes_it(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("prefix", model=TRUST, data={"template": "bluelm"}, adapter={"type": "prefix_tuning"})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    said = capfd.readouterr().err
    assert "needs a forward that takes past_key_values, and that of TinyForCausalLM does not" in said


def test_the_tokenizer_of_a_factory_is_code_as_well(world: World) -> None:
    weights = world.directory / "any.pth"
    weights.write_bytes(b"")
    factory = f"{ROOT / 'tests/own_model.py'}:build"
    given = {"name_or_path": str(weights), "factory": factory, "tokenizer": str(world.base)}
    with pytest.raises(ModelError, match=r"of .*/base asks for code of its own"):
        check_model(ModelBlock(**given))
