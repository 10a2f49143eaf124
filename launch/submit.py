"""A recipe becomes a job in the queue: what can be checked without a GPU is, and then sbatch is called."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launch import runs, slurm, slurm_options
from launch.check import checks_of_run
from launch.config import DEFAULT_RECIPE, dump_recipe, is_override
from launch.data import Tools, check_beginnings
from launch.errors import ConfigError, RunInUseError
from launch.findings import collect, settle
from launch.hardware import find_hardware
from launch.modes import keep_private
from launch.plan import choices, find_base, make_case, recommend
from launch.plan_report import changes
from launch.recipe import Recipe
from launch.slurm_options import seconds_of
from launch.table import format_table


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
    _check_run(recipe, config_file)
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
        ("layout", str(config_file)),
        ("asked to stop", f"{text.lead_seconds} s before its time limit ({why})"),
    ]
    print(f"{format_table(rows)}\n")
    for what, command in (
        ("watch", f"tail -F {shlex.quote(str(directory / runs.JOB_LOG))}"),
        ("status", f"python -m launch status {run}"),
        ("cancel", f"scancel {job_id}"),
        ("continue", "the same command again"),
    ):
        print(f"  {what:<10} {command}")


def plan_job(
    recipe: Recipe, arguments: Sequence[str], gpu: str, processes_per_node: int | None
) -> tuple[Path, list[str]]:
    """(accelerate's file, overrides of the recipe) of the fastest layout that the plan finds for the job's nodes.

    Raises ConfigError when nothing fits with the base as the recipe has it, and for what is given and chosen at once.
    """
    options = dict(recipe.slurm)
    gpus = processes_per_node or slurm_options.num_gpus_of(options)
    if gpus is None:
        raise ConfigError(f"--gpu {gpu}: plan must know how many a node gives; add --gpus-per-node N.")
    found = find_hardware(gpu, gpus, slurm_options.num_nodes_of(options), None, None)
    hardware = replace(found, host_memory_bytes=slurm_options.memory_bytes_of(options))  # not this machine's
    case = make_case(recipe, find_base(recipe, None), hardware, 1.0)
    chosen = recommend(case, choices(case))
    if chosen is None or chosen.load_in_4bit != recipe.model.load_in_4bit:
        raise ConfigError(
            f"--gpu {gpu}: nothing that the recipe can be run with fits into {gpus} of them on {hardware.num_nodes} "
            f"node(s); python -m launch plan --gpu {gpu} --gpus {gpus} --nodes {hardware.num_nodes} says what would."
        )
    overrides = {key: str(value).lower() for key, value in changes(recipe, chosen).items()}
    for name in arguments:
        key = name.partition("=")[0]
        if key in overrides and is_override(name):
            raise ConfigError(
                f"{name} is given, and --gpu lets plan choose {key} ({overrides[key]}); keep one of them."
            )
    return chosen.accelerate_file, [f"{key}={value}" for key, value in overrides.items()]


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


def _check_run(recipe: Recipe, config_file: Path) -> None:
    """The layout, the base's config, the adapter's targets, the template, and the first rows of every source."""

    def rows(known: Recipe, tools: Callable[[], Tools]) -> None:
        check_beginnings(known, tools())

    settle(collect(checks_of_run(recipe, config_file, rows)), print)
