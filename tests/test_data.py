"""Rows to samples: every row has one outcome, and the mask is the answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED_DATA, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config import Recipe
from launch.data import Samples, prepare, tokenise
from launch.errors import DataError, TemplateError
from launch.formats import read_conversations
from launch.templates import Message, load_chat_template, render_chat

CHATML = load_chat_template("chatml")
TOKENIZER = build_tokenizer(["question answer 问题 答案 stone cairn 石头"], 400)


def recipe(train: Path | str, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "unused"},
            "data": {"train": str(train), "template": "chatml", "test_size": 0.0, **data},
            "run": {"name": "data"},
        }
    )


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def first_messages(path: Path, **data: Any) -> list[tuple[str, str]]:
    messages = read_conversations(str(path), recipe(path, **data).data)[0].messages
    return [(message["role"], message["content"]) for message in messages]


def test_alpaca(tmp_path: Path) -> None:
    rows = [{"instruction": "翻译", "input": "石头", "output": "stone"}]
    assert first_messages(write(tmp_path / "a.jsonl", rows)) == [("user", "翻译\n石头"), ("assistant", "stone")]
    rows = [{"instruction": "Say hi", "output": "hi", "system": "Be kind"}]
    expected = [("system", "Be kind"), ("user", "Say hi"), ("assistant", "hi")]
    assert first_messages(write(tmp_path / "b.jsonl", rows)) == expected


def test_question_answer_takes_the_instruction_as_system_message(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "Be brief", "input": "Why?", "output": "Rain"}])
    expected = [("system", "Be brief"), ("user", "Why?"), ("assistant", "Rain")]
    assert first_messages(path, format="question_answer") == expected
    path = write(tmp_path / "b.jsonl", [{"input": "Why?", "output": "Rain"}])
    assert first_messages(path) == [("user", "Why?"), ("assistant", "Rain")]
    assert first_messages(path, system="You are a guide")[0] == ("system", "You are a guide")


def test_a_json_array_with_a_bom(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"input": "a", "output": "b"}]).encode())
    assert first_messages(path) == [("user", "a"), ("assistant", "b")]


def test_a_prompt_template_turns_any_row_into_the_user_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "Sum", "input": "1 2", "answer": "3"}])
    assert first_messages(path, prompt_template="alpaca", answer_column="answer")[0] == ("user", "Sum\n1 2")
    with pytest.raises(TemplateError, match=r"no prompt template 'nowhere'; the valid names are alpaca"):
        first_messages(path, prompt_template="nowhere")
    path = write(tmp_path / "b.jsonl", [{"question": "?", "output": "!"}])
    with pytest.raises(
        DataError, match=r"b\.jsonl:1: templates/prompt/alpaca\.jinja names a missing column: 'instruction'"
    ):
        first_messages(path, prompt_template="alpaca")


def test_null_is_not_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "Sum", "input": None, "output": "3", "system": None}])
    assert first_messages(path) == [("user", "Sum"), ("assistant", "3")]
    path = write(tmp_path / "b.jsonl", [{"instruction": None, "input": "x", "output": "3"}])
    with pytest.raises(DataError, match=r"names a missing column: 'instruction'"):
        first_messages(path)


def test_the_answer_may_stand_in_another_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "Sum", "input": "1 2", "answer": "3"}])
    assert first_messages(path, answer_column="answer")[1] == ("assistant", "3")


GOOD = {"input": "a", "output": "b"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no rows"),
        ('{"input": "a", "output": "b"}\n{"input": \n', "line 2 is not JSON"),
        ("[1]", "a row must be a JSON object, but this is a list"),
        ('{"q": "a"}', "the columns q fit no known format"),
        ('{"input": "a", "output": 3}', "the column 'output' must be text, but is a int"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}', "rows.jsonl:2: the row has no column 'output'"),
        ('{"messages": "hi"}', "messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "messages[0] must be an object with role and content"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "messages[0].role is 'bot'; the valid roles are"),
        ('{"messages": [{"role": "user", "content": 1}]}', "messages[0].content must be text"),
        ('{"input": "a", "output": " "}', "leaves no row to train on: 1 empty answer"),
    ],
)
def test_what_is_wrong_with_the_rows_is_said_in_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare(recipe(path), TOKENIZER, CHATML)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("no/such/file.jsonl", "There is no data file no/such/file.jsonl"),
        ("./nowhere", "does not exist; give a .json file"),
        ("README.md", "is not of a kind that can be read"),
    ],
)
def test_what_is_wrong_with_the_source(source: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_conversations(source, recipe(source).data)


def test_every_row_has_one_outcome(tmp_path: Path) -> None:
    def chat(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": "stone"} for role in roles]}

    rows = [
        *(chat("user", "assistant") for _ in range(10)),
        chat("system", "user", "assistant", "user", "assistant"),
        chat("assistant", "user"),
        chat("system", "assistant"),
        chat("user", "assistant", "user"),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n "}]},
        {"messages": [{"role": "user", "content": "cairn " * 90}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]},
    ]
    prepared = prepare(recipe(write(tmp_path / "a.jsonl", rows), test_size=3, max_length=64), TOKENIZER, CHATML)
    assert prepared.report["outcomes"] == {
        "trained": 8,
        "evaluated": 3,
        "bad role order": 2,
        "no user turn": 1,
        "empty answer": 1,
        "too long": 1,
        "not valid Unicode": 1,
    }
    assert prepared.report["rows"] == len(rows)
    assert (len(prepared.train), len(prepared.evaluation)) == (8, 3)
    dropped = {row["row_id"]: row["reason"] for row in prepared.quarantine}
    assert dropped == {
        "a.jsonl:12": "bad role order",
        "a.jsonl:13": "no user turn",
        "a.jsonl:14": "bad role order",
        "a.jsonl:15": "empty answer",
        "a.jsonl:16": "too long",
        "a.jsonl:17": "not valid Unicode",
    }
    with pytest.raises(DataError, match=r"a\.jsonl:16 has \d+ tokens, more than data\.max_length = 64"):
        prepare(recipe(tmp_path / "a.jsonl", max_length=64, overlong="error"), TOKENIZER, CHATML)


def test_the_split_is_deterministic_and_takes_nothing_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"input": str(number), "output": "b"} for number in range(50)])
    one, other = (prepare(recipe(path, test_size=0.2), TOKENIZER, CHATML) for _ in range(2))
    held_out = one.report["evaluation_row_ids"]
    assert held_out == other.report["evaluation_row_ids"]
    assert len(set(held_out)) == 10 and len(one.train) == 40
    with pytest.raises(DataError, match="leaves none of the 50 usable rows"):
        prepare(recipe(path, test_size=50), TOKENIZER, CHATML)


def test_samples_survive_the_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, {"input": "石头", "output": "stone"}])
    samples = prepare(recipe(path), TOKENIZER, CHATML).train
    samples.save(tmp_path / "s.safetensors")
    again = Samples.load(tmp_path / "s.safetensors")
    for name in ("token_ids", "is_trained", "offsets"):
        np.testing.assert_array_equal(getattr(samples, name), getattr(again, name))
    assert samples.end_token_ids(TOKENIZER.all_special_ids) == [TOKENIZER.eos_token_id]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda value: value.strip() and "<|" not in value
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(text, text), min_size=1, max_size=4), st.one_of(st.none(), text))
def test_what_is_trained_decodes_to_the_answers_and_their_ends(
    turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = [Message(role="system", content=system)] if system else []
    for question, answer in turns:
        messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    token_ids, trained = tokenise([render_chat(CHATML, messages)], TOKENIZER)[0]
    found = TOKENIZER.decode(token_ids[trained], skip_special_tokens=False)
    expected = "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert found == expected


@pytest.mark.parametrize("name", ["huanhuan", "alpaca_zh_demo"])
def test_every_real_row_has_an_outcome(name: str) -> None:
    source = SHARED_DATA / f"{name}.json"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    rows = json.loads(source.read_text(encoding="utf-8"))
    prepared = prepare(recipe(source, test_size=0.1, max_length=512), TOKENIZER, CHATML)
    assert sum(prepared.report["outcomes"].values()) == len(rows)
    assert len(prepared.train) + len(prepared.evaluation) + len(prepared.quarantine) == len(rows)
