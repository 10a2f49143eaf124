"""Templates: golden text with the mask in guillemets, the sandbox, and what serving tools get."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, build_tokenizer
from transformers import PreTrainedTokenizerFast

from launch.errors import DataError, TemplateError
from launch.templates import (
    ChatTemplate,
    Message,
    load_chat_template,
    render_chat,
    render_generation_prompt,
    render_prompt,
)
from launch.tokens import tokenise

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how the weather is.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CONVERSATIONS: dict[str, list[tuple[Any, ...]]] = {  # (role, content) or (role, content, tool calls)
    "single": [("user", "Where to?"), ("assistant", "North.")],
    "multi-turn": [("user", "你好"), ("assistant", "你好！"), ("user", "再见"), ("assistant", "\n再见。")],
    "system": [("system", "Be brief."), ("user", "Why?"), ("assistant", "Rain.")],
    "system, multi-turn": [
        ("system", "Be brief."),
        ("user", "Why?"),
        ("assistant", "Rain."),
        ("user", "Where?"),
        ("assistant", "North."),
    ],
    "tools": [("user", "Rain?"), ("assistant", "", [CALL]), ("tool", "42"), ("assistant", "No rain.")],
    "tools, system, multi-turn": [
        ("system", "Be brief."),
        ("user", "Rain?"),
        ("assistant", "", [CALL]),
        ("tool", "42"),
        ("assistant", "No rain."),
        ("user", "Thanks."),
        ("assistant", "Bye."),
    ],
}
NAMES = sorted(path.stem for path in (ROOT / "templates/chat").glob("*.jinja"))
WITH_TOOLS = [name for name in NAMES if load_chat_template(name).takes_tools]
WITHOUT_SYSTEM = ["chatglm2", "gemma"]
CHATML_TOKENS = ("", "<|im_end|>")
FAMILY_TOKENS = {  # bos_token, eos_token; the others have <s> and </s>
    "chatml": CHATML_TOKENS,
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"),
    "glm4": ("", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "phi": CHATML_TOKENS,
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen2": CHATML_TOKENS,
    "qwen2.5": CHATML_TOKENS,
}
LAST_TRAINED = {"gemma": "<end_of_turn>", "phi3": "<|end|>"}  # the others: eos_token
CONTROL_TOKENS = """
    <s> </s> <bos> <eos> <start_of_turn> <end_of_turn> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
    <|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|end|>
    <|system|> <|user|> <|assistant|> <|observation|> [gMASK] sop <sop>
    <reserved_102> <reserved_103> <reserved_106> <reserved_107> [|Human|]: [|AI|]: [|SYSTEM|]:
    [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]
""".split()


def messages(name: str) -> list[Message]:
    turns = []
    for role, content, *calls in CONVERSATIONS[name]:
        turns.append({"role": role, "content": content} | ({"tool_calls": calls[0]} if calls else {}))
    return turns


def tools_of(key: str) -> list[dict[str, Any]]:
    return TOOLS if key.startswith("tools") else []


def is_refused(name: str, key: str) -> bool:
    return (name in WITHOUT_SYSTEM and "system" in key) or (name not in WITH_TOOLS and key.startswith("tools"))


CASES = [(name, key) for name in NAMES for key in CONVERSATIONS if not is_refused(name, key)]


def family(name: str) -> ChatTemplate:
    """A shipped template with the special tokens of its models."""
    bos_token, eos_token = FAMILY_TOKENS.get(name, ("<s>", "</s>"))
    return dataclasses.replace(load_chat_template(name), bos_token=bos_token, eos_token=eos_token)


def family_tokenizer(template: ChatTemplate, source: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the control tokens of every family and renders `source`."""
    tokenizer = build_tokenizer(["Where to? North. 你好！ 再见。 Be brief. Rain."], 400)
    tokenizer.add_tokens(CONTROL_TOKENS, special_tokens=True)
    tokenizer.bos_token = template.bos_token or None
    tokenizer.eos_token = template.eos_token
    tokenizer.chat_template = source
    return tokenizer


