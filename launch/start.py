"""What a start is made of: on rank zero the base on disk, the samples and the checkpoint to resume; then the model."""

import functools
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from launch import checkpoint as checkpoints
from launch import runs, same_run
from launch.adapter import ADAPTER_NAME, add_adapter, with_token_ids
from launch.config import dump_recipe
from launch.data import prepare
from launch.data_report import outcomes_line
from launch.errors import DataError
from launch.findings import collect, settle
from launch.fingerprint import fingerprints, versions
from launch.merge_output import check_replaceable
from launch.merge_plan import plan_merge
from launch.model import (
    DTYPES,
    added_token_ids,
    checks_of_base,
    enable_gradient_checkpointing,
    load_base,
    resolve_base,
    tokenizer_and_template,
)
from launch.preflight import commit_of_base, with_revision
from launch.recipe import Recipe
from launch.report import Stopwatch
from launch.starting_adapter import fingerprint_starting_adapter, start_from
from launch.vocabulary import check_added_are_trained, fit_vocabulary


def prepare_run(recipe: Recipe, precision: str, network: Mapping[str, float], stopwatch: Stopwatch) -> dict[str, Any]:
    """Rank zero's part before the others need anything: the base on disk, the samples, the checkpoint to resume.

    `network` are the bandwidths that its collectives had.
    """
    directory, given = recipe.run_directory, recipe
    if recipe.merges:
        check_replaceable((directory / "merged").resolve())  # not hours later
    checkpoint = checkpoints.find_resumable(directory, say=print)
    stopwatch.end("resume")
    identity = checkpoint.state["identity"] if checkpoint else None
    recipe = with_revision(recipe, commit_of_base(recipe.model, identity, runs.read_pinned_base(directory)))
    base = resolve_base(recipe, show_progress=sys.stderr.isatty())
    tools = functools.cache(lambda: tokenizer_and_template(recipe, base))
    # Of remote code, all is then in transformers' cache when the other ranks look there.
    settle(collect(checks_of_base(recipe, tools)), print)
    init_from_sha256 = fingerprint_starting_adapter(recipe.adapter)
    stopwatch.end("base")
    prepared = prepare(recipe, directory, tools)
    stopwatch.end("rows")
    if recipe.train.load_best_model_at_end and not len(prepared.split["evaluation"]):
        raise DataError("train.load_best_model_at_end has no rows to evaluate; set data.test_size or data.evaluation.")
    # Refused before anything of the run that is there is written over.
    identity = same_run.identity_of_run(
        recipe,
        precision=precision,
        **fingerprints(base, recipe.model, show_progress=sys.stderr.isatty()),
        template_sha256=prepared.template_sha256,
        init_from_sha256=init_from_sha256,
        data_sha256=prepared.sha256s,
        rows=prepared.rows,
    )
    stopwatch.end("base")
    evaluations: list[dict[str, Any]] = []  # of the rows that are held out now
    same_held_out, said = True, ""
    if checkpoint is not None:
        said = same_run.check_same_run(checkpoint.path, checkpoint.state, identity, versions())
        print(said, end="\n" if said else "", flush=True)
        same_held_out = same_run.has_same_held_out(checkpoint.state["identity"], identity)
        evaluations = checkpoint.state.get("evaluations", []) if same_held_out else []
    prepared = prepared.publish(directory)
    step = checkpoint.step if checkpoint else -1
    lost_steps = runs.steps_to_repeat(directory, max(step, 0))
    metrics = runs.rewind_metrics(directory, step, same_held_out=same_held_out, say=print)
    runs.write_text(directory / "recipe.yaml", dump_recipe(given))
    resumed = {"after_step": max(step, 0), "lost_steps": lost_steps, "said": said}
    measured = {"network_bytes_per_second": dict(network)}
    runs.write_environment(directory, {"host": platform.node(), "versions": versions(), **measured, **resumed})
    return {
        "revision": recipe.model.revision,
        "base": base,
        "store": str(prepared.store),
        "rows": outcomes_line(prepared.report),
        "end_token_ids": prepared.end_token_ids,
        "identity": identity,
        "checkpoint": str(checkpoint.path) if checkpoint else None,
        "evaluations": runs.known_evaluations(evaluations, metrics),
    }


def adapted_base(
    recipe: Recipe, found: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, precision: str
) -> tuple[torch.nn.Module, PeftModel]:
    """(the base, the adapter on it); a collective."""
    base = load_base(found["base"], recipe.model, precision)
    added = added_token_ids(tokenizer, found["base"], recipe.model)
    fit_vocabulary(base, tokenizer, added, recipe.model)
    adapter = with_token_ids(recipe.adapter, added)
    model = add_adapter(base, adapter, base=found["base"], seed=recipe.train.seed, dtype=DTYPES[precision])
    model.peft_config[ADAPTER_NAME].revision = recipe.model.revision  # of the base, for whoever loads the adapter
    check_added_are_trained(model, tokenizer, added)
    start_from(recipe.adapter, found["identity"]["init_from_sha256"], model)
    if recipe.merges:
        plan_merge(model)  # refuses now what it could not merge at the end
    if recipe.train.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return base, model
