"""The kill loop, a few rounds of it: the fault matrix, rows 1 to 3, 8 to 10, 22 and 36."""

from pathlib import Path

import pytest
from loop import run_loop


@pytest.mark.slow
@pytest.mark.parametrize("elastic", [False, True])
def test_ended_again_and_again(tmp_path: Path, elastic: bool) -> None:
    report = run_loop(tmp_path, kills=5, seed=int(elastic), elastic=elastic)
    print(report)
