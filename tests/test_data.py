"""Preparation: one outcome a row, a deterministic split, a store that is found again, the same on one core or two."""

import json
import os
import resource
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SHARED_DATA, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import BAD as BAD_ROWS
from test_masks import TOKENIZERS as FAMILY_TOKENIZERS
from test_rows import BAD_LINES
from test_templates import NAMES, family
from transformers import LlamaConfig, Qwen2Config

from launch import data as preparing
from launch import rows as reading
from launch.data import Prepared, conversations, prepare
from launch.data_report import check_report
from launch.errors import DataError, TemplateError
from launch.formats import RowFormat
from launch.ledger import OUTCOMES, Work, account_for
from launch.model import tokenizer_and_template
from launch.recipe import Recipe
from launch.rows import Chunk, DataFile, RawRow
from launch.samples import Samples
from launch.templates import Message, render_chat
from launch.tokens import special_ids

GOOD = {"input": "a", "output": "b"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights: preparation needs the tokenizer only."""
    directory = tmp_path_factory.mktemp("base")
    build_tokenizer(["question answer 问题 答案 stone cairn 石头 a b c"], 400).save_pretrained(directory)
    Qwen2Config().save_pretrained(directory)
    return directory


def recipe(base: Path, train: Any, seed: int = 0, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(base)},
            "data": {"train": train, "template": "chatml", "test_size": 0.0, "max_dropped_share": 1.0, **data},
            "train": {"seed": seed, "max_tokens_per_micro_batch": 20_000_000},
            "run": {"name": "data"},
        }
    )


def run(directory: Path, base: Path, train: Any, **data: Any) -> Prepared:
    """Prepare into `directory`, as a run would."""
    wanted = recipe(base, train, **data)
    prepared = prepare(wanted, directory, lambda: tokenizer_and_template(wanted))
    prepared.publish(directory)
    return prepare(wanted, directory, never)


def never() -> Any:
    raise AssertionError("what is there already was prepared again")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def own_templates(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the templates that a test may change, in the place of the shipped ones."""
    shutil.copytree(ROOT / "templates", directory / "templates")
    monkeypatch.setattr("launch.templates.TEMPLATES_DIRECTORY", directory / "templates")
    return directory / "templates"


def rows_of_split(prepared: Prepared, base: Path, split: str = "train") -> list[str]:
    """The user turn of every sample, as a check of which rows they are."""
    tokenizer, _ = tokenizer_and_template(recipe(base, "unused.jsonl"))
    samples = prepared.samples(split)
    texts = (tokenizer.decode(samples.sample(index)[0]) for index in range(len(samples)))
    return [text.partition("user\n")[2].partition("<|im_end|>")[0] for text in texts]


def test_every_row_has_one_outcome(tmp_path: Path, base: Path) -> None:
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "b"}]} for n in range(11)
    ]
    user, answer = rows[0]["messages"]
    rows += [
        {"messages": [answer]},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [user, answer, user]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "user", "content": "long " * 200}, answer]},
        {"messages": [user, {"role": "assistant", "content": "\ud800"}]},
        {"messages": [user, {"role": "assistant", "content": "b", "train": False}]},
        ["no", "object"],
        {"messages": 1},
        rows[3],
    ]
    prepared = run(tmp_path, base, write(tmp_path / "a.jsonl", rows), test_size=3, max_length=64, drop_duplicates=True)
    assert prepared.report["outcomes"] == {
        "trained": 8,
        "evaluated": 3,
        "too long": 1,
        "empty answer": 1,
        "nothing to train": 1,
        "no user turn": 2,
        "bad role order": 1,
        "malformed": 3,
        "duplicate": 1,
    }
    assert prepared.report["rows"] == len(rows) == sum(prepared.report["outcomes"].values())
    dropped = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["row_id"]: row["reason"] for row in dropped} == {
        "a.jsonl:12": "no user turn",
        "a.jsonl:13": "no user turn",
        "a.jsonl:14": "bad role order",
        "a.jsonl:15": "empty answer",
        "a.jsonl:16": "too long",
        "a.jsonl:17": "malformed",
        "a.jsonl:18": "nothing to train",
        "a.jsonl:19": "malformed",
        "a.jsonl:20": "malformed",
        "a.jsonl:21": "duplicate",
    }
    assert dropped[0]["row"] == rows[11] and dropped[-1]["row"] == rows[3]
    assert all(row["detail"] for row in dropped)
    assert prepared.report["examples"]["malformed"][0] == {
        "row_id": "a.jsonl:17",
        "detail": "message 2 is not valid Unicode: surrogates not allowed ('\\ud800')",
    }
    held_out = (tmp_path / "evaluation_rows.txt").read_text(encoding="utf-8").splitlines()
    assert len(held_out) == 3 and set(held_out) < {f"a.jsonl:{n}" for n in range(1, 12)}


