"""A resumed run goes on in the tracker's run of its first start, and points that are done again stand once."""

import shutil
from pathlib import Path

import pytest
from conftest import World, launch, run_ranks
from test_resume import stop_at

from launch import engine as engines
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.trackers import CHOSEN_ID, PACKAGES, init_kwargs, read_ids, start_trackers

NAMES = tuple(PACKAGES)


def started(recipe: Path, resumed_after: int | None) -> int:
    """The number of trackers that start in a process of their own."""
    engines.quiet_libraries()
    accelerator = engines.create_accelerator(load_recipe(recipe), "fp32")
    start_trackers(accelerator, load_recipe(recipe), resumed_after)
    return len(accelerator.trackers)


def test_a_first_start_begins_runs_of_its_own() -> None:
    found = init_kwargs(NAMES, {name: f"{name}1" for name in CHOSEN_ID}, Path("run"), None)
    assert found == {
        "aim": {},
        "clearml": {"reuse_last_task_id": False},
        "comet_ml": {"experiment_key": "comet_ml1"},
        "dvclive": {"dir": "run/logs/dvclive", "resume": False},
        "mlflow": {"run_id": None},
        "swanlab": {"id": "swanlab1", "resume": "allow"},
        "tensorboard": {"purge_step": 0},
        "trackio": {"name": "trackio1", "resume": "allow"},
        "wandb": {"id": "wandb1", "resume": "allow"},
    }
    assert init_kwargs(["mlflow"], {}, Path("run"), None).keys() == {"mlflow"}


def test_a_resumed_start_names_the_runs_of_the_first() -> None:
    found = init_kwargs(NAMES, {name: f"{name}1" for name in NAMES}, Path("run"), 6)
    assert found == {
        "aim": {"run_hash": "aim1", "force_resume": True},
        "clearml": {"reuse_last_task_id": "clearml1", "continue_last_task": 0},
        "comet_ml": {"experiment_key": "comet_ml1"},
        "dvclive": {"dir": "run/logs/dvclive", "resume": True},
        "mlflow": {"run_id": "mlflow1"},
        "swanlab": {"id": "swanlab1", "resume": "allow"},
        "tensorboard": {"purge_step": 7},
        "trackio": {"name": "trackio1", "resume": "allow"},
        "wandb": {"id": "wandb1", "resume": "allow"},
    }


def test_ids_are_kept_over_resumes_and_given_up_with_the_steps(world: World) -> None:
    """accelerate leaves out what is not installed, so that nothing is started here."""
    recipe, directory = world.recipe("ids", run={"report_to": ["wandb", "trackio"]}), world.run_directory("ids")
    directory.mkdir(parents=True)
    seen = []
    for resumed_after in (None, 3, 3, None):
        run_ranks(1, started, recipe, resumed_after)
        seen.append(read_ids(directory))
    assert all(ids.keys() == {"wandb", "trackio"} for ids in seen)
    assert seen[0] == seen[1] == seen[2]
    assert not set(seen[0].values()) & set(seen[3].values())
    world.recipe("ids", run={"report_to": ["wandb", "swanlab"]})
    run_ranks(1, started, recipe, 3)
    assert read_ids(directory).items() > seen[3].items(), "one that is left out for a while is not forgotten"


def test_trackers_that_do_not_start_are_refused_at_first_and_left_out_later(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = world.recipe("broken", run={"report_to": ["tensorboard"]})
    logs = world.run_directory("broken") / "logs"
    logs.mkdir(parents=True)
    assert run_ranks(1, started, recipe, None) == [1]
    shutil.rmtree(logs)
    logs.write_text("where TensorBoard wants its directory", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"PreflightError: run\.report_to: tensorboard could not be started \("):
        run_ranks(1, started, recipe, None)
    assert run_ranks(1, started, recipe, 3) == [0]
    assert "Trackers get nothing from this start, since tensorboard could not be started (" in capfd.readouterr().out


@pytest.mark.slow
def test_tensorboard_has_every_step_once_over_a_stop_and_a_step_back(world: World) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"max_steps": 6, "save_steps": 2, "save_seconds": 1e6, "eval_steps": 2}
    recipe = world.recipe("tracked", run={"report_to": ["tensorboard"]}, train=settings)
    run_ranks(1, stop_at, 4, [str(recipe)])
    shutil.rmtree(path_of_step(world.run_directory("tracked"), 4))
    launch(recipe, 1)
    (logs,) = {path.parent for path in world.run_directory("tracked").rglob("events.out.tfevents*")}
    accumulator = EventAccumulator(str(logs)).Reload()
    for kind in ("train", "evaluation"):
        found = [(event.step, event.value) for event in accumulator.Scalars(f"{kind}/loss")]
        expected = [(record["step"], record["loss"]) for record in world.metrics("tracked", kind)]
        assert [step for step, _ in expected] == {"train": [1, 2, 3, 4, 5, 6], "evaluation": [0, 2, 4, 6]}[kind]
        assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
