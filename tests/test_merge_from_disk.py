"""`python -m launch merge`: the bytes that PEFT's own merge in fp32 gives, and one sentence for what does not fit."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from conftest import ROOT, World, build_tokenizer, killed_before, launch, run_ranks
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import python_m_launch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from launch import hub, merge_rule, shards
from launch.checkpoint import path_of_step
from launch.errors import MergeError
from launch.merge_from_disk import find_source, merge_from_disk
from launch.merge_plan import plan_merge
from launch.merge_rule import add_lora
from launch.shards import BLOCK_BYTES, row_blocks

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2": {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1},
    "Llama": {**SIZES, "intermediate_size": 48},
    "Phi": {**SIZES, **ENDS, "intermediate_size": 48},
    "Glm": {**SIZES, **ENDS, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16},
    "GPTNeoX": {**SIZES, **ENDS, "intermediate_size": 48},  # which transformers renames on loading
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2, **ENDS},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, **ENDS},
    "Qwen2Moe": {  # whose experts transformers fuses on loading
        **SIZES,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_key_value_heads": 1,
    },
    "Mixtral": {**SIZES, "intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 1},
    "GptOss": {  # whose experts are fused in the files as well, [in, out]
        **SIZES,
        **ENDS,
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS = {"embed_tokens": [1], "lm_head": [2]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("Qwen2", {}, {}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}, {}),
    "dora": ("Qwen2", {}, {"use_dora": True}),
    "patterns": ("Qwen2", {}, {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 5}}),
    "embeddings and head": ("Qwen2", {}, {"target_modules": [*ALL, "embed_tokens", "lm_head"]}),
    "saved": ("Qwen2", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved head, tied": ("Qwen2", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
    "token rows": ("Qwen2", {}, {"trainable_token_indices": ROWS}),
    "token rows, tied": ("Qwen2", {"tie_word_embeddings": True}, {"trainable_token_indices": [1, 2]}),
    "all biases": ("Qwen2", {}, {"bias": "all"}),
    "biases of targets": ("Qwen2", {}, {"bias": "lora_only"}),
    "bias of B": ("Qwen2", {}, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "Llama": ("Llama", {}, {"target_modules": "all-linear"}),
    "Phi": ("Phi", {}, {"target_modules": "all-linear"}),
    "Glm": ("Glm", {}, {"target_modules": "all-linear"}),
    "GPTNeoX": ("GPTNeoX", {}, {"target_modules": ["query_key_value", "dense"]}),
    "Bloom": ("Bloom", {}, {"target_modules": ["query_key_value", "dense"]}),
    "GPT2": ("GPT2", {}, CONV1D),
    "GPT2, dora": ("GPT2", {}, {**CONV1D, "use_dora": True}),
    "Qwen2Moe": ("Qwen2Moe", {}, {"target_modules": ["q_proj", "o_proj"]}),
    "experts": ("Qwen2Moe", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "some of the experts": ("Qwen2Moe", {}, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "experts with patterns": (
        "Qwen2Moe",
        {},
        {"target_parameters": EXPERTS, "use_rslora": True, "rank_pattern": {"experts.down_proj": 5}},
    ),
    "experts of Mixtral, and routers": ("Mixtral", {}, {"target_modules": "all-linear"}),
    "experts of GPT-OSS": ("GptOss", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}
FAST = {"lora", "tied"}


def make(
    directory: Path, family: str, options: dict[str, Any], adapter: dict[str, Any], num_rows: int | None = None
) -> None:
    """A random `base/` in fp16 in several shards, and a random `adapter/` that knows where it is.

    PEFT alone makes the adapter, of a base whose vocabulary is given this number of rows before.
    """
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family], **options)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(directory / "base", max_shard_size="20KB")
    build_tokenizer(["one two three"] * 3, 300).save_pretrained(directory / "base")
    base = resized(directory, num_rows or CONFIGS[family]["vocab_size"])
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ALL, **adapter}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(str(directory / "adapter"))
    change_config(directory, base_model_name_or_path=str(directory / "base"))


def resized(directory: Path, num_rows: int) -> transformers.PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    base.resize_token_embeddings(num_rows, mean_resizing=False)
    return base.half().float()  # the new rows as well


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def merge(directory: Path, **options: Any) -> bool:
    return merge_from_disk(
        find_source(directory / "adapter"), directory / "merged", **{"max_shard_size_bytes": 20_000, **options}
    )


def test_an_error_of_the_disk_beside_the_writing_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells it once, to whoever syncs first, and the last sync of the file would succeed."""

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make(tmp_path, *CASES["lora"])
    monkeypatch.setattr(shards, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(MergeError, match="could not be written: Input/output error; nothing was kept"):
        merge(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("shape", [(2048, 5632), (5632, 2048), (4096, 11008), (1000, 777)])
def test_blocks_of_rows_are_merged_as_the_whole_is(shape: tuple[int, int]) -> None:
    """Of 93 rows, 2 were left of 2048; on an AMD EPYC the product of those has other last digits than the whole's."""
    blocks = list(row_blocks(shape))
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks)][:-1] and blocks[-1][1] == shape[0]
    sizes = {last - first for first, last in blocks}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) * shape[1] * 4 <= BLOCK_BYTES
    generator = torch.manual_seed(0)
    base, lora_a, lora_b = (torch.randn(*size, generator=generator) for size in (shape, (16, shape[1]), (shape[0], 16)))
    apart = [add_lora(base[first:last], lora_a, lora_b[first:last], 2.0) for first, last in blocks]
    assert torch.equal(torch.cat(apart), add_lora(base, lora_a, lora_b, 2.0))


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_merge_is_that_of_peft_bit_by_bit(tmp_path: Path, case: str) -> None:
    make(tmp_path, *CASES[case])
    assert merge(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().half()
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert found.dtype == torch.float16
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    theirs = tmp_path / "theirs"
    expected.save_pretrained(theirs)
    assert names(tmp_path / "merged") == names(theirs), "what serving tools look for"
    assert not merge(tmp_path), "merged twice is merged once"


def names(directory: Path) -> set[str]:
    return {name for path in directory.glob("*.safetensors") for name in load_file(path)}


RESIZED: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "untied": ("Qwen2", False, 70, {}),
    "tied": ("Qwen2", True, 70, {}),
    "a multiple of 64": ("Llama", False, 128, {}),
    "fewer": ("Qwen2", False, 60, {}),
    "a head with a bias": ("Phi", False, 70, {"target_modules": ["q_proj", "fc1"]}),
    "lora on both": ("Qwen2", False, 70, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "saved": ("Qwen2", False, 70, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a saved head": ("Qwen2", False, 70, {"modules_to_save": ["lm_head"]}),
    "token rows": ("Qwen2", False, 70, {"trainable_token_indices": {"embed_tokens": [1, 66], "lm_head": [66]}}),
    "token rows, tied": ("Qwen2", True, 70, {"trainable_token_indices": [1, 66]}),
}


@pytest.mark.parametrize(
    "case", [case if case in ("untied", "tied") else pytest.param(case, marks=pytest.mark.slow) for case in RESIZED]
)
def test_a_vocabulary_that_another_tool_resized(tmp_path: Path, case: str) -> None:
    """PEFT saves the whole embeddings then, since nobody could make the new rows again."""
    family, is_tied, num_rows, adapter = RESIZED[case]
    make(tmp_path, family, {"tie_word_embeddings": is_tied}, adapter, num_rows=num_rows)
    assert merge(tmp_path)
    model = PeftModel.from_pretrained(resized(tmp_path, num_rows), str(tmp_path / "adapter"))
    expected = model.merge_and_unload().half()
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert found.config.vocab_size == num_rows and found.config.tie_word_embeddings == is_tied
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert found.get_input_embeddings().weight[num_rows - 1].count_nonzero()
    assert not merge(tmp_path)


def test_rows_that_the_adapter_has_not_are_taken_from_the_base_that_has_them(tmp_path: Path) -> None:
    """Of resized embeddings with LoRA, PEFT saves them alone, and not the head."""
    make(tmp_path, "Qwen2", {}, {"target_modules": ["q_proj", "embed_tokens"]}, num_rows=70)
    with pytest.raises(
        MergeError, match=r"lm_head\.weight has 64 rows in the base, and the adapter was trained with 70"
    ):
        merge(tmp_path)
    torch.manual_seed(1)
    base = resized(tmp_path, 70)
    base.half().save_pretrained(tmp_path / "resized")
    build_tokenizer(["one two three"] * 3, 300).save_pretrained(tmp_path / "resized")
    assert merge(tmp_path, base=str(tmp_path / "resized"))
    expected = PeftModel.from_pretrained(base.float(), str(tmp_path / "adapter")).merge_and_unload().half()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_row_that_the_base_has_not_is_not_left_out(tmp_path: Path) -> None:
    make(tmp_path, "Qwen2", {}, {"trainable_token_indices": ROWS})
    indices = {"embed_tokens": [1], "lm_head": [66]}
    change_config(tmp_path, trainable_token_indices=indices)
    with pytest.raises(MergeError, match=r"The adapter trains row 66 of lm_head\.weight, which has 64 in the base; is"):
        merge(tmp_path)


@pytest.mark.parametrize("num_rows", [64, pytest.param(70, marks=pytest.mark.slow)])
def test_lora_on_tied_embeddings_leaves_the_head_alone(tmp_path: Path, num_rows: int) -> None:
    """As the adapter does while it is trained; PEFT's own merge changes the head as well."""
    make(tmp_path, "Qwen2", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "embed_tokens"]}, num_rows)
    merge(tmp_path, dtype_name="float32")
    base = resized(tmp_path, num_rows)
    ids = torch.arange(40)[None]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.config.tie_word_embeddings is False
    with torch.no_grad():
        before, after = base(ids).logits, found(ids).logits
        expected = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits
    assert (before - expected).abs().max() > 1e-3
    assert torch.allclose(after, expected, atol=1e-5)


