"""The launcher is killed: the fault matrix, row 0."""

from pathlib import Path

import pytest
from conftest import World
from test_launch import finish, ranks_of, start, wait_until

from launch import runs
from launch.checkpoint import path_of_step

SETTINGS = {"max_steps": 40, "save_steps": 10, "eval_steps": 20}
SECONDS_TO_END = 5  # for ranks whose launcher is killed


def imports_torch(pid: int) -> bool:
    """Whether it has come as far as that, and so past the line that ties it to its launcher."""
    return "/libtorch" in Path("/proc", str(pid), "maps").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ranks_end_with_their_launcher_and_the_next_start_meets_nobody(world: World) -> None:
    recipe = world.recipe("killed", train=SETTINGS)
    directory = world.run_directory("killed")

    process = start(recipe)  # and killed while its ranks import
    wait_until(lambda: [imports_torch(rank) for rank in ranks_of(recipe)] == [True, True], 60, "two ranks")
    process.kill()
    wait_until(lambda: not ranks_of(recipe), SECONDS_TO_END, "without ranks")
    process.communicate()
    assert not directory.exists(), "that was to be before the run begins"

    process = start(recipe)  # and killed while they train
    wait_until(path_of_step(directory, 10).exists, 300, "a checkpoint")
    ranks = set(ranks_of(recipe))
    assert len(ranks) == 2
    process.kill()
    at_once = start(recipe)
    wait_until(lambda: not ranks & set(ranks_of(recipe)), SECONDS_TO_END, "without the old ranks")
    process.communicate()
    assert runs.read_status(directory)["state"] == "running"  # nobody was left to say otherwise
    assert "resumed after step" in finish(at_once)
    assert runs.read_status(directory)["state"] == "finished"
    assert [record["step"] for record in world.metrics("killed", "train")] == list(range(1, 41))
    assert "is finished" in finish(start(recipe))
