"""The end of a run: the step that is used, its adapter, and the merged weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from launch import checkpoint as checkpoints
from launch import engine as engines
from launch import merge as merging
from launch.adapter import WEIGHTS_FILE
from launch.checkpoint import Resumable
from launch.job import Job
from launch.merge_from_disk import find_source, merge_from_disk
from launch.model import DTYPES, serving_generation_config
from launch.parity import Unmerged, check_logits_of_live_run


def use_chosen_step(job: Job, evaluations: Sequence[Mapping[str, Any]]) -> int:
    """The last step, or the best one put back into the engine if the recipe says so; its adapter is exported."""
    directory, settings, last = job.recipe.run_directory, job.recipe.train, job.total_steps

    def choose() -> str:
        metric = settings.metric_for_best_model
        best = (
            checkpoints.best_verified(directory, evaluations, metric, print) if settings.load_best_model_at_end else 0
        )
        return str(best or last)

    chosen = int(engines.after_rank_zero("choose", choose))  # which may read every byte of several checkpoints
    path = checkpoints.path_of_step(directory, chosen)
    if chosen != last:
        checkpoints.restore(Resumable.read(path), job.engine)
    if job.accelerator.is_main_process:
        checkpoints.export_adapter(path, directory / "adapter")
        endpoint = directory / "endpoint"
        if endpoint.exists():  # of a run that has gone on since it was finished
            checkpoints.unpublish(endpoint)
        if chosen != last:
            checkpoints.export_adapter(checkpoints.path_of_step(directory, last), endpoint)
            print(f"Step {chosen} has the best held-out {settings.metric_for_best_model}; its weights are used.")
    return chosen


def merge_chosen(job: Job, found: Mapping[str, Any], base: torch.nn.Module, dtype_name: str, chosen: int) -> None:
    """The weights of the chosen step, which the engine has, into the run's merged/; a collective.

    Of a base in 4 bits it does not have them: rank zero merges the adapter into what that was made of, from disk.
    """
    recipe = job.recipe
    adapter, shard_bytes = recipe.run_directory / "adapter" / WEIGHTS_FILE, recipe.run.max_shard_size_bytes
    target = (recipe.run_directory / "merged").resolve()  # which may be a link to a larger disk
    if recipe.model.load_in_4bit:
        if job.accelerator.is_main_process:
            engines.end_zero_init()
            source, compare = find_source(recipe.run_directory), check_logits_of_live_run
            merge_from_disk(source, target, dtype_name=dtype_name, overwrite=True, compare=compare)
        return
    trained_dtype = DTYPES[found["identity"]["precision"]]
    unmerged = Unmerged(found["base"], recipe.model, trained_dtype, job.tokenizer, adapter.parent, Path(found["store"]))
    merging.merge(
        job.model,
        job.tokenizer,
        serving_generation_config(base, found["end_token_ids"]),
        target,
        dtype_name=dtype_name,
        max_shard_size_bytes=shard_bytes,
        facts=lambda: {
            "step": chosen,
            **merging.facts_of(adapter, found["base"], found["identity"]["base"], shard_bytes),
        },
        check=lambda written: check_logits_of_live_run(written, unmerged, dtype_name),
    )
