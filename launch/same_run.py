"""What may differ between a checkpoint and the recipe that resumes it, and how a difference is told.

What changes no result goes on. What changes it, and means something in the middle of a run, goes on when
run.allow_change names it. All else is another run.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from launch import batching
from launch.errors import CheckpointError
from launch.recipe import ADAPTERS, Recipe

Rule = Literal["goes on", "on request", "another run"]

# Every key of the recipe, whatever the type of the adapter, stands here once; the slurm block always goes on.
TABLE: dict[Rule, dict[str, str]] = {
    "goes on": {
        "model": "hash_weights",
        "data": "bad_rows max_dropped_share",  # which rows they leave is compared
        "train": "max_tokens_per_micro_batch packing gradient_checkpointing logging_steps eval_steps save_steps "
        "save_seconds save_total_limit load_best_model_at_end metric_for_best_model max_bad_steps",
        "run": "name output_dir report_to merge merge_dtype max_shard_size_bytes max_failed_saves hang_seconds "
        "grace_seconds process_group_timeout_seconds max_requeues group_readable allow_change",
    },
    "on request": {
        "model": "attn_implementation",
        "data": "train evaluation",
        "adapter": "lora_dropout encoder_dropout",
        "train": "num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio max_grad_norm "
        "loraplus_lr_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon",
    },
    "another run": {
        "model": "name_or_path revision trust_remote_code factory tokenizer load_in_4bit bnb_4bit_quant_type "
        "bnb_4bit_use_double_quant extra_special_tokens eos_token pad_token",
        "data": "test_size format prompt_template answer_column template system train_on max_length overlong "
        "drop_duplicates",
        "adapter": "type r lora_alpha target_modules modules_to_save use_dora use_rslora rank_pattern alpha_pattern "
        "trainable_token_indices init_from num_virtual_tokens prompt_tuning_init prompt_tuning_init_text "
        "encoder_reparameterization_type encoder_hidden_size encoder_num_layers prefix_projection",
        "train": "global_batch_size precision seed",
    },
}
RULES = {
    f"{block}.{key}": rule for rule, blocks in TABLE.items() for block, keys in blocks.items() for key in keys.split()
}
ON_REQUEST = [name for name, rule in RULES.items() if rule == "on request"]
# Of these not the value is compared but what it stands for: the rows, the weights, the precision that was chosen.
BY_CONTENT = ("model.revision", "data.train", "data.evaluation", "adapter.init_from", "train.precision")
_COLUMNS = 80
_DIGITS = 12  # of a digest, for people


@dataclass(frozen=True)
class Difference:
    """What a checkpoint had and a recipe has not."""

    name: str  # a key of the recipe, or of what a key stands for
    was: str
    now: str
    rule: Rule
    details: tuple[tuple[str, str, str], ...] = ()  # name, was, now of its parts


def check_allow_change(names: Sequence[str]) -> None:
    """Raises ValueError when run.allow_change has a name that is no key, or one that nothing can allow."""
    for name in names:
        rule = RULES.get(name)
        if rule != "on request":
            kind = {
                "goes on": "may change without being allowed to",
                "another run": "cannot change within a run",
            }.get(rule or "", "is not a recipe key")
            raise ValueError(f"run.allow_change: {name} {kind}; the valid names are {', '.join(ON_REQUEST)}")


def identity_of_run(
    recipe: Recipe,
    *,
    precision: str,
    base: str,
    weights: Mapping[str, str] | None,
    code: Mapping[str, str],
    tokenizer: str,
    template_sha256: str,
    init_from_sha256: str | None,
    data_sha256: Sequence[str],
    rows: Mapping[str, Any],
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that saved; plain data that goes into state.json.

    `rows` are those of data_report.describe_splits; checkpoints from before them have `data_sha256` alone.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "precision": precision,
        "base": base,
        "weights": weights,
        "code": code,
        "tokenizer": tokenizer,
        "template_sha256": template_sha256,
        "init_from_sha256": init_from_sha256,
        "data_sha256": list(data_sha256),
        "rows": rows,
    }


def check_same_run(
    path: Path, state: Mapping[str, Any], identity: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """What there is to say about resuming the checkpoint in `path` whose state.json is `state`; mostly nothing.

    Raises CheckpointError with the differences that run.allow_change does not name, or when the run would end before
    the step that is done.
    """
    saved, allowed = state["identity"], identity["recipe"]["run"]["allow_change"]
    found = find_differences(saved, identity)
    refused = [one for one in found if one.rule == "another run" or one.name not in allowed]
    if refused:
        fixed = [one for one in refused if one.rule == "another run"]
        names = [one.name for one in refused if one.rule == "on request"]
        option = f"'run.allow_change=[{','.join([*allowed, *names])}]'"
        remedy = "Restore that, or give this one another run.name."
        if not fixed:
            remedy = f"Restore that, give this one another run.name, or go on with it: {option}"
        elif names:
            remedy = f"Restore that, or give this one another run.name; {option} would go on with {', '.join(names)}."
        raise CheckpointError(f"{path} belongs to another run:\n{difference_table(refused)}\n{_wrapped(remedy)}")
    num_left_out = _samples_left_out(path, int(state["step"]), saved, identity)
    said = []
    if found:
        said += [f"Going on after step {state['step']} with what run.allow_change names:", difference_table(found)]
    if any(one.name == "data.train" for one in found):
        said.append("From here on the order is that of the new rows.")
    if not has_same_held_out(saved, identity):
        mixed = "" if identity["recipe"]["data"]["evaluation"] else " Some of them may have been trained on."
        said.append(_wrapped(f"Other rows are held out: earlier evaluations are not compared with later ones.{mixed}"))
    if num_left_out:
        said.append(
            _wrapped(
                f"Step {state['step']} was to be the last one and was not full; the next {num_left_out} samples of the "
                "order are left out."
            )
        )
    changes = version_changes(state.get("versions", versions), versions)
    if changes:
        said.append(_wrapped(f"Since step {state['step']}: {changes}; results may differ in the last digits."))
    return "\n".join(said)


def find_differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[Difference]:
    """All that differs and would change the result. What a checkpoint of an earlier version lacks is not compared."""
    found = _of_recipe(saved["recipe"], identity["recipe"])
    if saved["precision"] != identity["precision"]:
        chosen = " (auto)" if identity["recipe"]["train"]["precision"] == "auto" else ""
        found.append(_another_run("train.precision", saved["precision"], identity["precision"] + chosen))
    if saved["base"] != identity["base"]:
        found.append(_another_run("base model", _short(saved["base"]), _short(identity["base"])))
    for key in ("weights", "code"):  # by file
        if (before := saved.get(key)) is not None and (now := identity[key]) is not None:
            names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            found += [_another_run(name, _short(before.get(name)), _short(now.get(name))) for name in names]
    for key, name in (("tokenizer", "tokenizer"), ("template_sha256", "chat template")):
        if saved.get(key, identity[key]) != identity[key]:
            found.append(_another_run(name, _short(saved[key]), _short(identity[key])))
    before, now = saved.get("init_from_sha256"), identity["init_from_sha256"]
    if before != now:
        found.append(_another_run("adapter.init_from", _short(before), _short(now)))
    if not any(one.rule == "another run" for one in found):  # which would change the rows as well
        found += _of_rows(saved, identity)
    return found


def has_same_held_out(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether evaluations of the one can be compared with those of the other."""
    if "rows" not in saved:
        return bool(saved["data_sha256"] == identity["data_sha256"])
    return bool(saved["rows"]["evaluation"]["sha256"] == identity["rows"]["evaluation"]["sha256"])


