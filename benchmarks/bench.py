"""Every benchmark, one after the other: their tables, a result file, and docs/performance.md made from the newest ones.

Each script holds its own gate; the first that fails ends this with its exit code. See benchmarks/README.md.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from prepare_rows import machine
from sides import ROOT, in_new_process, middle

sys.path.insert(0, str(ROOT))

from launch.fingerprint import versions
from launch.table import format_bytes

COMMANDS = {  # section of the page: what measures it
    "training": (
        "training.py --vocab 48000 --ranks 1 2",
        "training.py --vocab 8000 152000 --ranks 1 --sides cairn transformers 'TRL, padding-free' 'TRL, packed'",
    ),
    "evaluation": ("evaluation.py --samples 1000 --reference-samples 0 --repeats 1", "evaluation.py"),
    "prepare_rows": ("prepare_rows.py",),
    "start": ("start.py",),
    "checkpoint": ("checkpoint.py",),
    "merge": ("merge.py",),
    "scaling": ("scaling.py",),
}
NEED_ROWS, NEED_TRL = ("training", "prepare_rows", "scaling"), ("training", "prepare_rows")
LOCAL = ("json", "source", "trl_python")  # options that say where something lies on the machine
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/performance.md"
TEMPLATE = "performance.md.j2"

Result = dict[str, Any]  # date, machine, sections; of each section commit, versions, targets, commands, results


# ---- the result file ----


def cores(about: Mapping[str, Any]) -> str:
    """How many a machine has."""
    return "1 core" if about["cores"] == 1 else f"{about['cores']} cores"


def slug(about: Mapping[str, Any]) -> str:
    """A machine's short name, for files: its CPU and how many cores there are, as in intel-xeon-2-cores."""
    cpu = re.sub(r"\((R|TM|C)\)|\b\d+-Core\b|\b(CPU|Processor)\b|@.*", " ", about["cpu"], flags=re.IGNORECASE)
    words = re.findall("[a-z0-9]+", f"{cpu} {cores(about)}".lower())
    return "-".join(words)


def file_name(result: Result) -> str:
    """Of a result in benchmarks/results."""
    return f"{result['date']}-{slug(result['machine'])}.json"


def with_section(result: Result, name: str, section: Result) -> Result:
    """The result with this section; the others stay as they are."""
    sections = result["sections"] | {name: section}
    return result | {"sections": {known: sections[known] for known in COMMANDS if known in sections}}


def without_places(result: Result) -> Result:
    """What a script wrote, but for the options that say where something lies."""
    options = {name: value for name, value in result.get("options", {}).items() if name not in LOCAL}
    return result | {"options": options} if options else result


def targets() -> dict[str, Result]:
    """By section, what its script wants; a process of its own imports them all."""
    import checkpoint
    import evaluation
    import merge
    import prepare_rows
    import scaling
    import start
    import training

    return {
        "training": {"times_as_fast": training.WANTED, "tolerance": training.TOLERANCE},
        "evaluation": {"mib": evaluation.MAX_MIB, "ratio": evaluation.MAX_RATIO, "tolerance": evaluation.TOLERANCE},
        "prepare_rows": {"times_as_fast": prepare_rows.WANTED, "again_seconds": prepare_rows.MAX_AGAIN_SECONDS},
        "start": {"seconds": start.MAX_SECONDS},
        "checkpoint": {"stall_share": checkpoint.MAX_STALL_SHARE, "read_seconds": checkpoint.MAX_READ_SECONDS},
        "merge": {"times": merge.MAX_TIMES, "mib": merge.MAX_MIB},
        "scaling": {
            "tolerance": training.TOLERANCE,
            "index_share": scaling.MAX_INDEX_SHARE,
            "imbalance": scaling.MAX_IMBALANCE,
        },
    }


# ---- the page ----


def newest(results: Sequence[Result]) -> list[Result]:
    """The results, in their order, each with those sections only that no later one has."""
    kept: list[Result] = []
    known: set[str] = set()
    for result in reversed(results):
        sections = {name: section for name, section in result["sections"].items() if name not in known}
        known |= sections.keys()
        kept += [result | {"sections": sections}] if sections else []
    return kept[::-1]


