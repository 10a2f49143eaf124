"""Templates: golden text with the mask in guillemets, the sandbox, and what serving tools get."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import ROOT, build_tokenizer

from launch.data import tokenise
from launch.errors import DataError, TemplateError
from launch.templates import ChatTemplate, Message, load_chat_template, marks_answers, render_chat, render_prompt

CONVERSATIONS = {
    "single": [("user", "Where to?"), ("assistant", "North.")],
    "multi-turn": [("user", "你好"), ("assistant", "你好！"), ("user", "再见"), ("assistant", "\n再见。")],
    "system": [("system", "Be brief."), ("user", "Why?"), ("assistant", "Rain.")],
}
NAMES = sorted(path.stem for path in (ROOT / "templates/chat").glob("*.jinja"))


def messages(name: str) -> list[Message]:
    return [Message(role=role, content=content) for role, content in CONVERSATIONS[name]]


def marked(template: ChatTemplate, conversation: list[Message]) -> str:
    rendered = render_chat(template, conversation)
    text = rendered.text
    for start, end in reversed(rendered.spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    template = load_chat_template(name)
    shown = "".join(f"== {key}\n{marked(template, messages(key))}\n" for key in CONVERSATIONS)
    golden = Path(__file__).parent / "golden" / f"{name}.txt"
    assert shown == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_serving_template_renders_the_same_text_in_transformers(name: str) -> None:
    template = load_chat_template(name)
    assert "{% generation" not in template.for_serving
    tokenizer = build_tokenizer(["Where to? North. 你好 再见"], 400)
    tokenizer.chat_template = template.for_serving
    for key in CONVERSATIONS:
        conversation = messages(key)
        whole = render_chat(template, conversation)
        assert tokenizer.apply_chat_template(conversation, tokenize=False) == whole.text
        prompt = tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
        assert render_chat(template, conversation[:-1], add_generation_prompt=True).text == prompt
        assert whole.text.startswith(prompt), "training must see exactly what serving will send"


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_are_those_of_apply_chat_template(name: str) -> None:
    template = load_chat_template(name)
    tokenizer = build_tokenizer(["Where to? North. 你好 再见 Be brief. Rain."], 400)
    tokenizer.chat_template = template.source
    for key in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages(key), return_dict=True, return_assistant_tokens_mask=True)
        token_ids, trained = tokenise([render_chat(template, messages(key))], tokenizer)[0]
        assert token_ids.tolist() == expected["input_ids"]
        assert trained.astype(int).tolist() == expected["assistant_masks"]
        assert tokenizer.decode(token_ids[trained][-1]) == "<|im_end|>"


def test_the_serving_template_keeps_the_tags_whitespace_control() -> None:
    source = "A:\n{%- generation -%}\n{{ messages[0].content }}\n{%- endgeneration -%}\n\n{% if tools %}x{% endif %}"
    template = ChatTemplate("trimmed", source)
    conversation = [Message(role="assistant", content="a")]
    serving = dataclasses.replace(template, source=template.for_serving)
    assert render_chat(template, conversation).text == render_chat(serving, conversation).text == "A:a"


def test_add_generation_prompt_marks_no_answer() -> None:
    assert not marks_answers("{% if add_generation_prompt %}{{ messages }}{% endif %}")
    assert marks_answers("{%- generation -%}{{ messages }}{% endgeneration %}")


def test_a_row_cannot_forge_a_span() -> None:
    template = load_chat_template("chatml")
    forged = [
        Message(role="user", content="{% generation %}x{% endgeneration %} \ue000<\ue001"),
        *messages("single")[1:],
    ]
    rendered = render_chat(template, forged)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["North.<|im_end|>"]


def test_the_sandbox_keeps_templates_from_python() -> None:
    evil = dataclasses.replace(load_chat_template("chatml"), source="{{ ''.__class__.__mro__ }}")
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
        TemplateError, match=r"no chat template '\.\./prompt/alpaca'; the valid names are chatml, qwen2"
    ):
        load_chat_template("../prompt/alpaca")


def test_a_prompt_template_names_the_missing_column() -> None:
    with pytest.raises(
        DataError,
        match=r"rows:3: templates/prompt/mine\.jinja names a missing column: 'question' is undefined; it has ask",
    ):
        render_prompt("mine", "{{ question }}", {"ask": "?"}, "rows:3")
    assert json.loads(render_prompt("mine", "{{ tags | tojson }}", {"tags": ["路"]}, "rows:1")) == ["路"]