def difference_table(differences: Sequence[Difference]) -> str:
    """`key  was -> is` in aligned columns; what is too long for 80 of them stands on lines of its own."""
    rows = [
        row
        for one in differences
        for row in ((one.name, one.was, one.now), *((f"  {name}", was, now) for name, was, now in one.details))
    ]
    aligned = list(rows)
    while True:
        widths = [max((len(row[column]) for row in aligned), default=0) for column in (0, 1)]
        lines = {row: f"  {row[0]:<{widths[0]}}  was {row[1]:<{widths[1]}}  is {row[2]}" for row in aligned}
        if max(map(len, lines.values()), default=0) <= _COLUMNS:
            break
        aligned.remove(max(aligned, key=lambda row: sum(map(len, row))))
    return "\n".join(lines.get(row, f"  {row[0]}\n      was {row[1]}\n      is  {row[2]}") for row in rows)


def version_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """`torch 2.13.0 -> 2.14.0, ...`; empty when all are the same."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    return ", ".join(f"{name} {saved.get(name, 'none')} -> {now.get(name, 'none')}" for name in names)


def _of_recipe(saved: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[Difference]:
    is_other_adapter = saved["adapter"]["type"] != recipe["adapter"]["type"]
    found = []
    for block, values in recipe.items():
        if block == "slurm":
            continue
        for key, value in values.items():
            name = f"{block}.{key}"
            is_other_key = block == "adapter" and is_other_adapter and key != "type"
            if RULES[name] == "goes on" or name in BY_CONTENT or is_other_key:
                continue
            before = _saved_value(saved, block, key)
            if before != value:
                found.append(Difference(name, _text(before), _text(value), RULES[name]))
    return found


def _saved_value(recipe: Mapping[str, Any], block: str, key: str) -> Any:
    """What a saved recipe has, or the default of a key that was added to the project since."""
    if key in recipe.get(block, {}):
        return recipe[block][key]
    owner: Any = ADAPTERS[recipe["adapter"]["type"]] if block == "adapter" else Recipe.model_fields[block].annotation
    assert isinstance(owner, type) and issubclass(owner, BaseModel)
    return owner.model_construct().model_dump(mode="json")[key]


def _of_rows(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[Difference]:
    """data.train and data.evaluation, with the sources that are not the same."""
    if "rows" not in saved:
        before, now = saved["data_sha256"], identity["data_sha256"]
        return [] if before == now else [Difference("data.train", "other rows", "these rows", "on request")]
    splits = ["train"]
    if saved["recipe"]["data"]["evaluation"] or identity["recipe"]["data"]["evaluation"]:
        splits.append("evaluation")  # otherwise it is a part of train
    found = []
    for split in splits:
        before, now = saved["rows"][split], identity["rows"][split]
        if before["sha256"] != now["sha256"]:
            was, is_ = f"{before['samples']:,} samples", f"{now['samples']:,} samples"
            if before["samples"] == now["samples"]:
                is_ = f"{now['samples']:,} others"
            found.append(Difference(f"data.{split}", was, is_, "on request", _of_sources(before, now)))
    return found


def _of_sources(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    were, are = ({source["path"]: source for source in split["sources"]} for split in (before, now))
    details = []
    for path in {**were, **are}:
        was, is_ = were.get(path), are.get(path)
        if was is None or is_ is None or was["sha256"] != is_["sha256"]:
            same_count = was is not None and is_ is not None and was["rows"] == is_["rows"]
            word = "others" if same_count else "rows"
            texts = (f"{was['rows']:,} rows" if was else "none", f"{is_['rows']:,} {word}" if is_ else "none")
            details.append((path, *texts))
    return tuple(details)


def _samples_left_out(path: Path, step: int, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """Samples between what was the end of the run and the beginning of the next step; mostly none.

    Raises CheckpointError when the run would now end before the step that is done.
    """
    samples_per_step = identity["recipe"]["train"]["global_batch_size"]
    was_total, total = _total_samples({"rows": identity["rows"], **saved}), _total_samples(identity)
    num_steps = math.ceil(total / samples_per_step)
    if num_steps < step:
        raise CheckpointError(
            f"{path} has {step} steps behind it, and this run would end after {num_steps}; let it end at "
            f"train.max_steps={step} or later, or give it another run.name."
        )
    begins_at: int = step * samples_per_step
    return max(min(begins_at, total) - was_total, 0)


def _total_samples(identity: Mapping[str, Any]) -> int:
    train = identity["recipe"]["train"]
    return batching.samples_in_run(
        identity["rows"]["train"]["samples"], train["global_batch_size"], train["num_train_epochs"], train["max_steps"]
    )


def _another_run(name: str, was: str, now: str) -> Difference:
    return Difference(name, was, now, "another run")


def _short(fingerprint: str | None) -> str:
    """`commit 0123abcd...` with as many digits as tell two apart."""
    *words, digest = (fingerprint or "none").split(" ")
    return " ".join([*words, digest[:_DIGITS]])


def _text(value: Any) -> str:
    """As it would be written into a recipe."""
    if isinstance(value, str) and value.isprintable() and value == value.strip() != "":
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _COLUMNS, break_long_words=False, break_on_hyphens=False)
