"""The files of a base and its tokenizer: what is broken, unsafe or does not fit is named before a weight is read."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import World, run_ranks
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from test_cli import python_m_launch
from test_prepare import COMMIT, NAME, Hub
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from launch import runs
from launch.attention import attention_in_use
from launch.config import load_recipe
from launch.errors import ConfigError, MergeError, ModelError
from launch.findings import Finding
from launch.merge_from_disk import find_source, merge_from_disk
from launch.model import load_base, tokenizer_and_template
from launch.model_files import find_model_files, find_positions
from launch.recipe import ModelBlock
from launch.shards import find_code_in_pickles, read_model
from launch.token_findings import find_token_faults

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5000000000\n"


def write_base(directory: Path, config: dict[str, Any] | None = None) -> Path:
    """Two shards of two tensors each, and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", **(config or {})}), encoding="utf-8")
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        tensors = {f"layers.{number}.{name}": np.ones((4, 3), np.float16) for name in ("up", "down")}
        save_file(tensors, directory / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: object, **more: object) -> None:
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map, **more}
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


def found_in(directory: Path, commit: str | None = None) -> list[Finding]:
    return list(find_model_files("the base", directory, commit))


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The same file with another header."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


# ---- files that are broken ----


def truncated(base: Path) -> None:
    path = base / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-10])


def too_long(base: Path) -> None:
    path = base / SHARDS[1]
    path.write_bytes(path.read_bytes() + b"\0")


def ends_in_its_header(base: Path) -> None:
    path = base / SHARDS[1]
    path.write_bytes(path.read_bytes()[:20])


def a_header_without_end(base: Path) -> None:
    (base / SHARDS[1]).write_bytes(b"\xff" * 100)


def a_header_of_words(base: Path) -> None:
    (base / SHARDS[1]).write_bytes((4).to_bytes(8, "little") + b"abcd")


def a_header_of_numbers(base: Path) -> None:
    with_header(base / SHARDS[1], lambda header: header.update({"layers.1.up": 3}))


def a_place_before_the_file(base: Path) -> None:
    with_header(base / SHARDS[1], lambda header: header["layers.1.up"].update(data_offsets=[-8, 16]))


def a_shape_that_is_another(base: Path) -> None:
    with_header(base / SHARDS[1], lambda header: header["layers.1.up"].update(shape=[4, 4]))


def empty(base: Path) -> None:
    (base / SHARDS[1]).write_bytes(b"")


def missing(base: Path) -> None:
    (base / SHARDS[1]).unlink()


def broken_off(base: Path) -> None:
    (base / SHARDS[1]).unlink()
    leftover = base / ".cache" / "huggingface" / "download" / "abc.incomplete"
    leftover.parent.mkdir(parents=True)
    leftover.touch()


def broken_off_by_aria2(base: Path) -> None:
    """Which gives a file its full length before it has its content."""
    (base / f"{SHARDS[1]}.aria2").touch()


def a_link_to_nothing(base: Path) -> None:
    (base / SHARDS[1]).unlink()
    (base / SHARDS[1]).symlink_to("/nowhere/model.safetensors")


def two_pointers(base: Path) -> None:
    for name in (*SHARDS, "tokenizer.model"):
        (base / name).write_text(POINTER, encoding="utf-8")


def a_shard_of_another_model(base: Path) -> None:
    save_file({"layers.1.up": np.ones((4, 3), np.float16)}, base / SHARDS[1])


def an_index_that_leads_out(base: Path) -> None:
    save_file({"a": np.ones(2, np.float16)}, base.parent / "evil.safetensors")
    write_index(base, {"a": "../evil.safetensors"})


def an_index_that_leads_to_the_root(base: Path) -> None:
    write_index(base, {"a": "/etc/evil.safetensors"})


def an_index_of_safetensors_that_names_a_pickle(base: Path) -> None:
    write_index(base, {"a": "evil.bin"})


def an_index_of_nothing(base: Path) -> None:
    write_index(base, {})


def an_index_of_numbers(base: Path) -> None:
    write_index(base, {"a": 1})


def an_index_that_transformers_cannot_read(base: Path) -> None:
    write_index(base, {"layers.0.up": SHARDS[0]}, metadata=None)


