"""The kill loop, a few rounds of it: the fault matrix, rows 0 to 3, 8 to 10, 22 and 36."""

from pathlib import Path

import pytest
from loop import run_loop


@pytest.mark.slow
@pytest.mark.parametrize("elastic", [False, True])
def test_ended_again_and_again(tmp_path: Path, elastic: bool) -> None:
    print(run_loop(tmp_path, kills=4, seed=int(elastic), elastic=elastic))


@pytest.mark.slow
def test_ended_again_and_again_through_the_launcher(tmp_path: Path) -> None:
    print(run_loop(tmp_path, kills=3, seed=2, elastic=True, launcher=True))
