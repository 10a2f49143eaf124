"""Rows to conversations: every format, and forty ways in which a row can be wrong, each with its name."""

from typing import Any

import pytest

from launch.errors import DataError, TemplateError
from launch.formats import BadRowError, Conversation, choose_format, to_conversation
from launch.recipe import DataBlock, Source

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def read(row: dict[str, Any], **data: Any) -> Conversation:
    block = DataBlock.model_validate({"train": "rows.jsonl", "template": "chatml", **data})
    return to_conversation(row, choose_format("rows.jsonl", [row], block.train[0], block), "rows.jsonl:1")


def turns(row: dict[str, Any], **data: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read(row, **data).messages]


QA = [("user", "Why?"), ("assistant", "Rain")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "翻译", "input": "石头", "output": "stone"}, [("user", "翻译\n石头"), ("assistant", "stone")]),
        ({"instruction": "Why?", "input": "", "output": "Rain"}, QA),
        ({"instruction": "Why?", "input": None, "output": "Rain", "system": None}, QA),
        ({"instruction": "Why?", "output": "Rain", "system": "Be kind"}, [("system", "Be kind"), *QA]),
        (
            {"instruction": "Why?", "output": "Rain", "history": [["a", "b"], ["c", "d"]]},
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), *QA],
        ),
        ({"input": "Why?", "output": "Rain"}, QA),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Rain"}]}, QA),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be kind"},
                    {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                    {"role": "assistant", "content": "Rain"},
                ]
            },
            [("system", "Be kind"), *QA],
        ),
        ({"messages": ["Why?", "Rain"]}, QA),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Rain"}]}, QA),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Rain"}], "system": "Hm"},
            [("system", "Hm"), *QA],
        ),
        ({"prompt": "Why?", "completion": "Rain"}, QA),
        (
            {
                "prompt": [{"role": "system", "content": "Hm"}, {"role": "user", "content": "Why?"}],
                "completion": [{"role": "assistant", "content": "Rain"}],
            },
            [("system", "Hm"), *QA],
        ),
    ],
)
def test_formats_are_found_from_the_columns(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == expected


def test_question_answer_takes_the_instruction_as_system_message() -> None:
    row = {"instruction": "Be brief", "input": "Why?", "output": "Rain"}
    assert turns(row, format="question_answer") == [("system", "Be brief"), *QA]


def test_a_persona_for_those_who_have_none() -> None:
    assert turns({"input": "Why?", "output": "Rain"}, system="You are a guide")[0] == ("system", "You are a guide")
    row = {
        "messages": [
            {"role": "system", "content": "Own"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    }
    assert turns(row, system="You are a guide")[0] == ("system", "Own")
    row["messages"][2]["weight"] = 1
    assert read({"messages": row["messages"][1:]}, system="Hm").is_trained == (False, False, True)


def test_the_answer_may_stand_in_another_column() -> None:
    assert turns({"instruction": "Why?", "answer": "Rain"}, answer_column="answer") == QA
    assert turns({"input": "Why?", "answer": "Rain"}, answer_column="answer") == QA


def test_a_prompt_template_turns_any_row_into_the_user_turn() -> None:
    row = {"instruction": "Sum", "input": "1 2", "answer": "3"}
    assert turns(row, prompt_template="alpaca", answer_column="answer") == [("user", "Sum\n1 2"), ("assistant", "3")]
    with pytest.raises(TemplateError, match=r"no prompt template 'nowhere'; the valid names are alpaca"):
        turns(row, prompt_template="nowhere")


def test_a_source_overrides_the_block() -> None:
    row = {"instruction": "Be brief", "input": "Why?", "reply": "Rain"}
    block = DataBlock.model_validate({"train": "a.jsonl", "template": "chatml", "prompt_template": "alpaca"})
    source = Source(path="a.jsonl", format="question_answer", answer_column="reply")
    conversation = to_conversation(row, choose_format("a", [row], source, block), "a:1")
    assert [message["content"] for message in conversation.messages] == ["Be brief", "Why?", "Rain"]


def test_what_is_trained() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "", "weight": 0},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f", "train": True, "weight": 1},
    ]
    assert read({"messages": messages}).trained_answers == [False, False, True]
    for message in messages:
        message.pop("train", None)
        message.pop("weight", None)
    messages[3]["content"] = "d"
    assert read({"messages": messages}).trained_answers == [True, True, True]
    assert read({"messages": messages}, train_on="last").trained_answers == [False, False, True]
    given = {"prompt": messages[:5], "completion": messages[5:]}
    assert read(given).trained_answers == [False, False, True], "what stands in the prompt is given"


def test_tools_in_openai_and_sharegpt_form() -> None:
    openai = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "1"}]},
            {"role": "tool", "name": "weather", "content": "42"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [TOOL],
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": "{\\"city\\": \\"北京\\"}"}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": '[{"name": "weather", "parameters": {}}]',
    }
    for row in (openai, sharegpt):
        conversation = read(row)
        assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
        assert conversation.messages[1]["tool_calls"] == [CALL]
        assert conversation.tools == (TOOL,)
        assert conversation.trained_answers == [True, True]