def page(results: Sequence[Result]) -> str:
    """docs/performance.md; every figure in it is one of the results, the oldest first, or computed from them."""
    measured = newest(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "by": grouped,
        "median": statistics.median,
        "mean": statistics.mean,
        "spread": spread,
        "num": number,
        "percent": lambda share, digits=0: f"{share:.{digits}%}",
        "power": lambda value: f"{value:.0e}".replace("e-0", "e-"),
        "bytes": format_bytes,
        "verdict": verdict,
        "middle": middle,
        "parts": parts,
        "file_name": file_name,
        "cores": cores,
    }
    sections = {name: section | one for one in measured for name, section in one["sections"].items()}
    return environment.get_template(TEMPLATE).render(
        measured=measured,
        sections=sections,
        versions=joined(versions_in(measured)),
        missing=[name for name in COMMANDS if name not in sections],
        has_trl=any(name == "trl" for name, _ in versions_in(measured)),
    )


def grouped(records: Iterable[Result], *keys: str) -> list[tuple[Any, list[Result]]]:
    """(the value, or the values, of these keys, the records that have it), in the order in which they come."""
    found: dict[Any, list[Result]] = {}
    for record in records:
        values = tuple(record[key] for key in keys)
        found.setdefault(values if len(keys) > 1 else values[0], []).append(record)
    return list(found.items())


def number(value: float, digits: int = 0) -> str:
    """With commas between the thousands."""
    return f"{value:,.{digits}f}"


def spread(values: Iterable[float], digits: int = 0) -> str:
    """What all lie between."""
    every = list(values)
    return f"{number(min(every), digits)} - {number(max(every), digits)}"


def verdict(is_met: bool, wanted: str) -> str:
    """A target, and whether it was met."""
    return f"{wanted}: {'met' if is_met else '**not met**'}"


def parts(launches: Sequence[Result]) -> str:
    """Of a start, the medians of those that can be seen."""
    medians = {part: statistics.median(one["parts"][part] for one in launches) for part in launches[0]["parts"]}
    seen = (f"{part} {seconds:.2f}" for part, seconds in medians.items() if seconds >= 0.005)
    return f"Its parts, medians in seconds: {', '.join(seen)}."


def versions_in(value: object) -> Iterator[tuple[str, str]]:
    """(library, version), wherever versions are told."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from inner.items() if key == "versions" else versions_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from versions_in(inner)


def joined(found: Iterable[tuple[str, str]]) -> str:
    """Every library once, with all versions of it that were in use."""
    of_library: dict[str, dict[str, None]] = {}
    for library, version in found:
        of_library.setdefault(library, {})[version] = None
    return ", ".join(f"{library} {' and '.join(numbers)}" for library, numbers in of_library.items())


# ---- the whole ----


def measure(name: str, options: argparse.Namespace, facts: Result) -> Result:
    """A section: its scripts in turn; the first that fails ends all with its exit code."""
    given = ["--source", str(options.source)] if options.source and name in NEED_ROWS else []
    given += ["--trl-python", options.trl_python] if options.trl_python and name in NEED_TRL else []
    results = []
    for command in COMMANDS[name]:
        script, *settings = shlex.split(command)
        print(f"\n==== {command} ====\n", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "result.json")
            words = [sys.executable, str(ROOT / "benchmarks" / script), *settings, *given, "--json", str(path)]
            exit_code = subprocess.run(words, check=False).returncode
            if exit_code:
                print(f"{command} ended with exit code {exit_code}; the page stays as it was.", file=sys.stderr)
                sys.exit(exit_code)
            results.append(without_places(read(path)))
    return {**facts, "commands": list(COMMANDS[name]), "results": results}


def commit() -> str:
    """Of the code that is measured; `-dirty` where it has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    return done.stdout.strip() or "unknown"


def read(path: Path) -> Result:
    """A JSON file."""
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_page() -> None:
    """From all result files; their names begin with the date."""
    PAGE.write_text(page([read(path) for path in sorted(RESULTS.glob("*.json"))]), encoding="utf-8")


def main() -> int:
    """Measure what is wanted, write the result after every section, and the page at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, help="the other sections stay as they are")
    parser.add_argument("--source", type=Path, help="directory of the rows; default: that of the scripts")
    parser.add_argument("--trl-python", help="python of an environment with TRL and PEFT (benchmarks/README.md)")
    parser.add_argument("--render-only", action="store_true", help="measure nothing; write the page")
    options = parser.parse_args()
    if options.render_only:
        write_page()
        return 0
    result: Result = {"date": date.today().isoformat(), "machine": machine(), "sections": {}}
    path = RESULTS / file_name(result)
    if options.only and path.is_file():
        result = read(path)
    RESULTS.mkdir(exist_ok=True)
    wanted, facts = in_new_process(targets), {"commit": commit(), "versions": versions()}
    for name in options.only or COMMANDS:
        section = measure(name, options, facts | {"targets": wanted.get(name, {})})
        result = with_section(result, name, section)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_page()
    print(f"\n{path.relative_to(ROOT)} and {PAGE.relative_to(ROOT)} are written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
