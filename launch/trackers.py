"""Trackers: the package that each one needs, and how a resumed run goes on in the tracker's run of its first start.

The tracker's ids stand in `runs/<name>/trackers.json`. All keyword arguments are those of accelerate 1.15's trackers.
"""

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import runs
from launch.errors import PreflightError
from launch.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator  # imports torch

PACKAGES = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
# These take any id; aim, clearml and mlflow give one, and tensorboard and dvclive know a run by its directory.
CHOSEN_ID = ("comet_ml", "swanlab", "trackio", "wandb")


def start_trackers(accelerator: "Accelerator", recipe: Recipe, resumed_after: int | None) -> None:
    """Start the recipe's trackers on rank zero; after a resume, in the runs that they had.

    Raises PreflightError when one does not start and nothing is trained yet. A resumed run says so and goes on without
    them: nobody may be there who could put it right, and metrics.jsonl has every figure.
    """
    trackers, directory = recipe.run.report_to, recipe.run_directory
    if not trackers or not accelerator.is_main_process:
        return
    try:
        ids = read_ids(directory) if resumed_after is not None else {}
        ids |= {tracker: uuid.uuid4().hex for tracker in CHOSEN_ID if tracker in trackers and tracker not in ids}
        runs.write_json(directory / "trackers.json", ids)  # before one starts: a kill leaves no run that nobody knows
        accelerator.init_trackers(recipe.run.name, init_kwargs=init_kwargs(trackers, ids, directory, resumed_after))
        ids |= {tracker.name: given for tracker in accelerator.trackers if (given := _given_id(tracker)) is not None}
        runs.write_json(directory / "trackers.json", ids)
    except Exception as error:  # whatever a tracker raises: a key that is missing, a run that was deleted, no network
        for tracker in accelerator.trackers:
            with suppress(Exception):  # some have not been started
                tracker.finish()
        accelerator.trackers = []
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if resumed_after is None:
            raise PreflightError(
                f"run.report_to: {', '.join(trackers)} could not be started ({fault}); put that right, or leave out "
                "the one that does not start."
            ) from None
        print(f"Trackers get nothing from this start, since {', '.join(trackers)} could not be started ({fault}).")


def init_kwargs(
    trackers: Sequence[str], ids: Mapping[str, str], directory: Path, resumed_after: int | None
) -> dict[str, dict[str, Any]]:
    """What `Accelerator.init_trackers` passes to each tracker. One without an id begins a run of its own."""
    is_resumed = resumed_after is not None
    known: dict[str, dict[str, Any]] = {
        "comet_ml": {"experiment_key": ids.get("comet_ml")},
        "dvclive": {"dir": str(directory / "logs" / "dvclive"), "resume": is_resumed},
        "mlflow": {"run_id": ids.get("mlflow")},
        "swanlab": {"id": ids.get("swanlab"), "resume": "allow"},
        # What stands there of later steps is done again, and hidden.
        "tensorboard": {"purge_step": 0 if resumed_after is None else resumed_after + 1},
        "trackio": {"name": ids.get("trackio"), "resume": "allow"},
        "wandb": {"id": ids.get("wandb"), "resume": "allow"},
        # Our own lock says that nobody else writes to it: the lock which a killed start left in aim means nothing.
        "aim": {"run_hash": ids["aim"], "force_resume": True} if "aim" in ids else {},
        # 0: our steps count from the beginning; ClearML would add them to the last one.
        "clearml": {"reuse_last_task_id": ids.get("clearml", False)}
        | ({"continue_last_task": 0} if "clearml" in ids else {}),
    }
    return {tracker: known[tracker] for tracker in trackers}


def read_ids(directory: Path) -> dict[str, str]:
    """trackers.json: tracker -> the id of its run; empty where there is none."""
    try:
        return dict(json.loads((directory / "trackers.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def _given_id(tracker: Any) -> str | None:
    """The id that this tracker of accelerate has given its run; None for the others."""
    match tracker.name:
        case "aim":
            return str(tracker.tracker.hash)
        case "clearml":
            return str(tracker.tracker.id)
        case "mlflow":
            return str(tracker.tracker.info.run_id)
    return None


def end_trackers(accelerator: "Accelerator") -> None:
    """Close the trackers, whatever they say to that, and leave the process group."""
    try:
        accelerator.end_training()
    except Exception as error:
        print(f"The trackers could not be closed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
