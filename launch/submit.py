"""A recipe becomes a job in the queue: what can be checked without a GPU is, and then sbatch is called."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import runs, slurm
from launch.check import checks_of_recipe
from launch.config import DEFAULT_RECIPE, dump_recipe, is_override
from launch.data import Tools, check_beginnings
from launch.errors import ConfigError, LaunchError, RunInUseError
from launch.findings import collect, settle
from launch.memory import numel
from launch.modes import keep_private
from launch.plan import find_base
from launch.recipe import Recipe
from launch.saving import check_room
from launch.slurm_options import seconds_of
from launch.table import format_table
from launch.trained_shapes import trained_shapes


def submit(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    config_file: Path,
    processes_per_node: int | None,
    rank_python: Path | None,
    is_dry_run: bool,
) -> None:
    """Check the recipe, write its job and hand it to Slurm; with `is_dry_run`, print the job and write nothing.

    `arguments` are those that give train.py this recipe. Raises a LaunchError for what would stop the job later, when
    the run has a job already, and for what sbatch refuses.
    """
    directory = recipe.run_directory
    if not Path("train.py").is_file():
        raise ConfigError(f"{Path.cwd()} has no train.py for the job to run; go to the checkout first.")
    if not config_file.is_file():
        raise ConfigError(f"--config-file {config_file}: there is no such file.")
    if rank_python is not None and not os.access(rank_python, os.X_OK):
        raise ConfigError(
            f"--python {rank_python}: there is no such program; give an interpreter, or a script that is one."
        )
    if runs.is_finished(directory, dump_recipe(recipe)):
        print(f"{directory} is finished; nothing is submitted.")
        return
    text, why = _job_text(recipe, arguments, config_file, processes_per_node, rank_python or Path(sys.executable))
    rendered = text.render()
    _check_queue(directory)
    _check_recipe(recipe)
    not_compared = _check_room(recipe)
    if is_dry_run:
        print(rendered, end="")
        for option in text.beside:
            print(f"# on sbatch's command line: {shlex.quote(option)}")
        return
    keep_private(group_readable=recipe.run.group_readable)
    with runs.open_run(directory):  # refused when it is another's; the job itself takes it when it starts
        (directory / runs.JOB_LOG).parent.mkdir(exist_ok=True)
        runs.write_text(directory / runs.JOB_FILE, rendered)
    job_id = slurm.submit(text, directory)
    run = shlex.quote(str(directory))
    rows = [
        ("job", f"{job_id}, from {directory / runs.JOB_FILE}"),
        ("asked to stop", f"{text.lead_seconds} s before its time limit ({why})"),
    ]
    if not_compared:
        rows.append(("disk", f"not compared with what the run will leave: {not_compared}"))
    print(f"{format_table(rows)}\n")
    for what, command in (
        ("watch", f"tail -F {shlex.quote(str(directory / runs.JOB_LOG))}"),
        ("status", f"python -m launch status {run}"),
        ("cancel", f"scancel {job_id}"),
        ("continue", "the same command again"),
    ):
        print(f"  {what:<10} {command}")


def _job_text(
    recipe: Recipe, arguments: Sequence[str], config_file: Path, processes_per_node: int | None, rank_python: Path
) -> tuple[slurm.JobText, str]:
    """(the job, why its ranks are asked to stop as early as they are)."""
    given = [f"./{name}" if name.startswith("-") else name for name in arguments]
    paths = [name for name in given if not is_override(name)] or [str(DEFAULT_RECIPE)]
    options = recipe.slurm
    limit = dict(options).get("time")
    lead_seconds, why = slurm.lead_seconds(runs.read_metrics(recipe.run_directory), limit)
    limit_seconds = None if limit is None else seconds_of(limit)
    if limit_seconds is not None and limit_seconds <= lead_seconds:
        raise ConfigError(
            f"slurm.time = {limit} leaves no time to train, for a stop needs {lead_seconds} s of it ({why}); give more."
        )
    text = slurm.JobText(
        run_name=recipe.run.name,
        python=sys.executable,
        rank_python=str(rank_python.absolute()),
        checkout=str(Path.cwd()),
        log=str((recipe.run_directory / runs.JOB_LOG).absolute()),
        config_file=str(config_file),
        arguments=(*paths, *(name for name in given if is_override(name))),
        options=options,
        processes_per_node=processes_per_node,
        lead_seconds=lead_seconds,
        grace_seconds=recipe.run.grace_seconds,
    )
    return text, why


def _check_queue(directory: Path) -> None:
    """Raises RunInUseError when the job that was submitted last for this run waits or runs."""
    found = slurm.submitted_job(directory)
    if found is None:
        return
    job_id, job = found
    if job is not None and not job.has_ended:
        raise RunInUseError(
            f"{directory} has job {job_id} in the queue ({job.state}, {job.reason}), which continues by itself; wait "
            f"for it, or end it with scancel {job_id}, or give this run another run.name."
        )


def _check_recipe(recipe: Recipe) -> None:
    """The base's config, the adapter's targets, the template, and the first rows of every source."""

    def rows(known: Recipe, tools: Callable[[], Tools]) -> None:
        check_beginnings(known, tools())

    settle(collect(checks_of_recipe(recipe, rows)), print)


def _check_room(recipe: Recipe) -> str:
    """Raises PreflightError when the disk has no room for what the run will leave; why that is not known, or ''."""
    try:
        base = find_base(recipe, None)
        trained = trained_shapes(recipe, base)
    except LaunchError as error:  # of models that no formula covers, and the tiny one
        return str(error)
    value_bytes = 4 if recipe.run.merge_dtype == "float32" else 2
    merged_bytes = numel(base.shapes.values()) * value_bytes if recipe.merges else 0
    keep = recipe.train.save_total_limit
    check_room(recipe.run_directory, numel(trained.values()), keep=keep, merged_bytes=merged_bytes)
    return ""
