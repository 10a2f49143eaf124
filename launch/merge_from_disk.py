"""The same merge from disk: no GPU, no other process, and of the base only the rows that are being written.

The model is built without weights and given its adapter, so that the plan is the live engine's; each number then comes
from a file. The base is read where it is and never written.
"""

import glob
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from launch import checkpoint as checkpoints
from launch import merge as merging
from launch.adapter import ADAPTER_NAME, CONFIG_FILE, WEIGHTS_FILE
from launch.config import load_recipe
from launch.errors import CheckpointError, MergeError
from launch.fingerprint import fingerprint_base
from launch.hub import fetch_model
from launch.merge_output import check_replaceable, place_of
from launch.merge_plan import plan_merge
from launch.merge_rule import Part, Pieces, choose_dtype
from launch.model import (
    DTYPES,
    added_token_ids,
    build_skeleton,
    resolve_base,
    serving_generation_config,
)
from launch.parity import Compare, Unmerged, check_logits
from launch.preflight import with_revision
from launch.recipe import SHARD_BYTES, ModelBlock, Recipe
from launch.remote_code import check_remote_code
from launch.runs import DELETING, SAVING, newest_step, read_json
from launch.saved_embeddings import is_saved_twice, keys_of_base, resize_as_saved, whole_embedding
from launch.shapes import read_config
from launch.shards import Stored, read_model, read_safetensors
from launch.vocabulary import add_rows, own_rows, row_names, set_token_ids, with_mean
from launch.weight_files import quantised_as

# Ways to begin that take something away from the base, which is then not the one on disk.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Source:
    """An adapter on disk: a run's, a checkpoint's, or any that PEFT saved."""

    adapter: Path  # the directory with adapter_config.json
    run: Path | None  # that it belongs to
    recipe: Recipe | None  # of that run
    precision: str | None  # that it was trained in
    stop_tokens: tuple[str, ...]  # that ended the trained answers; empty for what is no run's
    base_fingerprint: str | None  # of the base that the run began with


def find_source(path: Path) -> Source:
    """A run, one of its checkpoints, or a directory that PEFT wrote. Raises MergeError for anything else."""
    path = path.absolute()  # of ".", nobody would know the run
    run = next((place for place in (path, path.parent) if (place / "recipe.yaml").is_file()), path.parent.parent)
    recipe = load_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None
    directory = path / "adapter" if path == run and (path / "adapter").is_dir() else path
    precision, stop_tokens, base_fingerprint = None, (), None
    if recipe is not None:
        newest = newest_step(run)
        if path == run and not (path / "adapter").is_dir() and newest:
            directory = checkpoints.path_of_step(run, newest)
        if newest:
            state = read_json(checkpoints.path_of_step(run, newest) / "state.json")
            if "identity" not in state:
                raise MergeError(
                    f"{checkpoints.path_of_step(run, newest)} has no state.json that can be read, which says what the "
                    "run was trained on; run train.py again, which sets a damaged checkpoint aside."
                )
            precision, base_fingerprint = state["identity"]["precision"], state["identity"]["base"]
            recipe = with_revision(recipe, state["identity"]["recipe"]["model"]["revision"])  # that it began with
        if (run / "data_report.json").is_file():  # none: nothing was prepared, and there is no adapter either
            report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))
            stop_tokens = tuple(report["answers"]["stop_tokens"])
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise MergeError(
                f"{directory} has no {name}; give a run, one of its checkpoints, or a directory that PEFT's "
                "save_pretrained wrote."
            )
    if (directory / "manifest.json").is_file():
        try:
            checkpoints.verify(directory)
        except CheckpointError as error:
            raise MergeError(str(error)) from None
    return Source(directory, None if recipe is None else run, recipe, precision, stop_tokens, base_fingerprint)