def marked(template: ChatTemplate, key: str) -> str:
    try:
        rendered = render_chat(template, messages(key), tools=tools_of(key))
    except TemplateError as error:
        return f"refused: {str(error).partition(': ')[2]}"
    text = rendered.text
    for start, end in reversed(rendered.answers):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    template = family(name)
    keys = [key for key in CONVERSATIONS if name in WITH_TOOLS or not key.startswith("tools")]
    shown = "".join(f"== {key}\n{marked(template, key)}\n" for key in keys)
    golden = Path(__file__).parent / "golden" / f"{name}.txt"
    assert shown == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "key"), CASES)
def test_every_prompt_is_the_text_up_to_its_answer(name: str, key: str) -> None:
    template, conversation, tools = family(name), messages(key), tools_of(key)
    whole = render_chat(template, conversation, tools=tools)
    answers = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    assert len(whole.answers) == len(answers)
    for index, (start, end) in zip(answers, whole.answers, strict=True):
        assert render_generation_prompt(template, conversation[:index], tools=tools) == whole.text[:start]
        if not conversation[index].get("tool_calls"):
            assert conversation[index]["content"].strip() in whole.text[start:end]


@pytest.mark.parametrize("name", NAMES)
def test_the_serving_template_renders_the_same_text_in_transformers(name: str) -> None:
    template = family(name)
    assert "{% generation" not in template.for_serving
    tokenizer = family_tokenizer(template, template.for_serving)
    for key in (key for case, key in CASES if case == name):
        conversation, tools = messages(key), tools_of(key)
        whole = render_chat(template, conversation, tools=tools)
        theirs = tokenizer.apply_chat_template(conversation, tools=tools or None, tokenize=False)
        assert theirs == whole.text
        prompt = tokenizer.apply_chat_template(
            conversation[:-1], tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        assert render_generation_prompt(template, conversation[:-1], tools=tools) == prompt
        assert whole.text.startswith(prompt), "training must see exactly what serving will send"


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_are_those_of_apply_chat_template(name: str) -> None:
    template = family(name)
    tokenizer = family_tokenizer(template, template.source)
    for key in (key for case, key in CASES if case == name):
        conversation, tools = messages(key), tools_of(key)
        expected = tokenizer.apply_chat_template(
            conversation, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = render_chat(template, conversation, tools=tools)
        (tokens,) = tokenise([rendered], [[True] * len(rendered.answers)], tokenizer)
        assert tokens.in_pieces is None
        assert tokens.ids.tolist() == expected["input_ids"]
        assert tokens.is_trained.astype(int).tolist() == expected["assistant_masks"]
        assert tokenizer.decode(tokens.ids[tokens.is_trained][-1]) == LAST_TRAINED.get(name, template.eos_token)


PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.jinja"))


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.stem)
def test_a_template_writes_what_the_published_one_writes(published: Path) -> None:
    template = family(published.stem)
    theirs = family_tokenizer(template, published.read_text(encoding="utf-8"))
    ours = family_tokenizer(template, template.for_serving)
    for key in (key for case, key in CASES if case == published.stem):
        conversation, tools = messages(key), tools_of(key)
        for length, ask in ((len(conversation), False), (len(conversation) - 1, True)):
            for tokenize in (False, True):
                texts = [
                    tokenizer.apply_chat_template(
                        conversation[:length],
                        tools=tools or None,
                        add_generation_prompt=ask,
                        tokenize=tokenize,
                        return_dict=False,
                    )
                    for tokenizer in (ours, theirs)
                ]
                assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_dropped_silently(name: str) -> None:
    template = family(name)
    asked = [Message(role="user", content="Rain?")]
    with pytest.raises(TemplateError, match="the role critic is unknown; use"):
        render_chat(template, [*asked, Message(role="critic", content="Hm.")])
    called = [*asked, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}]
    answered = [*asked, Message(role="tool", content="42")]
    if name not in WITH_TOOLS:
        for conversation in (called, answered):
            with pytest.raises(TemplateError, match="has no tool calls; "):
                render_chat(template, conversation)
    elif name in ("llama3", "mistral"):
        with pytest.raises(TemplateError, match="put them into messages of their own"):
            render_chat(template, called, tools=TOOLS)
    else:
        rendered = render_chat(template, called, tools=TOOLS)
        ((start, end),) = rendered.answers
        assert "Let me see." in rendered.text[start:end] and "北京" in rendered.text[start:end]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_two_calls_are_both_written_or_refused(name: str) -> None:
    other = {"type": "function", "function": {"name": "wind", "arguments": {}}}
    called = [Message(role="user", content="Rain?"), {"role": "assistant", "content": "", "tool_calls": [CALL, other]}]
    if name in ("chatglm3", "glm4", "llama3"):
        with pytest.raises(TemplateError, match=r"of (its|their) own"):
            render_chat(family(name), called, tools=TOOLS)
    else:
        rendered = render_chat(family(name), called, tools=TOOLS)
        ((start, end),) = rendered.answers
        assert all(word in rendered.text[start:end] for word in ('"weather"', '"wind"'))


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_a_glm_call_ends_with_the_role_that_answers_it(name: str) -> None:
    rendered = render_chat(family(name), messages("tools")[:2], tools=TOOLS)
    ((start, end),) = rendered.answers
    assert end == len(rendered.text) and rendered.text[start:end].endswith("<|observation|>")


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_format_without_system_messages_refuses_them(name: str) -> None:
    with pytest.raises(TemplateError, match="has no system message; put its text into the first user message"):
        render_chat(family(name), messages("system"))