def an_index_cut_off(base: Path) -> None:
    (base / INDEX).write_text('{"weight_map": {', encoding="utf-8")


def no_weights(base: Path) -> None:
    for name in (INDEX, *SHARDS):
        (base / name).unlink()
    (base / "model-q4.gguf").touch()


def shards_of_ranks(base: Path) -> None:
    shutil.copy(base / SHARDS[0], base / "shard-00001-model-00001-of-00002.safetensors")


def an_adapter_of_its_own(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}", encoding="utf-8")


def weights_by_another_name(base: Path) -> None:
    write_base(base, {"transformers_weights": "../evil.safetensors"})


def quantised(base: Path) -> None:
    write_base(base, {"quantization_config": {"quant_method": "gptq", "bits": 4}})


def quantised_by_bitsandbytes(base: Path) -> None:
    write_base(base, {"text_config": {"quantization_config": {"load_in_4bit": True}}})


def quantised_as_chatglm_is(base: Path) -> None:
    write_base(base, {"quantization_bit": 4})


def packed_without_a_word(base: Path) -> None:
    with_header(base / SHARDS[1], lambda header: header["layers.1.up"].update(dtype="F8_E4M3", shape=[4, 6]))


FAULTS: dict[Callable[[Path], None], str] = {
    truncated: f"{SHARDS[1]} cannot be used: it has [0-9,]+ bytes, and its header speaks of [0-9,]+; fetch it again",
    too_long: f"{SHARDS[1]} cannot be used: it has [0-9,]+ bytes, and its header speaks of [0-9,]+; fetch it again",
    ends_in_its_header: f"{SHARDS[1]} cannot be used: it ends in its header",
    a_header_without_end: f"{SHARDS[1]} cannot be used: it has no header",
    a_header_of_words: f"{SHARDS[1]} cannot be used: its header is no JSON",
    a_header_of_numbers: f"{SHARDS[1]} cannot be used: its header is none of a safetensors file",
    a_place_before_the_file: f"{SHARDS[1]} cannot be used: layers.1.up has a shape or a place that is none",
    a_shape_that_is_another: f"{SHARDS[1]} cannot be used: layers.1.up has 24 bytes, which are not those of its shape",
    empty: f"{SHARDS[1]} cannot be used: it is empty; fetch it again",
    missing: f"{SHARDS[1]} is missing; fetch it again",
    broken_off: f"{SHARDS[1]} is missing, and abc.incomplete says that a download was broken off; fetch it again",
    broken_off_by_aria2: f"{SHARDS[1]} has not been fetched to its end, as {SHARDS[1]}.aria2 beside it says",
    a_link_to_nothing: f"{SHARDS[1]} is a link to a file that is missing",
    two_pointers: rf"{SHARDS[0]} \(and 2 more\) is a git-LFS pointer and not the file; run git lfs pull there",
    a_shard_of_another_model: f"{SHARDS[1]} has no layers.1.down, which {INDEX} puts there",
    an_index_that_leads_out: r"json is no index that can be used: it names '\.\./evil.safetensors', which is not besi",
    an_index_that_leads_to_the_root: r"it names '/etc/evil.safetensors', which is not beside it",
    an_index_of_safetensors_that_names_a_pickle: "it names 'evil.bin', which is no .safetensors file",
    an_index_of_nothing: "it names no file",
    an_index_of_numbers: "it has no weight_map from tensors to files",
    an_index_that_transformers_cannot_read: "it has no metadata, without which transformers does not read it",
    an_index_cut_off: f"{INDEX} is no index that can be used: Expecting",
    no_weights: r"has no weights that transformers loads: .* It has model-q4.gguf, which transformers does not load",
    shards_of_ranks: r"has the shards of ranks \(shard-\*.safetensors\), which transformers loads before model",
    an_adapter_of_its_own: "the base has an adapter_config.json beside its config.json, .* merge it first, or move",
    weights_by_another_name: r"names the file of its weights itself \(transformers_weights = '../evil.safetensors'\)",
    quantised: r"weights of the base are quantised already \(gptq, 4 bits\), .*; name those in model.name_or_path, and",
    quantised_by_bitsandbytes: r"quantised already \(bitsandbytes, 4 bits\)",
    quantised_as_chatglm_is: r"quantised already \(quantization_bit, 4 bits\)",
    packed_without_a_word: rf"quantised already \(layers.1.up of {SHARDS[1]} is in F8_E4M3\)",
}