def merge_from_disk(
    source: Source,
    target: Path,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    dtype_name: str | None = None,
    max_shard_size_bytes: int | None = None,
    overwrite: bool = False,
    compare: Compare = check_logits,
) -> bool:
    """Merge into `target`, which appears whole or not at all; False when this very merge is there already.

    Raises MergeError for an adapter that does not fit the base tensor by tensor, and for an output that is something
    else, unless `overwrite`.
    """
    if max_shard_size_bytes is None:
        max_shard_size_bytes = SHARD_BYTES if source.recipe is None else source.recipe.run.max_shard_size_bytes
    peft_config = _peft_config(source.adapter)
    name, settings = _base(source, base, peft_config, trust_remote_code)
    directory, commit = fetch_model("The base", name, settings.revision, MergeError)
    check_remote_code(settings, directory, commit, consent="give --trust-remote-code")
    target = place_of(target, base=directory, adapter=source.adapter)
    if quantised := quantised_as(read_config(directory / "config.json")):
        raise MergeError(
            f"The weights of {name} are quantised already ({quantised}), and an adapter can only be merged into the "
            "ones that they were made of; give those with --base."
        )
    stored = read_model(directory)
    trained = read_safetensors(source.adapter / WEIGHTS_FILE)
    fingerprint = fingerprint_base(name, settings)
    if base is None and source.base_fingerprint not in (None, fingerprint):
        raise MergeError(
            f"{name} has changed since {source.adapter} was trained on it; bring back the files that it had, or name "
            "the base to merge into with --base."
        )
    dtype_name = dtype_name or _dtype_name(source, stored)
    facts = merging.facts_of(source.adapter / WEIGHTS_FILE, name, fingerprint, max_shard_size_bytes)
    if _is_there(target, {"dtype": dtype_name, **facts}, overwrite):
        return False

    tokenizer = _tokenizer(source, directory, settings)
    added = added_token_ids(tokenizer, str(directory), settings) if source.recipe else set()
    skeleton, own = _skeleton(directory, settings, tokenizer, added, trained)
    by_token, names = row_names(skeleton), _names(skeleton)
    model = get_peft_model(
        skeleton, peft_config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True
    )
    keys = _keys(model, trained, by_token)
    parts, ties = plan_merge(model)
    of_base = {key: tensor for key, tensor in trained.items() if key not in keys.values()}
    precision = None if source.precision is None else DTYPES[source.precision]
    parts, on_disk = _on_disk(parts, stored, of_base, skeleton.base_model_prefix, by_token, names, own, precision)
    for start in (SAVING, DELETING):
        # Of a merge that was killed; that into OUT-2 has another name.
        for path in target.parent.glob(f"{start}{glob.escape(target.name)}-{'[0-9a-f]' * 8}"):
            shutil.rmtree(path, ignore_errors=True)
    store = None if source.run is None else source.run / "data"
    unmerged = Unmerged(str(directory), settings, precision or torch.float32, tokenizer, source.adapter, store)
    merging.write_merged(
        target,
        parts,
        ties,
        lambda part: _from_disk(part, on_disk, keys, trained),
        base=skeleton,
        tokenizer=tokenizer,
        generation_config=_generation_config(source, skeleton, tokenizer),
        dtype_name=dtype_name,
        max_shard_size_bytes=max_shard_size_bytes,
        facts=facts,
        check=lambda written: compare(written, unmerged, dtype_name),
    )
    return True


def _skeleton(
    directory: Path,
    settings: ModelBlock,
    tokenizer: PreTrainedTokenizerBase,
    added: Set[int],
    trained: Mapping[str, Stored],
) -> tuple[PreTrainedModel, list[int]]:
    """(the base without its weights but with rows for what was added, the rows that it had, if some were)."""
    skeleton = build_skeleton(str(directory), settings)
    if skeleton is None:
        raise MergeError(
            f"{directory}: its model cannot be made without weights, so it merges at the end of a run only."
        )
    if (directory / "generation_config.json").is_file():
        skeleton.generation_config = GenerationConfig.from_pretrained(str(directory))
    set_token_ids(skeleton, tokenizer, settings)
    own = own_rows(skeleton, tokenizer, added) if added else []
    add_rows(skeleton, added)
    resize_as_saved(skeleton, trained)
    skeleton.tie_weights()
    return skeleton, own