def test_numbers_that_the_files_have_in_another_order_are_refused_by_name() -> None:
    """As qwen3_vl_moe's experts are: written as they are in memory, they would be loaded turned around."""
    model = AutoModelForCausalLM.from_config(transformers.Qwen2Config(**CONFIGS["Qwen2"]))
    model._weight_conversions = [WeightConverter("k_proj.weight", "k_proj.weight", operations=[Transpose(0, 1)])]
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.k_proj\.weight: the files have its"):
        plan_merge(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


def test_of_one_file_and_shards_the_one_is_read_that_transformers_loads(tmp_path: Path) -> None:
    make(tmp_path, *CASES["lora"])
    other = AutoModelForCausalLM.from_config(transformers.Qwen2Config(**CONFIGS["Qwen2"])).half()
    save_file(
        {name: tensor.clone() for name, tensor in other.state_dict().items()}, tmp_path / "base/model.safetensors"
    )
    merge(tmp_path)
    loaded, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    assert torch.equal(loaded.lm_head.weight, other.lm_head.weight)
    assert torch.equal(found.lm_head.weight, other.lm_head.weight)


def test_a_base_in_a_pickle_is_read_and_nothing_in_it_runs(tmp_path: Path) -> None:
    make(tmp_path, *CASES["lora"])
    merge(tmp_path)
    expected = {
        name: tensor for path in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    shutil.rmtree(tmp_path / "merged")
    base = tmp_path / "base"
    state = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(state, base / "pytorch_model.bin")
    merge(tmp_path)
    found = {
        name: tensor for path in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_base_that_is_asked_for_is_the_one(tmp_path: Path, world: World) -> None:
    """A run's as well: its base may have been moved."""
    launch(world.recipe("moved", train={"max_steps": 2}, run={"merge": True}), 1)
    run = world.run_directory("moved")
    shutil.copytree(world.base, tmp_path / "elsewhere")
    tensors = load_file(tmp_path / "elsewhere" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "elsewhere" / "model.safetensors", metadata={"format": "pt"})
    base = str(tmp_path / "elsewhere")
    assert merge_from_disk(find_source(run), tmp_path / "merged", base=base, max_shard_size_bytes=10**9)
    ours, of_run = (
        load_file(place / "model.safetensors")["model.norm.weight"] for place in (tmp_path / "merged", run / "merged")
    )
    assert torch.equal(ours, of_run + 1)
    before = (world.base / "model.safetensors").read_bytes()
    shutil.copy(tmp_path / "elsewhere" / "model.safetensors", world.base)
    with pytest.raises(
        MergeError, match=r"base has changed since .*adapter was trained on it; bring back the files th"
    ):
        merge_from_disk(find_source(run), tmp_path / "other", max_shard_size_bytes=10**9)
    (world.base / "model.safetensors").write_bytes(before)


def test_a_checkpoint_is_that_of_its_run_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *CASES["lora"])
    checkpoint = path_of_step(tmp_path / "run", 2)
    shutil.copytree(tmp_path / "adapter", checkpoint)
    shutil.copy(ROOT / "configs" / "recipes" / "tiny.yaml", tmp_path / "run" / "recipe.yaml")
    identity = {"precision": "bf16", "base": "sha256 1", "recipe": {"model": {"revision": None}}}
    (checkpoint / "state.json").write_text(json.dumps({"identity": identity}), encoding="utf-8")
    monkeypatch.chdir(checkpoint)
    found = find_source(Path())
    assert (found.run, found.precision, found.base_fingerprint) == (tmp_path / "run", "bf16", "sha256 1")
    (checkpoint / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(MergeError, match=r"step-000002 has no state\.json that can be read"):
        find_source(tmp_path / "run")


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (("a.safetensors", "a.bin"), {"a.safetensors"}),
        (("a.bin",), {"a.bin"}),
        (
            ("model-1.safetensors", "model-2.safetensors", "all.safetensors"),
            {"model-1.safetensors", "model-2.safetensors"},
        ),
        (("adapter_model.safetensors", "a.bin"), {"adapter_model.safetensors"}),
    ],
)
def test_of_weights_in_several_formats_one_comes_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], fetched: set[str]
) -> None:
    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for file in ("config.json", *there):
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.fetch_model("The base", "owner/name", None, MergeError)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"} | fetched