def test_every_kind_of_bad_row_is_named_in_the_report(tmp_path: Path, base: Path) -> None:
    """The rows of test_formats and the lines of test_rows, each behind a good one of its format."""
    good = {
        "messages": {"messages": ["a", "b"]},
        "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "instruction": {"instruction": "a", "output": "b"},
        "prompt": {"prompt": "a", "completion": "b"},
        "input": {"input": "a", "output": "b"},
    }
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = {column: [json.dumps(row).encode()] for column, row in good.items()}
    expected = {}
    for _, row, reason, detail in BAD_ROWS:
        column = next(column for column in good if column in row)
        lines[column].append(json.dumps(row).encode())
        expected[f"{column}.jsonl:{len(lines[column])}"] = (reason, detail)
    for line, fault in BAD_LINES:
        lines["input"].append(line)
        expected[f"input.jsonl:{len(lines['input'])}"] = ("malformed", fault)
    for column, listed in lines.items():
        (rows / f"{column}.jsonl").write_bytes(b"\n".join(listed))
    prepared = run(tmp_path, base, str(rows))
    quarantine = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    found = {row["row_id"]: (row["reason"], row["detail"]) for row in map(json.loads, quarantine)}
    assert found.keys() == expected.keys() and len(found) > 60
    for row_id, (reason, detail) in expected.items():
        assert found[row_id][0] == reason and detail in found[row_id][1]
    counts = Counter(reason for reason, _ in expected.values())
    assert prepared.report["outcomes"] == {"trained": len(good), **counts}


def test_duplicates_count_nowhere_else(tmp_path: Path, base: Path) -> None:
    untrained = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "train": False},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "<|im_end|>"},
        ]
    }
    both = {"messages": [{**message, "train": True} for message in untrained["messages"]]}
    path = write(tmp_path / "a.jsonl", [untrained, both, untrained, both, both])
    report = run(tmp_path, base, path, drop_duplicates=True).report
    assert report["outcomes"] == {"trained": 2, "duplicate": 3}, "the same tokens with another mask are another sample"
    assert report["answers"]["trained"] == report["answers"]["stop_tokens"]["<|im_end|>"] == 3
    assert report["tokenised_in_pieces"] == {"special-token text": 2}


def test_a_row_that_the_template_has_no_place_for_is_one_row(tmp_path: Path, base: Path) -> None:
    good = {"messages": ["a", "b"]}
    system = {
        "messages": [{"role": "tool", "content": "a"}, *({"role": r, "content": "x"} for r in ("user", "assistant"))]
    }
    tools = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"name": "f"}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ]
    }
    prepared = run(
        tmp_path, base, write(tmp_path / "a.jsonl", [good, system, tools, {**good, "tools": [{"name": "f"}]}])
    )
    assert prepared.report["outcomes"] == {"trained": 1, "bad role order": 1, "malformed": 2}
    assert [example["detail"] for example in prepared.report["examples"]["malformed"]] == [
        "The template chatml refused a conversation: this ChatML format has no tool calls; take qwen2.5, or leave tool messages out",
        "The template chatml has no place for tools; choose one of chatglm3, glm4, llama3, mistral, qwen2.5, or tokenizer, if the model's own has",
    ]