def _names(skeleton: PreTrainedModel) -> dict[int, list[str]]:
    """Of each parameter, by identity; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _peft_config(directory: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise MergeError(f"{directory} is {kind}, which is no weights of the base; serve the base with the adapter.")
    began = str(config.init_lora_weights).lower()
    if began.startswith(CHANGES_THE_BASE):
        raise MergeError(
            f"{directory} began as {config.init_lora_weights}, which changes the base as well; save it with PEFT's "
            "path_initial_model_for_weight_conversion, and merge that."
        )
    config.init_lora_weights = True  # what it begins with is not looked at
    config.inference_mode = False  # so that what is trained can be told from the base
    return config


def _base(source: Source, base: str | None, config: LoraConfig, trust_remote_code: bool) -> tuple[str, ModelBlock]:
    """(where the base is, how it is read): the one that is asked for, the run's, or that of the adapter's config."""
    if source.recipe is None:
        name, revision = (base, None) if base else (str(config.base_model_name_or_path), config.revision)
        return name, ModelBlock(name_or_path=name, revision=revision, trust_remote_code=trust_remote_code)
    if source.recipe.model.factory is not None:
        raise MergeError(f"{source.adapter}: a model of a factory is merged at the end of its run only.")
    if source.recipe.model.load_in_4bit and getattr(source.recipe.adapter, "use_dora", False):
        raise MergeError(
            f"{source.adapter}: DoRA learned magnitudes of the weights as they are in 4 bits, so that it cannot be "
            "merged into those in 16 bits; serve the base in 4 bits with the adapter."
        )
    settings = source.recipe.model.model_copy(update={"load_in_4bit": False})
    if base is None:
        return str(resolve_base(source.recipe)), settings
    return base, settings.model_copy(update={"name_or_path": base, "revision": None})


def _dtype_name(source: Source, stored: Mapping[str, Stored]) -> str:
    """The recipe's, as at the end of the run; for another adapter the base's own, if it has 16 bits."""
    if source.recipe is not None and source.precision is not None:
        return choose_dtype(source.recipe.run.merge_dtype, source.precision)
    types = {tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point}
    return "bfloat16" if types == {torch.bfloat16} else "float16"


def _is_there(target: Path, facts: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether this merge stands in `target`. Raises MergeError when something else does.

    Another merge may, with `overwrite`.
    """
    if not target.exists() or not any(target.iterdir()):
        return False
    try:
        checkpoints.verify(target)
        report = json.loads((target / "merge_report.json").read_text(encoding="utf-8"))
        if all(report.get(name) == value for name, value in facts.items()):
            return True
        found = "another merge"
    except (CheckpointError, OSError, ValueError):
        found = "a merge whose files have changed"
    check_replaceable(target)
    if not overwrite:
        raise MergeError(f"{target} is there and is {found}; give another --output, or --overwrite.")
    return False


def _tokenizer(source: Source, base: Path, settings: ModelBlock) -> PreTrainedTokenizerBase:
    has_its_own = (source.adapter / "tokenizer_config.json").is_file()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(source.adapter if has_its_own else base), trust_remote_code=settings.trust_remote_code
    )
    return tokenizer