def test_a_base_that_is_whole_has_no_findings(tmp_path: Path) -> None:
    assert found_in(write_base(tmp_path)) == []
    (tmp_path / "leftover.incomplete").touch()
    assert found_in(tmp_path) == [], "of a download that was repeated"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_wrong_with_the_files_is_one_sentence(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    base = write_base(tmp_path / "base")
    fault(base)
    (found,) = found_in(base)
    assert found.stops and found.error is ModelError
    with pytest.raises(ModelError, match=FAULTS[fault]):
        raise found.error(found.sentence)
    assert "\n" not in found.sentence and found.sentence.endswith(".")


def test_all_that_is_wrong_is_found_at_once(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"quantization_config": {"quant_method": "awq"}})
    missing(base)
    (base / SHARDS[0]).write_bytes(b"")
    assert len(found_in(base)) == 3


def test_of_several_files_those_are_looked_at_that_are_loaded(tmp_path: Path) -> None:
    """transformers takes one file before an index, and safetensors before pickles; so does the merge."""
    base = write_base(tmp_path)
    truncated(base)
    (base / "pytorch_model.bin").write_bytes(b"")
    save_file({"a": np.ones(2, np.float16)}, base / "model.safetensors")
    assert found_in(base) == [] and set(read_model(base)) == {"a"}


# ---- pickles ----


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, wire: Path) -> None:
        self.wire = wire

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.wire),)


