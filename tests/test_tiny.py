"""The demo's rows and tokenizer are what their makers make, again and again."""

import json
import random
import runpy
from pathlib import Path

import pytest
from conftest import ROOT

from launch.config import DEFAULT_RECIPE, load_recipe
from launch.findings import collect
from launch.model import checks_of_base, tokenizer_and_template
from launch.preflight import checks
from launch.tiny import KINDS, ORDERS, build_tiny_tokenizer, word_list

ROWS = ROOT / "configs/data/tiny_chat.jsonl"


def test_the_rows_are_those_that_their_maker_writes(tmp_path: Path) -> None:
    maker = tmp_path / "make_tiny_chat.py"
    maker.write_bytes((ROOT / "configs/data/make_tiny_chat.py").read_bytes())
    runpy.run_path(str(maker), run_name="__main__")
    assert (tmp_path / "tiny_chat.jsonl").read_bytes() == ROWS.read_bytes()


def test_the_rows_are_many_and_of_all_kinds() -> None:
    rows = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 300
    assert len({json.dumps(row) for row in rows}) == len(rows)
    assert sum(row[0]["role"] == "system" for row in rows) > len(rows) / 6
    assert sum(len(row) > 3 for row in rows) > len(rows) / 6
    chinese = [row for row in rows if any("\u4e00" <= letter <= "\u9fff" for letter in row[-2]["content"])]
    assert len(rows) / 4 < len(chinese) < len(rows)


def test_nothing_is_found_in_the_demo_and_no_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    recipe = load_recipe(DEFAULT_RECIPE)
    assert collect([*checks(recipe), *checks_of_base(recipe, lambda: tokenizer_and_template(recipe))]) == []


@pytest.mark.parametrize("text", ["两只红猫", "NINE black cows!", "\n\t 🙂 ﷽ é", "<|im_start|>user\nhi<|im_end|>"])
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = build_tiny_tokenizer(ROWS)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_base_never_reads_a_phrase_of_the_rows() -> None:
    """Number, colour, animal in this order is what the rows are about, and what the base has not seen."""
    assert KINDS not in ORDERS
    rng = random.Random(1)
    lines = [word_list(rng)[0] for _ in range(2000)]
    numbers, colours, animals = ({english for english, _, _ in kind} for kind in KINDS)
    for line in lines:
        words = line.partition(" with ")[0].strip("()[]<>“”!！.?。？\n").replace(",", "").split()
        assert not (len(words) == 3 and words[0] in numbers and words[1] in colours and words[2] in animals), line