def _generation_config(
    source: Source, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    ends = source.stop_tokens or tuple(filter(None, [tokenizer.eos_token]))
    return serving_generation_config(skeleton, [int(tokenizer.convert_tokens_to_ids(end)) for end in ends])


def _keys(model: PeftModel, trained: Mapping[str, Stored], by_token: Set[str]) -> dict[int, str]:
    """Of each trained parameter, by identity, the name in the adapter's file: every one is there, and nothing else.

    PEFT adds the base's whole embeddings to some, and then what it saves of them stands there twice.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    expected = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    missing = sorted(expected.keys() - trained.keys())
    of_base = {key for name in by_token for key in keys_of_base(name)}
    extra = sorted(trained.keys() - expected.keys() - of_base)
    extra = [key for key in extra if not is_saved_twice(key, expected.keys() - missing, trained)]
    for fault, keys in (("is not in the adapter", missing), ("is in the adapter, and in no layer of the base", extra)):
        if keys:
            raise MergeError(f"{keys[0]} {fault} ({len(keys)} such tensors); is this the base it was trained on?")
    for key, parameter in expected.items():
        if tuple(parameter.shape) != trained[key].shape:
            raise MergeError(
                f"{key} has the shape {list(trained[key].shape)}, and the base wants {list(parameter.shape)}; is this "
                "the base it was trained on?"
            )
    return {id(parameter): key for key, parameter in expected.items()}


def _on_disk(
    parts: Sequence[Part],
    stored: Mapping[str, Stored],
    of_base: Mapping[str, Stored],  # what PEFT has saved of it, in the place of what is stored
    prefix: str,
    by_token: Set[str],
    own_names: Mapping[int, Sequence[str]],  # of the base's parameters, by identity; several for tied ones
    own: Sequence[int],  # the rows that the base was trained with, if the run has added some
    precision: torch.dtype | None,  # of the run
) -> tuple[list[Part], dict[str, Stored]]:
    """(the parts under the names of the base's files, by name what each is made of).

    Files of older models leave the first part of the names out, or have one more. What transformers fuses on loading
    stays as it is in the files. Of tied tensors, which are one, the files may have the first only.
    """
    renamed, found = [], {}
    for part in parts:
        if part.base is None:
            renamed.append(part)
            continue
        if part.tokens is not None and max(part.tokens.token_indices[ADAPTER_NAME]) >= part.shape[0]:
            raise MergeError(
                f"The adapter trains row {max(part.tokens.token_indices[ADAPTER_NAME])} of {part.name}, which has "
                f"{part.shape[0]} in the base; is this the base it was trained on?"
            )
        is_apart = len(part.published) > 1 and part.slabs  # and written together, as it is from the live engine
        if is_apart:
            renamed.append(part)
        for name, shape in part.published:
            ties = [tie for tie in own_names.get(id(part.base), ()) if tie != part.name]
            candidates = [c for n in (name, *ties) for c in (n, n.removeprefix(f"{prefix}."), f"{prefix}.{n}")]
            tensor = next((stored[known] for known in candidates if known in stored), None)
            saved = (whole_embedding(known, of_base) for known in (part.name, *ties))
            tensor = next(filter(None, saved), tensor)
            if tensor is None:
                raise MergeError(f"{name} is in no file of the base; is this the base the adapter was trained on?")
            is_longer = part.name in by_token and tensor.shape[0] < shape[0] and tensor.shape[1:] == shape[1:]
            if is_longer and not own:
                raise MergeError(
                    f"{name} has {tensor.shape[0]} rows in the base, and the adapter was trained with {shape[0]}, of "
                    "which it has not saved the others; give the base that was resized with --base."
                )
            if tensor.shape != shape and not is_longer:
                raise MergeError(
                    f"{name} has the shape {list(tensor.shape)} in the base, and the adapter wants {list(shape)}; is "
                    "this the base it was trained on?"
                )
            is_fused = len(part.published) > 1
            base = torch.empty(shape, dtype=tensor.dtype, device="meta") if is_fused else part.base
            if not is_apart:
                renamed.append(replace(part, name=name, base=base, published=((name, shape),)))
            found[name] = _as_trained(tensor, shape, own if part.name in by_token else (), precision)
    return renamed, found


def _as_trained(tensor: Stored, shape: tuple[int, ...], own: Sequence[int], precision: torch.dtype | None) -> Stored:
    """The base's tensor as the adapter was trained on it: in the run's precision, with the rows that were added."""
    dtype = precision if precision is not None and tensor.dtype.is_floating_point else tensor.dtype
    if own:
        return Stored(tensor.name, dtype, shape, with_mean(tensor.read, own, shape, dtype))
    return replace(tensor, dtype=dtype, read=lambda first, last: tensor.read(first, last).to(dtype))


@contextmanager
def _from_disk(
    part: Part,
    on_disk: Mapping[str, Stored],
    keys: Mapping[int, str],
    trained: Mapping[str, Stored],
) -> Iterator[Pieces]:
    masters = [trained[keys[id(parameter)]].whole() for parameter in part.masters]
    if part.base is None:
        yield Pieces(lambda first, last: masters[0][first:last])
    elif len(part.published) > 1:
        apart = [on_disk[name].read for name, _ in part.published]
        yield Pieces(apart[0], masters, apart)
    else:
        yield Pieces(on_disk[part.name].read, masters)