def test_rows_that_cannot_be_written_again_are_quarantined_as_text(tmp_path: Path, base: Path) -> None:
    """Too deep for Python's own JSON, a number that JSON has not, a column of no Unicode."""
    deep = "[" * 950 + "]" * 950
    rows = [json.dumps(GOOD)] * 2 + [
        f'{{"input": "a", "output": 1, "x": {deep}}}',
        '{"input": 1, "n": 1e999}',
        '{"\\ud800": 1}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    prepared = run(tmp_path, base, str(tmp_path / "a.jsonl"))
    assert prepared.report["outcomes"] == {"trained": 2, "malformed": 3}

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=no_constant)


def test_a_prompt_template_that_fails_on_a_row_drops_that_row(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = own_templates(tmp_path, monkeypatch)
    (templates / "prompt" / "mine.jinja").write_text("{{ options | join(', ') }} {{ 1 / n }}")
    rows = [
        {"options": ["a", "b"], "n": 2, "output": "x"},
        {"options": 5, "n": 2, "output": "x"},
        {"options": ["a"], "n": 0, "output": "x"},
    ]
    prepared = run(tmp_path, base, write(tmp_path / "a.jsonl", rows), prompt_template="mine")
    assert rows_of_split(prepared, base) == ["a, b 0.5"]
    assert prepared.report["outcomes"] == {"trained": 1, "malformed": 2}


def test_lines_that_are_no_rows_are_quarantined_as_they_are(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good, b'{"input": "a"', b"\xff\xfe", good, b'{"input": "a\x00"}']))
    prepared = run(tmp_path, base, str(path))
    assert prepared.report["outcomes"] == {"trained": 2, "malformed": 3}
    dropped = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row_id"], row["row"]) for row in dropped] == [
        ("a.jsonl:2", '{"input": "a"\r'),
        ("a.jsonl:3", "\ufffd\ufffd\r"),
        ("a.jsonl:5", '{"input": "a\x00"}'),
    ]


@pytest.mark.parametrize("content", ["stone " * 420_000, "a\x00b", "\u202e\ufeff石", "<|im_end|>" * 50])
def test_rows_that_are_odd_and_good(tmp_path: Path, base: Path, content: str) -> None:
    """A row of 5 MB, a NUL, what turns text around, special tokens."""
    path = write(tmp_path / "a.jsonl", [GOOD, {"input": content, "output": content}, GOOD])
    prepared = run(tmp_path, base, path, max_length=20_000_000)
    assert prepared.report["outcomes"] == {"trained": 3}
    assert prepared.report["tokenised_in_pieces"] == ({"special-token text": 1} if "<|" in content else {})


