"""`python -m launch data` and `preview`: what becomes of rows, for the eyes."""

import functools
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import typer

from launch import preflight, runs
from launch.data import Prepared, Tools, conversations, prepare
from launch.data_page import ShownSample, data_page
from launch.data_report import dropped_rows, report_rows
from launch.errors import PreflightError
from launch.formats import BadRowError
from launch.ledger import Work, render
from launch.modes import keep_private
from launch.recipe import Recipe
from launch.samples import Samples
from launch.table import format_table
from launch.templates import prove_mask
from launch.tokens import special_pattern, stretches, tokenise

# What a page shows; besides these, the longest and the shortest of train.
FIRST_OF_TRAIN, FIRST_OF_EVALUATION = 8, 4


def show_data(recipe: Recipe, html: Path | None) -> int:
    """Prepare the rows in the run directory and print what became of them; the number of those that were dropped.

    `html`: a page with the same and with samples. Raises PreflightError when it cannot be written.
    """

    @functools.cache
    def load() -> Tools:
        from launch.model import tokenizer_and_template  # imports torch, which prepared data do without

        return tokenizer_and_template(recipe)

    keep_private(group_readable=recipe.run.group_readable)
    preflight.check_model(recipe.model)
    directory = recipe.run_directory
    start = time.monotonic()
    with runs.open_run(directory):  # which makes the run directory, where the page may go
        if html is not None:
            _check_writable(html)
        prepared = prepare(recipe, directory, load).publish(directory)
        seconds = time.monotonic() - start
        page = None if html is None else data_page(recipe.run.name, prepared.report, _shown_samples(prepared, load()))
    print(format_table(report_rows(prepared.report)))
    how = "as prepared before" if prepared.was_there else "now prepared"
    print(f"\n{directory}: {how} ({seconds:.1f} s), with data_report.json, quarantine.jsonl and evaluation_rows.txt.")
    if html is not None and page is not None:
        try:
            runs.write_text(html, page)
        except OSError as error:
            raise PreflightError(f"--html: {html} cannot be written: {error.strerror or error}.") from None
        print(f"{html}: the same as a page, with samples.")
    return sum(dropped_rows(prepared.report).values())


def _check_writable(page: Path) -> None:
    """Raises PreflightError when the page could not be written; rows may take hours, and it comes after them."""
    if page.is_dir():
        raise PreflightError(f"--html: {page} is a directory; name a file.")
    if not page.parent.is_dir():
        raise PreflightError(f"--html: there is no directory {page.parent} to write {page.name} to; make it first.")
    try:
        with tempfile.TemporaryFile(dir=page.parent):
            pass
    except OSError as error:
        raise PreflightError(f"--html: {page} cannot be written: {error.strerror}.") from None


def _shown_samples(prepared: Prepared, tools: Tools) -> list[ShownSample]:
    """The first samples of train, its longest and its shortest, and the first of evaluation; none of them twice."""
    tokenizer, _ = tools
    store = Samples.load(prepared.store)
    train, evaluation = (np.unique(prepared.split[name]) for name in ("train", "evaluation"))  # weights repeat samples
    longest, shortest = (int(train[find(store.lengths[train])]) for find in (np.argmax, np.argmin))
    whys = {shortest: "the shortest", longest: "the longest"}
    of_train = list(dict.fromkeys([*train[:FIRST_OF_TRAIN].tolist(), longest, shortest]))
    of_evaluation = evaluation[:FIRST_OF_EVALUATION].tolist()
    row_ids = prepared.row_ids(of_train + of_evaluation)
    shown = []
    for place, (sample, row_id) in enumerate(zip(of_train + of_evaluation, row_ids, strict=True)):
        ids, is_trained = store.sample(sample)
        shown.append(
            ShownSample(
                row_id,
                "train" if place < len(of_train) else "evaluation",
                len(ids),
                int(is_trained.sum()),
                stretches(ids, is_trained, tokenizer),
                whys.get(sample, ""),
            )
        )
    return shown


def preview_rows(recipe: Recipe, num_rows: int) -> None:
    """Print the first rows as the model will read them, the trained text in colour or in guillemets."""
    from launch.model import tokenizer_and_template

    preflight.check(recipe)
    tokenizer, template = tokenizer_and_template(recipe)
    prove_mask(template)
    work = Work(recipe.data, {}, template, tokenizer, special_pattern(tokenizer))
    for row_id, conversation in islice(conversations(recipe), num_rows):
        try:
            if isinstance(conversation, BadRowError):
                raise conversation
            rendered = render(conversation, work, row_id)
        except BadRowError as error:
            print(f"── {row_id}: dropped, {error.reason}: {error.detail}\n")
            continue
        (tokens,) = tokenise([rendered], [conversation.trained_answers], tokenizer)
        notes = [f"{len(tokens.ids)} tokens, {int(tokens.is_trained.sum())} trained"]
        notes += [f"in pieces: {tokens.in_pieces}"] if tokens.in_pieces else []
        if len(tokens.ids) > work.data.max_length:
            notes.append(f"longer than data.max_length = {work.data.max_length}")
        notes += [tokens.fault] if tokens.fault else []
        print(f"── {row_id}: template {template.name}, {', '.join(notes)}")
        shown = stretches(tokens.ids, tokens.is_trained, tokenizer)
        print("".join(_mark(text) if is_trained else text for text, is_trained in shown))


def _mark(text: str) -> str:
    return typer.style(text, fg="green") if sys.stdout.isatty() else f"«{text}»"
