"""The ledger as figures: what became of every row, how long the samples are, what the answers end with."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.errors import DataError
from launch.fingerprint import digest_of
from launch.ledger import KEPT, OUTCOMES
from launch.recipe import DataBlock
from launch.samples import Samples

NUM_BINS = 24
SPLITS = ("train", "evaluation")


def build_report(
    facts: Mapping[str, Any],
    rows: Mapping[str, npt.NDArray[Any]],
    samples: Samples,
    split: Mapping[str, npt.NDArray[np.int64]],
) -> dict[str, Any]:
    """data_report.json. `facts` is prepared.json, `rows` has the outcome and the file of every row."""
    trained, evaluated = (len(np.unique(split[name])) for name in SPLITS)
    by_number = np.bincount(rows["outcome"], minlength=len(OUTCOMES))
    outcomes = {"trained": trained, "evaluated": evaluated, "left out": int(by_number[KEPT]) - trained - evaluated}
    outcomes |= {name: int(count) for name, count in zip(OUTCOMES, by_number, strict=True) if name != "kept"}
    rows_of_file = np.bincount(rows["file"], minlength=len(facts["files"]))
    ends: dict[str, int] = facts["end_tokens"]
    parts = {name: samples.select(split[name]) for name in SPLITS}
    longest = max((int(part.lengths.max()) for part in parts.values() if len(part)), default=0)
    edges = np.unique(np.linspace(0, longest + 1, NUM_BINS + 1).astype(np.int64))
    return {
        "rows": len(rows["outcome"]),
        "outcomes": {name: count for name, count in outcomes.items() if count},
        "files": {label: int(count) for label, count in zip(facts["files"], rows_of_file, strict=True)},
        "template": facts["template"],
        **{name: _lengths(part) for name, part in parts.items()},
        "answers": {
            "trained": facts["answers"],
            "stop_token_share": sum(ends.values()) / facts["answers"] if facts["answers"] else 0.0,
            "stop_tokens": {facts["end_token_texts"][token]: count for token, count in ends.items()},
        },
        "shortened": facts["counts"].get("shortened", 0),
        "tokenised_in_pieces": {name: n for name, n in facts["counts"].items() if name != "shortened" and n},
        "length_histogram": {
            "edges": edges.tolist(),  # tokens; bin i is [edges[i], edges[i + 1])
            **{name: np.histogram(part.lengths, edges)[0].tolist() for name, part in parts.items()},
        },
        "examples": facts["examples"],
    }


def describe_splits(
    data: DataBlock,
    source_of_file: npt.NDArray[np.int64],
    source_of_sample: npt.NDArray[np.int64],
    rows_of_file: Mapping[str, int],
    sha256_of_files: Sequence[str],
    split: Mapping[str, npt.NDArray[np.int64]],
) -> dict[str, Any]:
    """Of each split its samples, a SHA-256 of what they are and in which order, and the rows of each source.

    Moving a file does not change the SHA-256, and evaluation sources do not change that of train.
    """
    described = []
    for number, source in enumerate((*data.train, *data.evaluation)):
        files = np.flatnonzero(source_of_file == number).tolist()
        num_rows = sum(list(rows_of_file.values())[file] for file in files)
        digest = digest_of([sha256_of_files[file] for file in files])
        path = "/".join(filter(None, (source.path, source.subset, source.split if source.split != "train" else "")))
        described.append({"path": path, "rows": num_rows, "sha256": digest})
    train, evaluation = described[: len(data.train)], described[len(data.train) :]
    first = int((source_of_sample < len(data.train)).sum()) if evaluation else 0  # sample that is held out
    parts = {"train": (train, split["train"]), "evaluation": (evaluation or train, split["evaluation"] - first)}
    return {
        name: {
            "samples": len(numbers),
            "sha256": digest_of(
                [[source["sha256"] for source in sources], hashlib.sha256(numbers.tobytes()).hexdigest()]
            ),
            "sources": sources,
        }
        for name, (sources, numbers) in parts.items()
    }


def check_report(report: Mapping[str, Any], max_dropped_share: float, *, must_evaluate: bool) -> None:
    """Raises DataError for rows that no run should start with."""
    outcomes, answers, train = report["outcomes"], report["answers"], report["train"]
    dropped = dropped_rows(report)
    examples = [example for name in dropped for example in report["examples"].get(name, ())]
    first = f"; the first is {examples[0]['row_id']}: {examples[0]['detail']}" if examples else ""
    if sum(dropped.values()) > max_dropped_share * report["rows"]:
        raise DataError(
            f"{sum(dropped.values()):,} of {report['rows']:,} rows are dropped ({_listed(dropped)}), more than "
            f"data.max_dropped_share = {max_dropped_share:g}{first}."
        )
    if not train["samples"]:
        remedy = "; lower data.test_size" if "evaluated" in outcomes else ""
        raise DataError(f"No row is left to train on: {_listed(outcomes)}{first}{remedy}.")
    if must_evaluate and not report["evaluation"]["samples"]:
        raise DataError(f"data.evaluation leaves no row to evaluate: {_listed(outcomes)}{first}.")
    if not answers["stop_tokens"]:
        raise DataError(
            f"None of the {answers['trained']:,} trained answers ends with a special token of the tokenizer, so that "
            f"the model would never learn to stop: the template {report['template']} is not this model's; choose "
            "another data.template, or a base whose tokenizer has the end token of this one."
        )
    if train["trained_tokens"] == train["tokens"] - train["samples"]:
        raise DataError(f"The template {report['template']} trains every token, questions included; its mask is wrong.")


def outcomes_line(report: Mapping[str, Any]) -> str:
    """`50: 40 trained, 10 evaluated`."""
    return f"{report['rows']:,}: {_listed(report['outcomes'])}"


def dropped_rows(report: Mapping[str, Any]) -> dict[str, int]:
    """Rows by the reason why they are not used; duplicates and what weights leave out were asked for."""
    outcomes = report["outcomes"]
    return {name: outcomes[name] for name in OUTCOMES if name in outcomes and name != "duplicate"}


def report_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of everything in the report that one would want to see before a run."""
    num_rows = report["rows"]
    width = len(f"{num_rows:,}")
    files = report["files"]
    table = [("rows", f"{num_rows:,} in {next(iter(files)) if len(files) == 1 else f'{len(files):,} files'}")]
    for name, count in report["outcomes"].items():
        examples = ", ".join(example["row_id"] for example in report["examples"].get(name, ()))
        more = f", {'e.g. ' if count > len(report['examples'].get(name, ())) else ''}{examples}" if examples else ""
        table.append((f"  {name}", f"{count:>{width},}  {count / num_rows:6.1%}{more}"))
    for name in SPLITS:
        part = report[name]
        if part["samples"]:
            table.append((f"{name} samples", f"{part['samples']:,}, together {part['tokens']:,} tokens"))
            lengths = f"p50 {part['tokens_p50']:,}, p95 {part['tokens_p95']:,}, longest {part['tokens_max']:,} tokens"
            table.append(("  lengths", lengths))
            table.append(("  trained", f"{part['trained_tokens']:,} tokens, {part['trained_share']:.1%}"))
    answers = report["answers"]
    ends = ", ".join(answers["stop_tokens"])
    table.append(
        (
            "answers",
            f"{answers['trained']:,} trained, {answers['stop_token_share']:.1%} end with {ends or 'no stop token'}",
        )
    )
    if report["shortened"]:
        table.append(("shortened", f"{report['shortened']:,} rows lost their last answers to data.max_length"))
    for reason, count in report["tokenised_in_pieces"].items():
        table.append(("in pieces", f"{count:,} rows were tokenised piece by piece: {reason}"))
    return table


def _listed(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in outcomes.items())


def _lengths(samples: Samples) -> dict[str, Any]:
    if not len(samples):
        return {"samples": 0}
    p50, p95 = np.percentile(samples.lengths, [50, 95])
    num_tokens, num_trained = int(samples.lengths.sum()), int(samples.num_trained.sum())
    return {
        "samples": len(samples),
        "tokens": num_tokens,
        "trained_tokens": num_trained,
        "trained_share": num_trained / num_tokens,
        "tokens_p50": round(float(p50)),
        "tokens_p95": round(float(p95)),
        "tokens_max": int(samples.lengths.max()),
    }