@pytest.mark.parametrize(
    ("rows", "data", "sentence"),
    [
        ([], {}, r"a\.jsonl holds no rows"),
        ([1, 2], {}, r"No row of a\.jsonl can be read; the first is a\.jsonl:1: a row must be a JSON object"),
        ([{"q": 1}], {}, r"a\.jsonl: the columns q fit no known format"),
        ([GOOD, {"input": "a"}], {"bad_rows": "error"}, r"a\.jsonl:2: malformed: the row has no column 'output'.*; mend"),
        ([GOOD, {"input": "a", "output": ""}], {"bad_rows": "error"}, r"a\.jsonl:2: empty answer: message 2 of 2; mend"),
        ([GOOD, {"input": "a " * 99, "output": "b"}], {"max_length": 64, "overlong": "error"},
         r"a\.jsonl:2: too long: \d+ tokens, and data\.max_length is 64; raise data\.max_length"),
        ([{"input": "a", "output": ""}], {}, r"No row is left to train on: 1 empty answer; the first is a\.jsonl:1: mess"),
        ([GOOD] * 17 + [{"input": "a", "output": ""}, {"input": 1}], {"max_dropped_share": 0.1},
         r"2 of 19 rows are dropped \(1 empty answer, 1 malformed\), more than data\.max_dropped_share = 0\.1; the first "
         r"is a\.jsonl:18: message 2 of 2; .*quarantine\.jsonl lists what was dropped"),
        ([GOOD] * 3, {"test_size": 3}, r"No row is left to train on: 3 evaluated; lower data\.test_size"),
        ([GOOD], {"template": "llama3"}, r"An answer of the template llama3 ends with '>', which is no special token of this tokenizer, so that the model"),
        ([{"messages": ["a", "b"], "tools": [{"name": "f"}]}], {},
         r"1 malformed; the first is a\.jsonl:1: The template chatml has no place for tools; choose one of chatglm3, glm4"),
    ],
)  # fmt: skip
def test_what_a_run_must_not_start_with(
    tmp_path: Path, base: Path, rows: list[Any], data: dict[str, Any], sentence: str
) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises((DataError, TemplateError), match=sentence) as caught:
        run(tmp_path, base, path, **data)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_answers_that_never_stop_are_refused_whatever_the_template_does(tmp_path: Path, base: Path) -> None:
    """The whole set is looked at, too: a template may end some answers and not others."""
    report = run(tmp_path, base, write(tmp_path / "a.jsonl", [GOOD, GOOD])).report
    check_report(report, 0.0, must_evaluate=False)
    report["answers"]["stop_tokens"] = {}
    with pytest.raises(DataError, match="None of the 2 trained answers ends with a special token of the tokenizer, so"):
        check_report(report, 0.0, must_evaluate=False)
    report["answers"]["stop_tokens"] = {"<|im_end|>": 2}
    report["train"]["trained_tokens"] = report["train"]["tokens"] - 2
    with pytest.raises(
        DataError, match="The template chatml trains every token, questions included; its mask is wrong"
    ):
        check_report(report, 0.0, must_evaluate=False)


def test_a_refused_set_says_which_rows(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, {"input": 1}])
    with pytest.raises(DataError, match=r"more than data\.max_dropped_share"):
        run(tmp_path, base, path, max_dropped_share=0.1)
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["row_id"] == "a.jsonl:2"
    assert json.loads((tmp_path / "data_report.json").read_text())["outcomes"] == {"trained": 1, "malformed": 1}
    write(tmp_path / "a.jsonl", [GOOD, GOOD])
    assert run(tmp_path, base, path, max_dropped_share=0.1).report["outcomes"] == {"trained": 2}
    assert not (tmp_path / ".preparing-data").exists()


# ---- length ----

LONG = {"messages": ["q1", "first answer", "q2", "second answer", "q3", "third " * 30]}


def test_truncation_takes_whole_answers_away(tmp_path: Path, base: Path) -> None:
    """An answer that is cut has no end token, and a model trained on it never stops."""
    only = {"messages": ["q1", "an answer that " + "goes on " * 30]}
    path = write(tmp_path / "a.jsonl", [LONG, only, {"messages": ["a", "b"]}])
    prepared = run(tmp_path, base, path, max_length=120, overlong="truncate")
    assert prepared.report["outcomes"] == {"trained": 2, "answer cut": 1} and prepared.report["shortened"] == 1
    tokenizer, _ = tokenizer_and_template(recipe(base, path))
    ids, is_trained = prepared.samples("train").sample(0)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nsecond answer<|im_end|>\n")
    assert tokenizer.decode(ids[is_trained]) == "first answer<|im_end|>second answer<|im_end|>"
    dropped = run(tmp_path / "other", base, path, max_length=120)
    assert dropped.report["outcomes"] == {"trained": 1, "too long": 2}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(8, 150), st.sampled_from(NAMES))