@pytest.fixture
def evil(world: World, tmp_path: Path) -> tuple[Path, Path]:
    """(a whole base with its weights in a pickle that has code in it, what that code leaves behind)."""
    base, wire = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(world.base, base)
    weights = {name: torch.from_numpy(tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    torch.save({**weights, "more": Evil(wire)}, base / "pytorch_model.bin")
    return base, wire


def test_code_in_a_pickle_is_refused_and_never_runs(
    evil: tuple[Path, Path], world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the check, at the start of a job, and by what loads and merges, should both be left out."""
    base, wire = evil
    recipe = world.recipe("evil", model={"name_or_path": str(base)})
    sentence = f"Refused: {base}/pytorch_model.bin holds more than tensors (posix.mkdir), and code is not unpickled"
    code, out, err = python_m_launch("check", recipe)
    assert code == 2 and err.startswith(sentence) and "Note: " in out and "pickles only (pytorch_model.bin)" in out
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert sentence in capfd.readouterr().err
    assert runs.read_status(world.run_directory("evil"))["state"] == "refused"
    with pytest.raises(ModelError, match=r"holds more in its pickles than tensors, and code is not unpickled"):
        load_base(str(base), load_recipe(recipe).model, "fp32")
    with pytest.raises(MergeError, match="cannot be read weights-only"):
        read_model(base)
    assert not wire.exists()
    torch.load(base / "pytorch_model.bin", weights_only=False)
    assert wire.exists(), "the tripwire works"


def test_pickles_are_a_note_and_half_a_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(300)}, path)
    (note,) = found_in(tmp_path)
    assert not note.stops and "in pickles only (pytorch_model.bin); they are read weights-only" in note.sentence
    assert list(find_code_in_pickles(tmp_path)) == []
    path.write_bytes(path.read_bytes()[:-500])
    assert "pytorch_model.bin cannot be used: it is cut off" in found_in(tmp_path)[0].sentence
    assert list(find_code_in_pickles(tmp_path)) == [], "said above"


# ---- a base on the hub ----


@pytest.fixture
def snapshot(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of owner/tiny in the hub's cache, as links into its blobs, without a network."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    place = repository / "snapshots" / COMMIT
    for folder in (place, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(world.base.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (place / path.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return place


def test_a_snapshot_is_links_and_is_fetched_anew_when_it_is_not_whole(snapshot: Path, world: World) -> None:
    recipe = world.recipe("snapshot", model={"name_or_path": NAME})
    assert python_m_launch("check", recipe)[0] == 0
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    code, _, err = python_m_launch("check", recipe)
    assert code == 2 and "model.safetensors cannot be used: it has " in err
    assert f"; remove {snapshot.parent.parent} and run python -m launch prepare.\n" in err
    (snapshot / "model.safetensors").unlink()
    code, _, err = python_m_launch("check", recipe)
    assert (code, err) == (
        2,
        f"Refused: The weights of {NAME} at {COMMIT} are not all in the cache, and HF_HUB_OFFLINE forbids to ask the "
        "hub; fetch them with python -m launch prepare where there is a network.\n",
    )


@contextmanager
def served(files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has these files as owner/tiny, and a cache with config.json alone."""
    with Hub({f"models/{NAME}": files}) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield hub
        hub.shutdown()


LISTINGS: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "whole": ({"model.safetensors": b"x"}, []),
    "none": ({"weights.gguf": b"x"}, [f"owner/tiny at {COMMIT} has no weights that transformers loads: "]),
    "empty": ({"model.safetensors": b""}, [f"owner/tiny at {COMMIT}: model.safetensors is empty; choose another base"]),
    "pickles": ({"pytorch_model.bin": b"x"}, ["has its weights in pickles only (pytorch_model.bin)"]),
    "a shard is missing": (
        {
            INDEX: json.dumps({"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
            SHARDS[0]: b"x",
        },
        [f": {SHARDS[1]} is not there; choose another base"],
    ),
    "an index that leads out": (
        {INDEX: json.dumps({"metadata": {}, "weight_map": {"a": "../evil.safetensors"}}).encode()},
        ["is no index that can be used: it names '../evil.safetensors', which is not beside it"],
    ),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_what_the_hub_lists_is_looked_at_before_a_weight_is_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, sentences = LISTINGS[name]
    directory = tmp_path / "models--owner--tiny" / "snapshots" / COMMIT
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}", encoding="utf-8")
    with served({"config.json": b"{}", **files}, tmp_path, monkeypatch) as hub:
        found = list(find_model_files(NAME, directory, COMMIT))
        assert len(found) == len(sentences)
        for finding, sentence in zip(found, sentences, strict=True):
            assert sentence in finding.sentence
        assert not [file for file in hub.fetched if not file.endswith(".json")]


# ---- what the base is, and its merge ----


def test_a_merge_names_how_the_base_is_quantised(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    model = Qwen2ForCausalLM(small_config())
    model.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    lora.save_pretrained(adapter)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}), encoding="utf-8")
    with pytest.raises(MergeError, match=r"base are quantised already \(fp8\), .*; give those with --base\.$"):
        merge_from_disk(find_source(adapter), tmp_path / "merged")
    path.write_text(json.dumps(config), encoding="utf-8")
    weights = tmp_path / "base" / "model.safetensors"
    with_header(weights, lambda header: header["lm_head.weight"].update(dtype="F8_E4M3", shape=[64, 128]))
    with pytest.raises(MergeError, match=r"lm_head\.weight is in F8_E4M3, and an adapter can only be merged into F64,"):
        merge_from_disk(find_source(adapter), tmp_path / "merged")


def small_config(**values: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        **values,
    )


@pytest.mark.parametrize(
    ("config", "virtual", "sentence"),
    [
        ({"max_position_embeddings": 128}, 0, ""),
        ({"max_position_embeddings": 127}, 0, r"data\.max_length = 128 is more than the 127 positions of x \(max_pos"),
        ({"n_positions": 130}, 10, r"128 and 10 virtual tokens is more than the 130 positions of x \(n_positions\)"),
        ({"text_config": {"max_position_embeddings": 64}, "model_max_length": 500}, 0, "more than the 64 positions"),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32},
            },
            0,
            "",
        ),
        ({"max_position_embeddings": None}, 0, ""),
    ],
)
def test_rows_longer_than_the_positions_are_a_note(config: dict[str, Any], virtual: int, sentence: str) -> None:
    found = list(find_positions("x", config, 128, virtual))
    assert [finding.stops for finding in found] == [False] * bool(sentence)
    assert not sentence or re.search(sentence, found[0].sentence)