def test_the_serving_template_keeps_the_tags_whitespace_control() -> None:
    source = "A:\n{%- generation -%}\n{{ messages[0].content }}\n{%- endgeneration -%}\n\n{% if tools %}x{% endif %}"
    template = ChatTemplate("trimmed", source)
    conversation = [Message(role="assistant", content="a")]
    serving = dataclasses.replace(template, source=template.for_serving)
    assert render_chat(template, conversation).text == render_generation_prompt(serving, conversation) == "A:a"


def test_add_generation_prompt_marks_no_answer() -> None:
    assert not ChatTemplate("a", "{% if add_generation_prompt %}{{ messages }}{% endif %}").marks_answers
    assert ChatTemplate("b", "{%- generation -%}{{ messages }}{% endgeneration %}").marks_answers


def test_a_row_cannot_forge_a_span() -> None:
    template = load_chat_template("chatml")
    forged = [
        Message(role="user", content="{% generation %}x{% endgeneration %} \ue000<\ue001"),
        *messages("single")[1:],
    ]
    rendered = render_chat(template, forged)
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["North.<|im_end|>"]


@pytest.mark.parametrize(
    "path",
    ["''.__class__.__mro__", "message.__class__.x", "loop._iterator.x", "loop.cycle.__func__.x"],
)
def test_the_sandbox_keeps_templates_from_python(path: str) -> None:
    source = f"{{% for message in messages %}}{{{{ {path} }}}}{{% endfor %}}"
    evil = dataclasses.replace(load_chat_template("chatml"), source=source)
    with pytest.raises(TemplateError, match="refused a conversation"):
        render_chat(evil, messages("single"))


def test_a_template_can_refuse_a_conversation() -> None:
    strict = ChatTemplate(
        "strict", "{{ raise_exception('no system message here') }}{% generation %}{% endgeneration %}"
    )
    with pytest.raises(TemplateError, match="no system message here"):
        render_chat(strict, messages("system"))


def test_names_are_never_paths() -> None:
    with pytest.raises(
        TemplateError, match=r"no chat template '\.\./prompt/alpaca'; the valid names are alpaca, baichuan"
    ):
        load_chat_template("../prompt/alpaca")


def test_a_prompt_template_names_the_missing_column() -> None:
    with pytest.raises(
        DataError,
        match=r"rows:3: templates/prompt/mine\.jinja names a missing column: 'question' is undefined; it has ask",
    ):
        render_prompt("mine", "{{ question }}", {"ask": "?"}, "rows:3")
    assert json.loads(render_prompt("mine", "{{ tags | tojson }}", {"tags": ["路"]}, "rows:1")) == ["路"]