# ---- what is refused, in one sentence, and leaves nothing ----


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def an_extra_tensor(directory: Path) -> None:
    edit(
        directory / "adapter" / "adapter_model.safetensors",
        lambda tensors: tensors.update(
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2)}
        ),
    )


def a_missing_tensor(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]

    edit(directory / "adapter" / "adapter_model.safetensors", change)


def a_nan(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = torch.nan

    edit(directory / "adapter" / "adapter_model.safetensors", change)


def an_overflow(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = 1e7

    edit(directory / "adapter" / "adapter_model.safetensors", change)


def a_wrong_base(directory: Path) -> None:
    other = transformers.Qwen2Config(**CONFIGS["Qwen2"] | {"intermediate_size": 40})
    shutil.rmtree(directory / "other", ignore_errors=True)
    AutoModelForCausalLM.from_config(other).half().save_pretrained(directory / "other")
    build_tokenizer(["one two three"] * 3, 300).save_pretrained(directory / "other")
    change_config(directory, base_model_name_or_path=str(directory / "other"))


def a_truncated_shard(directory: Path) -> None:
    path = sorted(directory.glob("base/model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def a_wrong_header(directory: Path) -> None:
    path = directory / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    next(entry for name, entry in header.items() if name != "__metadata__")["shape"][0] += 1
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def a_shard_elsewhere(directory: Path) -> None:
    path = directory / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    path.write_text(json.dumps(index), encoding="utf-8")


def a_missing_shard(directory: Path) -> None:
    sorted(directory.glob("base/model-*.safetensors"))[1].unlink()


def pissa(directory: Path) -> None:
    change_config(directory, init_lora_weights="pissa")


def alora(directory: Path) -> None:
    """Which is for the tokens after these only."""
    change_config(directory, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")


FAULTS: dict[Callable[[Path], None], str] = {
    an_extra_tensor: r"layers\.9.*q_proj\.lora_A\.weight is in the adapter, and in no layer of the base \(1 such",
    a_missing_tensor: r"up_proj\.lora_B\.weight is not in the adapter \(1 such tensors\); is this the base",
    a_nan: r"layers\.1\.mlp\.up_proj\.weight is not finite in float16; set",
    an_overflow: r"layers\.1\.mlp\.up_proj\.weight is not finite in float16; set",
    a_wrong_base: r"has the shape \[.*\], and the base wants \[.*\]; is this the base",
    a_truncated_shard: r"model-00002-of-\d+\.safetensors is no whole safetensors file: it has .* bytes",
    a_wrong_header: r"adapter_model\.safetensors is no whole safetensors file: .* has .* bytes, which are not those of",
    a_shard_elsewhere: r"names '\.\./secret\.safetensors', which is not beside it",
    a_missing_shard: r"model-00002-of-\d+\.safetensors is no whole safetensors file",
    alora: r"layers\.0\.\S+: PEFT's ALoraLinearVariant layer cannot be merged",
    pissa: r"began as pissa, which changes the base as well",
}


@pytest.mark.parametrize(
    "fault",
    [
        fault
        if fault in (a_missing_tensor, an_overflow, a_truncated_shard)
        else pytest.param(fault, marks=pytest.mark.slow)
        for fault in FAULTS
    ],
    ids=lambda fault: fault.__name__,
)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    make(tmp_path, *CASES["lora"])
    fault(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MergeError, match=FAULTS[fault]) as refused:
        merge(tmp_path)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "fault",
    [
        lambda w, a, b, scaling, magnitude: w + 2 * scaling * b @ a,
        lambda w, a, b, scaling, magnitude: w + scaling * b.flip(0) @ a,
        lambda w, a, b, scaling, magnitude: (w + scaling * b @ a).flip(1),
    ],
    ids=["twice the scaling", "rows of B turned", "columns turned"],
)
def test_the_probe_finds_a_sum_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., torch.Tensor]
) -> None:
    """It is computed in another order than the merge, so that no error of that one is in both."""
    make(tmp_path, "Qwen2", {}, {})
    monkeypatch.setattr(merge_rule, "add_lora", fault)
    with pytest.raises(MergeError, match=r"for a random x the merged matrix gives .* else than base and adapter do"):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_soft_prompt_is_refused(tmp_path: Path) -> None:
    make(tmp_path, *CASES["lora"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path / "adapter")
    )
    with pytest.raises(MergeError, match="is PROMPT_TUNING, which is no weights of the base; serve the base with"):
        merge(tmp_path)


def test_another_merge_is_not_written_over_unasked(tmp_path: Path) -> None:
    make(tmp_path, *CASES["lora"])
    merge(tmp_path)
    with pytest.raises(MergeError, match="merged is there and is another merge; give another --output, or --overwrite"):
        merge(tmp_path, dtype_name="bfloat16")
    assert merge(tmp_path, dtype_name="bfloat16", overwrite=True)
    assert all(
        tensor.dtype == torch.bfloat16
        for tensor in load_file(next((tmp_path / "merged").glob("*.safetensors"))).values()
    )


# ---- what ends a merge in the middle: the fault matrix, row 16 ----


def interrupted_at(number: int, directory: Path) -> int:
    """`merge`; the process kills itself before the `number`th thing that it does on the disk."""
    return killed_before(number, "merged", lambda: merge(directory))


def model_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.slow
def test_killed_at_any_file_a_merge_is_whole_or_not_there_and_runs_again(tmp_path: Path) -> None:
    make(tmp_path, *CASES["lora"])
    (num_moments,) = run_ranks(1, interrupted_at, 0, tmp_path)
    expected = model_files(tmp_path / "merged")
    assert num_moments >= len(expected) > 8
    for number in range(1, num_moments + 1):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(1, interrupted_at, number, tmp_path)
        assert not (tmp_path / "merged").exists() or model_files(tmp_path / "merged") == expected
        merge(tmp_path)
        assert model_files(tmp_path / "merged") == expected
        assert not list(tmp_path.glob(".*")), "nothing is left over"


def with_small_files(directory: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
    with pytest.raises(MergeError) as refused:
        merge(directory)
    return str(refused.value)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path, *CASES["lora"])
    before = sorted(path.name for path in tmp_path.iterdir())
    (said,) = run_ranks(1, with_small_files, tmp_path)
    assert "merged could not be written: File too large; nothing was kept, and the same command begins it again" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_the_command(world: World) -> None:
    launch(world.recipe("command", train={"max_steps": 2}, run={"merge": True}), 1)
    run = world.run_directory("command")
    code, out, _ = python_m_launch("merge", run)
    assert (code, out) == (0, f"{run / 'merged'}: already merged, and whole.\n")
    before = model_files(run / "merged")["model.safetensors"]
    shutil.rmtree(run / "merged")
    code, out, _ = python_m_launch("merge", run)
    assert code == 0 and "Serve it, for instance with: vllm serve" in out
    assert model_files(run / "merged")["model.safetensors"] == before
    checkpoint = path_of_step(run, 2)
    code, _, error = python_m_launch("merge", checkpoint)
    assert code == 2 and error == f"Refused: {checkpoint} is no run, whose merged/ would be the place; give --output.\n"
    code, out, _ = python_m_launch("merge", checkpoint, "--output", run / "again", "--dtype", "bfloat16")
    assert code == 0 and load_file(run / "again" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    code, _, error = python_m_launch("merge", run, "--max-shard-size", "many")
    assert code == 2 and "--max-shard-size 'many' is no size; write 4GB or 500MB" in error
    code, _, error = python_m_launch("merge", world.base, "--output", run / "no")
    assert code == 2 and "has no adapter_config.json; give a run, one of its checkpoints, or a directory that" in error