def messages(*entries: Any) -> dict[str, Any]:
    """A row of messages: (role, content), or the entry as it is."""
    return {"messages": [{"role": e[0], "content": e[1]} if isinstance(e, tuple) else e for e in entries]}


U, A = ("user", "a"), ("assistant", "b")
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    # what, the row, the reason, the detail
    ("answer is a number", {"input": "a", "output": 3}, "malformed", "the column 'output' must be text, but is a number"),
    ("answer is true", {"input": "a", "output": True}, "malformed", "must be text, but is true or false"),
    ("answer is a list", {"input": "a", "output": ["b"]}, "malformed", "must be text, but is a list"),
    ("question is an object", {"input": {}, "output": "b"}, "malformed", "'input' must be text, but is a dict"),
    ("instruction is a number", {"instruction": 1, "output": "b"}, "malformed", "'instruction' must be text, but is a number"),
    ("alpaca input is a list", {"instruction": "a", "input": [], "output": "b"}, "malformed", "'input' must be text"),
    ("instruction is null", {"instruction": None, "output": "b"}, "malformed", "names a missing column: 'instruction'"),
    ("system is a number", {"instruction": "a", "output": "b", "system": 1}, "malformed", "'system' must be text"),
    ("history is text", {"instruction": "a", "output": "b", "history": "x"}, "malformed", "history must be a list of pairs, but is text"),
    ("history has a triple", {"instruction": "a", "output": "b", "history": [["x", "y", "z"]]}, "malformed", "history[0] must be a pair of texts"),
    ("history has numbers", {"instruction": "a", "output": "b", "history": [["x", 1]]}, "malformed", "history[0] must be a pair of texts"),
    ("messages is text", {"messages": "hi"}, "malformed", "messages must be a list, but is text"),
    ("messages is null", {"messages": None}, "malformed", "messages must be a list, but is null"),
    ("a message is a number", messages(U, 3), "malformed", "messages[1] must be an object with role and content"),
    ("texts and objects mixed", messages("a", A), "malformed", "messages[0] must be an object with role and content"),
    ("no role", messages({"content": "a"}), "malformed", "messages[0] must be an object with role and content"),
    ("no content", messages({"role": "user"}), "malformed", "messages[0] must be an object with role and content"),
    ("unknown role", messages(("bot", "a")), "malformed", "messages[0].role is 'bot'; the valid roles are system, user"),
    ("role is a number", messages((7, "a")), "malformed", "messages[0].role is 7; the valid roles"),
    ("role is a list", messages((["user"], "a")), "malformed", "messages[0].role is ['user']; the valid roles"),
    ("content is a number", messages(("user", 1)), "malformed", "messages[0].content must be text, but is a number"),
    ("a part is an image", messages(("user", [{"type": "image_url", "image_url": {}}])), "malformed", "content[0] must be a text part, but is 'image_url'"),
    ("a part is text", messages(("user", ["a"])), "malformed", "content[0] must be a text part, but is text"),
    ("train is text", messages(U, {"role": "assistant", "content": "b", "train": "no"}), "malformed", "messages[1].train must be true or false, but is 'no'"),
    ("weight is a half", messages(U, {"role": "assistant", "content": "b", "weight": 0.5}), "malformed", "messages[1].weight must be 0 or 1, but is 0.5"),
    ("the user calls a tool", messages({"role": "user", "content": "", "tool_calls": [CALL]}), "malformed", "has tool_calls, but its role is user"),
    ("a call without a name", messages(U, {"role": "assistant", "tool_calls": [{"function": {}}]}), "malformed", "messages[1]: tool call 1 must have a name"),
    ("arguments are no JSON", messages(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}), "malformed", "the arguments of tool call 1: not JSON"),
    ("arguments are a list", messages(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": []}]}), "malformed", "arguments of tool call 1 must be an object, but are a list"),
    ("from is unknown", {"conversations": [{"from": "narrator", "value": "a"}]}, "malformed", "conversations[0].from is 'narrator'; the valid ones are system, human"),
    ("no value", {"conversations": [{"from": "human"}]}, "malformed", "conversations[0] must be an object with from and value"),
    ("tools are no JSON", {**messages(U, A), "tools": "[{"}, "malformed", "tools: not JSON"),
    ("a tool without a name", {**messages(U, A), "tools": [{"type": "function"}]}, "malformed", "tools[0] must have a name"),
    ("a lone surrogate", {"input": "a", "output": "b\ud800"}, "malformed", "message 2 is not valid Unicode: surrogates not allowed ('\\ud800')"),
    ("a lone surrogate in a tool", {**messages(U, A), "tools": [{"name": "\udcff"}]}, "malformed", "tools is not valid Unicode"),
    ("a lone surrogate in a call", messages(U, {"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": {"a": "\udcff"}}]}), "malformed", "message 2 is not valid Unicode"),
    ("a lone surrogate in the name of a tool", messages(U, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "\udcff", "content": "a"}, A), "malformed", "message 3 is not valid Unicode"),
    ("completion is missing", {"prompt": "a", "completion": None, "x": 1}, "empty answer", "message 2 of 2"),
    ("no messages", {"messages": []}, "no user turn", "nobody asks anything"),
    ("a system message only", messages(("system", "a")), "no user turn", "nobody asks anything"),
    ("answers only", messages(A, A), "no user turn", "nobody asks anything"),
    ("an empty question", {"input": " \n", "output": "b"}, "no user turn", "every user turn is empty"),
    ("the answer comes first", messages(A, U), "bad role order", "message 1 is assistant, and user was due"),
    ("two questions", messages(U, U, A), "bad role order", "message 2 is user, and assistant was due"),
    ("two answers", messages(U, A, A), "bad role order", "message 3 is assistant, and user was due"),
    ("no answer", messages(U, A, U), "bad role order", "the last message is user, and must be assistant"),
    ("a late system message", messages(U, A, ("system", "c"), U, A), "bad role order", "message 3 is system, and user was due"),
    ("a tool that nobody called", messages(U, ("tool", "1"), A), "bad role order", "message 2 is tool, and assistant was due"),
    ("a call that no tool answers", messages(U, {"role": "assistant", "tool_calls": [CALL]}, U, A), "bad role order", "message 3 is user, and tool was due"),
    ("an odd list of texts", {"messages": ["a", "b", "c"]}, "bad role order", "the last message is user"),
    ("an empty answer", {"input": "a", "output": ""}, "empty answer", "message 2 of 2"),
    ("a blank answer", {"input": "a", "output": " \n\u3000"}, "empty answer", "message 2 of 2"),
    ("a null answer", {"input": "a", "output": None}, "empty answer", "message 2 of 2"),
    ("one empty answer among several", messages(U, ("assistant", ""), U, A), "empty answer", "message 2 of 4"),
    ("nothing to train", messages(U, {"role": "assistant", "content": "b", "train": False}), "nothing to train", "every answer has train: false or weight: 0"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "detail"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_row_has_one_reason(row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(BadRowError) as caught:
        read(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail and "\n" not in caught.value.detail


def test_a_null_byte_is_text() -> None:
    assert turns({"input": "a\x00b", "output": "c"})[0] == ("user", "a\x00b")


def test_columns_that_fit_no_format() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: the columns q, a fit no known format \(messages: messages; sh"):
        read({"q": "a", "a": "b"})
    with pytest.raises(BadRowError, match="the row has no column 'conversations'; it has input, output"):
        read({"input": "a", "output": "b"}, format="sharegpt")
    assert turns({"input": "Why?", "output": "Rain", "tools": "a hammer"}) == QA, (
        "a column of the name, no tool schemas"
    )


def test_the_first_row_that_fits_decides() -> None:
    block = DataBlock.model_validate({"train": "rows.jsonl", "template": "chatml"})
    rows = [{"note": "a head"}, {"input": "a", "output": "b"}, {"messages": []}]
    assert choose_format("a", rows, block.train[0], block).name == "question_answer"
