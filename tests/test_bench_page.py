"""`make bench`: docs/performance.md is made from the newest results, and nobody edits it by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
from bench import ROOT

INTEL = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "platform": "Linux-6.1-x86_64"}
START: dict[str, Any] = {
    "commit": "0123abc",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "targets": {"seconds": 15.0},
    "commands": ["start.py"],
    "results": [
        {
            "options": {"ranks": 2, "repeats": 2},
            "runs": [{"seconds": whole, "parts": {"launcher": 2.5, "imports": whole - 2.5}} for whole in (14.0, 18.0)],
        }
    ],
}


def a_result(**sections: Any) -> bench.Result:
    return {"date": "2026-01-31", "machine": INTEL, "sections": sections}


def test_the_page_is_that_of_the_results() -> None:
    """`make bench` writes both, and `bench.py --render-only` the page alone."""
    paths = sorted(bench.RESULTS.glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert bench.PAGE.read_text(encoding="utf-8") == bench.page(results)
    assert [path.name for path in paths] == [bench.file_name(result) for result in results]


def test_a_section_is_that_of_the_newest_result_that_has_it() -> None:
    """One that is measured again on another machine takes no other section from the page."""
    later = a_result(start=START | {"commit": "89abcde"}) | {"date": "2026-02-01", "machine": INTEL | {"cores": 1}}
    merge = a_result(start=START, merge={"commit": "0123abc"})
    assert bench.newest([merge, later]) == [a_result(merge={"commit": "0123abc"}), later]
    text = bench.page([a_result(start=START), later])
    assert "2026-01-31" not in text
    assert "1 core, Linux-6.1-x86_64;\n  start; at commit 89abcde." in text


def test_what_was_not_measured_is_said() -> None:
    """A result of one section is a page; figures that it does not hold are not in it."""
    text = bench.page([a_result(start=START)])
    assert "| command to first step | 16.00 | 14.00 - 18.00 | less than 15 s: **not met** |" in text
    assert "Its parts, medians in seconds: launcher 2.50, imports 13.50." in text
    assert "**Left out**: training, evaluation, prepare_rows, checkpoint, merge, scaling." in text
    assert "**TRL was not measured**" in text
    assert "`.venv/bin/python benchmarks/start.py`" in text
    assert "## Merging" not in text


def test_the_gpu_command_is_that_of_its_page() -> None:
    text = bench.page([a_result(start=START)])
    (command,) = (block for block in text.split("```") if "throughput.py" in block)
    assert command.removeprefix("bash\n") in (ROOT / "benchmarks/gpu/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("cpu", "cores", "name"),
    [
        ("Intel(R) Xeon(R) Processor", 2, "intel-xeon-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 32, "intel-xeon-platinum-8375c-32-cores"),
        ("AMD EPYC 7763 64-Core Processor", 1, "amd-epyc-7763-1-core"),
        ("", 4, "4-cores"),
    ],
)
def test_a_machine_has_a_short_name(cpu: str, cores: int, name: str) -> None:
    assert bench.slug({"cpu": cpu, "cores": cores, "platform": "Linux"}) == name


def test_a_section_that_is_measured_again_leaves_the_others() -> None:
    """Whatever order they are measured in, they stand in that of the page."""
    before = a_result(merge={"commit": "old"}, start={"commit": "old"})
    after = bench.with_section(before, "merge", {"commit": "new"})
    assert after == a_result(merge={"commit": "new"}, start={"commit": "old"})
    assert before == a_result(merge={"commit": "old"}, start={"commit": "old"})
    assert list(bench.with_section(after, "training", {})["sections"]) == ["training", "start", "merge"]


def test_no_place_on_the_machine_is_kept() -> None:
    written = {"options": {"vocab": [8000], "source": "/rows", "trl_python": "/trl", "json": "/x.json"}, "runs": []}
    assert bench.without_places(written) == {"options": {"vocab": [8000]}, "runs": []}


def test_versions_are_told_once() -> None:
    """With every number that was in use: sections may have been measured at different times."""
    sections = {"merge": {"versions": {"torch": "2.13"}}, "start": {"results": [{"versions": {"torch": "2.14"}}]}}
    both = [*bench.versions_in(sections), ("torch", "2.13"), ("trl", "1.16")]
    assert bench.joined(both) == "torch 2.13 and 2.14, trl 1.16"