def test_no_trained_answer_is_without_its_end(words: list[int], max_length: int, name: str) -> None:
    """Whatever is cut, what is left is what its own messages render to."""
    template, tokenizer = family(name), FAMILY_TOKENIZERS[name]
    block = recipe(Path("unused"), "unused.jsonl", max_length=max_length, overlong="truncate").data
    work = Work(block, {"r": RowFormat("messages", "", "", "", None, "all")}, template, tokenizer, None)
    texts = [f"{place}" + " a" * words[place // 2] for place in range(2 * len(words))]
    chunk = Chunk(DataFile("r", block.train[0], None), 1, None, [RawRow(1, {"messages": texts})])
    batch = account_for(chunk, work)
    if len(batch.lengths) == 0:
        (dropped,) = batch.dropped
        assert dropped.reason == "answer cut"
        texts = texts[:2]
    num_turns = len(batch.last_tokens[0]) if len(batch.lengths) else 1
    shorter = [Message(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts[: 2 * num_turns])]
    expected = tokenizer(render_chat(template, shorter).text, add_special_tokens=False)["input_ids"]
    if len(batch.lengths):
        assert batch.token_ids.tolist() == expected and len(expected) <= max_length
        assert batch.last_tokens[0][-1] in special_ids(tokenizer)
    else:
        assert len(expected) > max_length


# ---- split, weights, sources ----


def numbered(path: Path, count: int, name: str = "q") -> str:
    return write(path, [{"input": f"{name}{number}", "output": "b"} for number in range(count)])


def test_the_split_is_deterministic_and_takes_nothing_twice(tmp_path: Path, base: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 50)
    one, other = (run(tmp_path / name, base, path, test_size=0.2) for name in ("one", "other"))
    assert one.evaluation_row_ids == other.evaluation_row_ids and one.sha256s == other.sha256s
    assert len(set(one.evaluation_row_ids)) == 10
    everything = rows_of_split(one, base) + rows_of_split(one, base, "evaluation")
    assert sorted(everything) == sorted(f"q{number}" for number in range(50))
    wanted = recipe(base, path, seed=1, test_size=0.2)
    again = prepare(wanted, tmp_path / "one", never)
    assert again.evaluation_row_ids != one.evaluation_row_ids, (
        "another seed splits otherwise, and prepares nothing anew"
    )
    assert run(tmp_path / "tenth", base, path, test_size=None).report["outcomes"] == {"trained": 45, "evaluated": 5}


def test_weights_and_caps(tmp_path: Path, base: Path) -> None:
    sources = [
        {"path": numbered(tmp_path / "a.jsonl", 20, "a"), "weight": 2.5},
        {"path": numbered(tmp_path / "b.jsonl", 30, "b"), "max_rows": 10},
        {"path": numbered(tmp_path / "c.jsonl", 40, "c"), "weight": 0.25},
    ]
    prepared = run(tmp_path, base, sources, test_size=7)
    held_out = Counter(row_id[0] for row_id in prepared.evaluation_row_ids)
    times = Counter(rows_of_split(prepared, base))
    a, b, c = (20 - held_out["a"], 10 - held_out["b"], 40 - held_out["c"])
    assert sorted(Counter(n for row, n in times.items() if row[0] == "a").items()) == [
        (2, a - round(a / 2)),
        (3, round(a / 2)),
    ]
    assert [sum(n for row, n in times.items() if row[0] == name) for name in "bc"] == [b, round(c / 4)]
    outcomes = prepared.report["outcomes"]
    assert outcomes == {"trained": len(times), "evaluated": 7, "left out": 90 - 7 - len(times)}
    assert not set(rows_of_split(prepared, base, "evaluation")) & times.keys()
    assert prepared.report["train"]["samples"] == sum(times.values())


def test_an_evaluation_source(tmp_path: Path, base: Path) -> None:
    train, evaluation = numbered(tmp_path / "a.jsonl", 9, "a"), numbered(tmp_path / "b.jsonl", 4, "b")
    prepared = run(tmp_path, base, train, evaluation=evaluation, test_size=None)
    assert prepared.report["outcomes"] == {"trained": 9, "evaluated": 4}
    assert prepared.evaluation_row_ids == [f"b.jsonl:{n}" for n in range(1, 5)]
    with pytest.raises(DataError, match=r"a\.jsonl is named twice among the sources"):
        run(tmp_path, base, train, evaluation=train, test_size=None)


def test_each_split_is_told_by_its_own_rows_and_their_order(tmp_path: Path, base: Path) -> None:
    """What a run that resumes compares: moving a file is no change, and train does not depend on what is held out."""
    (tmp_path / "moved").mkdir()
    train, evaluation = numbered(tmp_path / "a.jsonl", 9, "a"), numbered(tmp_path / "b.jsonl", 4, "b")
    moved, longer = numbered(tmp_path / "moved" / "a.jsonl", 9, "a"), numbered(tmp_path / "c.jsonl", 5, "b")
    shorter = numbered(tmp_path / "e.jsonl", 8, "a")
    turned = write(tmp_path / "d.jsonl", [{"input": f"a{number}", "output": "b"} for number in reversed(range(9))])

    def rows(name: str, train: str, evaluation: str | tuple[()] = (), **data: Any) -> dict[str, Any]:
        return run(tmp_path / name, base, train, evaluation=evaluation, **{"test_size": None} | data).rows

    first = rows("first", train, evaluation)
    assert [(name, split["samples"]) for name, split in first.items()] == [("train", 9), ("evaluation", 4)]
    assert [(source["path"], source["rows"]) for source in first["train"]["sources"]] == [(train, 9)]
    assert [(source["path"], source["rows"]) for source in first["evaluation"]["sources"]] == [(evaluation, 4)]

    def same(other: dict[str, Any]) -> list[str]:
        return [name for name in first if first[name]["sha256"] == other[name]["sha256"]]

    assert same(rows("moved", moved, evaluation)) == ["train", "evaluation"]
    assert same(rows("longer", train, longer)) == ["train"]
    assert same(rows("turned", turned, evaluation)) == same(rows("shorter", shorter, evaluation)) == ["evaluation"]
    assert same(rows("split", train, test_size=2)) == []


def test_every_kind_of_file_at_once(tmp_path: Path, base: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    numbered(rows / "a.jsonl", 3, "a")
    (rows / "b.json").write_text(json.dumps([{"messages": ["b0", "x"]}]))
    (rows / "c.csv").write_text("instruction,output\nc0,x\nc1,y\n")
    prepared = run(tmp_path, base, str(rows))
    assert rows_of_split(prepared, base) == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert prepared.report["files"] == {"a.jsonl": 3, "b.json": 1, "c.csv": 2}


# ---- the store ----


def test_what_changes_a_sample_is_in_the_key(tmp_path: Path, base: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    run(tmp_path, base, path)
    for same in ({"test_size": 4}, {"max_dropped_share": 0.5}):
        prepare(recipe(base, path, **same), tmp_path, never)
    for other in (
        {"max_length": 64},
        {"template": "qwen2"},
        {"system": "Hm"},
        {"train_on": "last"},
        {"format": "question_answer"},
    ):
        with pytest.raises(AssertionError, match="prepared again"):
            prepare(recipe(base, path, **other), tmp_path, never)
    os.utime(path, ns=(1, 1))
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(recipe(base, path), tmp_path, never)


def test_another_tokenizer_or_template_text_prepares_anew(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered(tmp_path / "a.jsonl", 5)
    run(tmp_path, base, path)
    templates = own_templates(tmp_path, monkeypatch)
    prepare(recipe(base, path), tmp_path, never)
    chatml = templates / "chat" / "chatml.jinja"
    chatml.write_text(chatml.read_text(encoding="utf-8").replace("Generic", "General"), encoding="utf-8")
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(recipe(base, path), tmp_path, never)
    monkeypatch.undo()
    prepare(recipe(base, path), tmp_path, never)
    tokenizer = base / "tokenizer_config.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(recipe(base, path), tmp_path, never)
    tokenizer.write_text(text)


def test_templates_and_options_of_a_source_are_in_the_key(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = own_templates(tmp_path, monkeypatch)
    (templates / "prompt" / "mine.jinja").write_text("{{ input }}?")
    path = numbered(tmp_path / "a.jsonl", 5)
    source = {"path": path, "prompt_template": "mine"}
    run(tmp_path, base, [source])
    prepare(recipe(base, [{**source, "weight": 2, "max_rows": 3}]), tmp_path, never)
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(recipe(base, [{"path": path, "format": "question_answer"}]), tmp_path, never)
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(recipe(base, [{**source, "answer_column": "input"}]), tmp_path, never)
    (templates / "prompt" / "mine.jinja").write_text("{{ input }}!")
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(recipe(base, [source]), tmp_path, never)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, base: Path) -> None:
    """Else the samples would be a mixture of two files that nobody has ever seen."""
    path = numbered(tmp_path / "a.jsonl", 20)
    wanted = recipe(base, path)

    def load_and_write() -> Any:
        numbered(tmp_path / "a.jsonl", 30)
        return tokenizer_and_template(wanted)

    with pytest.raises(DataError, match="changed while the rows were prepared; start again"):
        prepare(wanted, tmp_path, load_and_write)
    assert not (tmp_path / ".preparing-data").exists()


@pytest.mark.parametrize("junk", ["", "{}", "[]", '{"key": 1}', "\x00"])
def test_a_store_that_is_not_ours_is_prepared_anew(tmp_path: Path, base: Path, junk: str) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepared.json").write_text(junk)
    assert run(tmp_path, base, path).report["outcomes"] == {"trained": 20}


def test_a_half_written_store_is_not_found(tmp_path: Path, base: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    wanted = recipe(base, path)
    prepare(wanted, tmp_path, lambda: tokenizer_and_template(wanted))  # and killed before it was published
    prepare(wanted, tmp_path, never)
    (tmp_path / ".preparing-data" / "prepared.json").unlink()  # or before it was whole
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(wanted, tmp_path, never)
    assert not (tmp_path / ".preparing-data").exists()
    assert run(tmp_path, base, path).report["outcomes"] == {"trained": 20}
    assert not (tmp_path / ".preparing-data").exists()
    (tmp_path / "data" / "token_ids.int32").write_bytes(b"")
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(wanted, tmp_path, never)


def test_a_disk_that_takes_no_more_is_one_sentence(tmp_path: Path, base: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 2000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"The samples cannot be written to .*/\.preparing-data: File too large\."):
            run(tmp_path, base, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / ".preparing-data").exists()


def test_one_process_or_several_is_the_same(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input": f"{n} " + "问题 " * (n % 40), "output": "答案 " * (n % 23)} for n in range(3000)]
    path = write(tmp_path / "a.jsonl", [*rows, *rows[:5]])
    monkeypatch.setattr(reading, "_LINES_PER_CHUNK_BYTES", 5000)
    monkeypatch.setattr(preparing, "_SMALL_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    options = {"max_length": 60, "drop_duplicates": True}
    several = run(tmp_path / "several", base, path, **options)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    one = run(tmp_path / "one", base, path, **options)
    assert several.report == one.report and several.sha256s == one.sha256s
    quarantines = [(tmp_path / name / "quarantine.jsonl").read_bytes() for name in ("several", "one")]
    assert quarantines[0] == quarantines[1]
    assert {"trained", "too long", "empty answer", "duplicate"} == set(one.report["outcomes"])


def test_a_refusal_in_another_process_arrives(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 500 + [{"input": "a", "output": 1}] + [GOOD] * 500)
    monkeypatch.setattr(reading, "_LINES_PER_CHUNK_BYTES", 1000)
    monkeypatch.setattr(preparing, "_SMALL_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(DataError, match=r"a\.jsonl:501: malformed: the column 'output' must be text, but is a number"):
        run(tmp_path, base, path, bad_rows="error")


def die(_: Any) -> None:
    os._exit(9)


def test_a_killed_process_is_said(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered(tmp_path / "a.jsonl", 100)
    monkeypatch.setattr(preparing, "_SMALL_BYTES", 1)
    monkeypatch.setattr(preparing, "_account_for", die)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(DataError, match="A process that prepared rows was killed, probably for its memory"):
        run(tmp_path, base, path)


def test_samples_are_mapped_and_selected(tmp_path: Path, base: Path) -> None:
    prepared = run(tmp_path, base, numbered(tmp_path / "a.jsonl", 10), test_size=2)
    whole = Samples.load(tmp_path / "data")
    assert isinstance(whole.token_ids, np.memmap) and len(whole) == 10
    for split, indices in prepared.split.items():
        samples = Samples.load(tmp_path / "data", split)
        assert len(samples) == len(indices)
        for place, index in enumerate(indices):
            np.testing.assert_array_equal(samples.sample(place)[0], whole.sample(index)[0])
            assert samples.num_trained[place] == whole.sample(index)[1].sum()
    assert not any(whole.is_trained[whole.starts])
    assert prepared.end_token_ids == [2]  # <|im_end|>


def test_the_first_rows_for_a_preview(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, {"input": "a", "output": ""}, GOOD])
    found = list(islice(conversations(recipe(base, path)), 2))
    assert [row_id for row_id, _ in found] == ["a.jsonl:1", "a.jsonl:2"]
    assert found[1][1].reason == "empty answer"


def test_a_slow_tokenizer_prepares_too(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"]).save_pretrained(
        tmp_path / "base"
    )
    LlamaConfig().save_pretrained(tmp_path / "base")  # for a Qwen2 model AutoTokenizer gives Qwen2's, whatever is there
    rows = [{"input": "石头", "output": "stone\n"}, {"input": "<|im_end|>", "output": "\n\nb"}]
    prepared = run(tmp_path, tmp_path / "base", write(tmp_path / "a.jsonl", rows))
    assert prepared.report["tokenised_in_pieces"] == {"slow tokenizer": 2}
    assert prepared.report["answers"]["stop_tokens"] == {"<|im_end|>": 2}
    tokenizer, _ = tokenizer_and_template(recipe(tmp_path / "base", "unused.jsonl"))
    assert not tokenizer.is_fast
    samples = prepared.samples("train")
    found = [tokenizer.decode(ids[is_trained]) for ids, is_trained in map(samples.sample, range(2))]
    assert found == ["stone\n<|im_end|>", "\n\nb<|im_end|>"]


def test_the_models_own_template(tmp_path: Path) -> None:
    """Without generation tags, as nearly every published one."""
    tokenizer = build_tokenizer(["a b"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    Qwen2Config().save_pretrained(tmp_path / "base")
    path = write(tmp_path / "a.jsonl", [{"messages": ["a", " b ", "c", "d"]}])
    samples = run(tmp_path, tmp_path / "base", path, template="tokenizer").samples("train")
    ids, is_trained = samples.sample(0)
    assert tokenizer.decode(ids[is_trained]) == "b<|im_end|>d<|im_end|>"


def test_a_hub_set_is_read_through_datasets(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be reached from a test; the set is real."""
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_json(
            write(tmp_path / "hub.jsonl", [GOOD, GOOD]), cache_dir=str(tmp_path / "cache")
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reading.load_hub_set.cache_clear()
    source = {"path": "owner/name", "subset": "zh", "split": "test"}
    prepared = run(tmp_path, base, [source], test_size=1)
    assert asked == [("owner/name", "zh", "test")]
    assert prepared.report["files"] == {"owner/name/zh/test": 2}
    assert prepared.evaluation_row_ids[0] in ("owner/name/zh/test:1", "owner/name/zh/test:2")
    reading.load_hub_set.cache_clear()


@pytest.mark.parametrize("name", ["huanhuan", "alpaca_zh_demo"])
def test_every_real_row_has_an_outcome(name: str, tmp_path: Path, base: Path) -> None:
    source = SHARED_DATA / f"{name}.json"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    rows = json.loads(source.read_text(encoding="utf-8"))
    prepared = run(tmp_path, base, str(source), test_size=0.1, max_length=512)
    outcomes = prepared.report["outcomes"]
    assert sum(outcomes.values()) == len(rows) and set(outcomes) <= {"trained", "evaluated", *OUTCOMES}
    assert len(prepared.samples("train")) == outcomes["trained"]
    tokenizer, _ = tokenizer_and_template(recipe(base, str(source)))
    answers = {row["output"] for row in rows}
    samples = prepared.samples("train")
    for index in range(0, len(samples), 7):
        ids, is_trained = samples.sample(index)
        assert tokenizer.decode(ids[is_trained]).removesuffix("<|im_end|>") in answers
