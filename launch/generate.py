"""What a finished run has learned: answers to held-out rows beside the rows' own."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from launch import engine as engines
from launch import preflight, runs
from launch.answering import Answering, Decoding, device, load_adapted, load_whole, new_tokens, stop_token_ids
from launch.data import conversations
from launch.errors import DataError, PreflightError
from launch.formats import BadRowError
from launch.ledger import Work, render
from launch.machine import choose_precision, read_machine
from launch.model import choose_template, load_tokenizer, resolve_base
from launch.recipe import Recipe
from launch.remote_code import check_remote_code
from launch.templates import Rendered
from launch.tokens import special_pattern, tokenise

COLUMNS = 80
_SHOWN_OF_PROMPT = 200  # characters


@dataclass(frozen=True)
class Answer:
    """One row: the prompt, what the model says, what the row says."""

    row_id: str
    model: str  # what answered
    prompt: str
    answer: str
    reference: str

    def as_text(self) -> str:
        """For a terminal; of a long prompt, the end."""
        tail = self.prompt[-_SHOWN_OF_PROMPT:]
        prompt = tail if tail == self.prompt else f"...{tail}"
        parts = (("prompt", prompt), ("answer", self.answer), ("reference", self.reference))
        lines = [f"── {self.row_id}: {self.model}", *(line for name, text in parts for line in _lines(name, text))]
        return "\n".join(lines) + "\n"


def answers(recipe: Recipe, num_rows: int, max_new_tokens: int) -> Iterator[Answer]:
    """Greedy answers of the merged model, or of base and adapter, to the first held-out rows, or the first of all.

    The prompt is what training has before a row's last answer, token by token, and the token that ended answers there
    ends them here. Raises PreflightError when the run has no adapter yet, or was one with another template.
    """
    directory = recipe.run_directory
    if recipe.model.factory is not None:
        raise PreflightError(
            "launch generate is for models of transformers, which have a generate(); fill the module of your "
            f"model.factory from {directory / 'merged' / 'model.pth'} and call it."
        )
    if not (directory / "adapter").is_dir():
        state = runs.read_status(directory).get("state", "not started")
        raise PreflightError(
            f"The run in {directory} has no finished adapter (it is {state}); run train.py to its end."
        )
    if (directory / "merged").is_dir():
        check_remote_code(recipe.model, directory / "merged", None)
    else:
        preflight.check_model(recipe.model)
    engines.quiet_libraries()
    tokenizer = load_tokenizer(str(directory / "adapter"), recipe.model)
    template = choose_template(recipe.data.template, tokenizer)
    if template.for_serving != tokenizer.chat_template:
        raise PreflightError(
            f"The run in {directory} was trained with another template than data.template = {recipe.data.template}; "
            "give the recipe that it was run with."
        )
    work = Work(recipe.data, {}, template, tokenizer, special_pattern(tokenizer))
    model, name = _load(recipe, tokenizer)
    for row_id, rendered in _chosen(recipe, work, num_rows):
        is_last = [False] * (len(rendered.answers) - 1) + [True]
        (tokens,) = tokenise([rendered], [is_last], tokenizer)
        ids, first = tokens.ids.tolist(), int(tokens.is_trained.argmax())
        end = tokens.answer_ends[-1]
        made = new_tokens(
            model,
            ids[:first],
            stop_token_ids(model, [ids[end]]),
            Decoding(max_new_tokens),
            trust_remote_code=recipe.model.trust_remote_code,
        )
        is_cut = len(made) == max_new_tokens and made[-1] != ids[end]
        known = [token for token in made if token < len(tokenizer)]  # a head may have rows that are no tokens
        texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (known, ids[first : end + 1]))
        answer, reference = (text.strip() for text in texts)
        prompt = rendered.text[: rendered.answers[-1][0]]
        yield Answer(row_id, name, prompt, answer + "..." if is_cut else answer, reference)


def _load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Answering, str]:
    """(the model on its device, what it is)."""
    precision, _ = choose_precision(recipe.train.precision, read_machine())
    merged, adapter = recipe.run_directory / "merged", recipe.run_directory / "adapter"
    if merged.is_dir():
        model, name = load_whole(merged, recipe.model, precision), "merged model"
    else:
        base = resolve_base(recipe)
        model = load_adapted(base, adapter, tokenizer, recipe.model, precision, is_of_a_run=True)
        name = "base and adapter"
    return model, f"{name}, {precision} on {device().type}"


def _chosen(recipe: Recipe, work: Work, num_rows: int) -> list[tuple[str, Rendered]]:
    """The first held-out rows; the first that can be used where none is. Raises DataError for one that is gone."""
    names = (recipe.run_directory / "evaluation_rows.txt").read_text(encoding="utf-8").splitlines()[:num_rows]
    usable = (pair for pair in _rendered(recipe, work) if not names or pair[0] in names)
    chosen = list(islice(usable, len(names) or num_rows))
    gone = set(names) - {row_id for row_id, _ in chosen}
    if gone:
        raise DataError(f"{min(gone)} was held out by the run and is not among its rows any more; give them back.")
    return chosen


def _rendered(recipe: Recipe, work: Work) -> Iterator[tuple[str, Rendered]]:
    """The rows that are not dropped."""
    for row_id, conversation in conversations(recipe):
        try:
            if isinstance(conversation, BadRowError):
                raise conversation
            yield row_id, render(conversation, work, row_id)
        except BadRowError:
            continue  # data_report.json and quarantine.jsonl of the run have it


def _lines(name: str, text: str) -> Iterator[str]:
    """The text beside its name, and under itself; a Chinese character is two columns wide, none moves the cursor."""
    indent = f"  {name}".ljust(14)
    for paragraph in text.expandtabs(4).split("\n"):
        line, width = indent, len(indent)
        for character in (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in paragraph):
            wide = 1 + (unicodedata.east_asian_width(character) in "WF")
            if width + wide > COLUMNS:
                yield line.rstrip()
                line, width = " " * len(indent), len(indent)
            line, width = line + character, width + wide
        yield line.rstrip()
        indent = " " * len(indent)