# ---- the tokenizer ----


def token_faults(world: World, template: str, model: dict[str, Any] | None = None, **config: Any) -> list[Finding]:
    recipe = load_recipe(world.recipe("tokens", data={"template": template}, model=model or {}))
    return list(find_token_faults(*tokenizer_and_template(recipe), config, recipe.model))


def test_marks_that_the_tokenizer_has_not_are_a_note(world: World) -> None:
    assert token_faults(world, "chatml") == [], "it has all of them"
    assert token_faults(world, "plain") == [], "it has none"
    (note,) = token_faults(world, "llama3")
    assert not note.stops
    assert "The template llama3 writes <|start_header_id|>, <|end_header_id|>, which this tokenizer" in note.sentence
    assert "eot_id" not in note.sentence, "the end of an answer is refused elsewhere"
    added = {"extra_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    assert token_faults(world, "llama3", added) == []


def test_tokens_without_a_row_are_refused(world: World) -> None:
    num_tokens = len(tokenizer_and_template(load_recipe(world.recipe("rows")))[0])
    assert token_faults(world, "chatml", vocab_size=num_tokens) == []
    (found,) = token_faults(world, "chatml", vocab_size=num_tokens - 2)
    assert found.stops and f"has tokens up to id {num_tokens - 1}, but the model has {num_tokens - 2} rows" in (
        found.sentence
    )
    assert token_faults(world, "chatml", {"extra_special_tokens": ["<new>"]}, vocab_size=num_tokens - 2) == []
    tokenizer, template = tokenizer_and_template(load_recipe(world.recipe("rows")))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = ModelBlock(name_or_path="x")
    assert list(find_token_faults(tokenizer, template, {"vocab_size": num_tokens}, model)) == [], "padding needs none"


# ---- attention ----


def test_flash_attention_gets_a_sentence_of_its_own(world: World) -> None:
    recipe = world.recipe("flash", model={"attn_implementation": "flash_attention_2"})
    sentence = r"model\.attn_implementation: flash_attention_2 needs .* V100 .*; write sdpa, .* are sdpa, eager\.$"
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(recipe)
    with pytest.raises(ConfigError, match=r"= 'flex' is not valid: input should be 'sdpa' or 'eager'"):
        load_recipe(recipe, ["model.attn_implementation=flex"])


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_the_attention_that_was_asked_for_is_in_use(world: World, asked: str) -> None:
    model = load_base(str(world.base), ModelBlock(name_or_path="x", attn_implementation=asked), "fp32")
    assert attention_in_use(model, asked) == (True, f"{asked}, as the recipe says (Qwen2Attention)")


def test_another_attention_than_asked_for_is_seen(world: World) -> None:
    """As a quantiser of transformers, or a module with a config of its own, may choose it."""
    model = Qwen2ForCausalLM(small_config(attn_implementation="eager"))
    assert attention_in_use(model, "sdpa") == (False, "eager (Qwen2Attention)")
    assert attention_in_use(torch.nn.Linear(2, 2), "sdpa") == (
        True,
        "of the model's own code (Linear), which is not told what model.attn_implementation says",
    )


# ---- all of it together ----


def test_check_and_a_start_say_all_that_is_wrong_with_a_base(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    changed = config | {"max_position_embeddings": 100, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    recipe = world.recipe("wrong", model={"name_or_path": str(base)}, adapter={"target_modules": ["no_such"]})
    code, out, err = python_m_launch("check", recipe)
    assert code == 2 and out.startswith(f"Note: data.max_length = 128 is more than the 100 positions of {base} (max_p")
    for number, part in enumerate(("quantised already (awq, 4 bits)", "model.safetensors cannot be", "no_such"), 1):
        line = err.splitlines()[number]
        assert line.startswith(f"  {number}. ") and part in line, err
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    said = capfd.readouterr()
    assert "\n  1. The weights of " in said.err and "\n  2. " in said.err and "Note: data.max_length" in said.out
    assert runs.read_status(world.run_directory("wrong"))["state"] == "refused"
