"""python -m launch check | preview: what a recipe will do, before a job is queued for it."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from launch import preflight
from launch.config import DEFAULT_RECIPE, TINY_MODEL_NAME, Recipe, parse_command_line
from launch.errors import LaunchError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[RECIPE.yaml] [block.key=value]...", show_default=str(DEFAULT_RECIPE))
]


@app.command()
def check(arguments: Arguments = None) -> None:
    """Make every check of a run that needs no weights; exit code 2 and one sentence when it would be refused."""
    _refuse_in_one_sentence(lambda: _check(parse_command_line(arguments or [])))


@app.command()
def preview(
    arguments: Arguments = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show rows as the model will see them, what is trained marked (green on a terminal, «guillemets» elsewhere)."""
    _refuse_in_one_sentence(lambda: _preview(parse_command_line(arguments or []), rows))


def _check(recipe: Recipe) -> None:
    from launch.data import prepare
    from launch.model import check_adapter_fits, choose_template, recipe_tokenizer, resolve_base

    preflight.check(recipe)
    if recipe.model.name_or_path != TINY_MODEL_NAME:
        check_adapter_fits(resolve_base(recipe), recipe)
    tokenizer = recipe_tokenizer(recipe)
    report = prepare(recipe, tokenizer, choose_template(recipe.data.template, tokenizer)).report
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in report["outcomes"].items() if count)
    print(
        f"{recipe.run.name}: {report['rows']:,} rows: {outcomes}; {report['train']['trained_tokens']:,} trained tokens."
    )
    print("The recipe, the base model's config, the adapter's targets and every row pass.")


def _preview(recipe: Recipe, num_rows: int) -> None:
    from launch.data import tokenise
    from launch.formats import read_conversations
    from launch.model import choose_template, recipe_tokenizer
    from launch.templates import render_chat

    preflight.check(recipe)
    tokenizer = recipe_tokenizer(recipe)
    template = choose_template(recipe.data.template, tokenizer)
    for conversation in read_conversations(recipe.data.train, recipe.data)[:num_rows]:
        if conversation.dropped:
            print(f"── {conversation.row_id}: dropped, {conversation.dropped}\n")
            continue
        rendered = render_chat(template, conversation.messages)
        token_ids, trained = tokenise([rendered], tokenizer)[0]
        too_long = " - longer than data.max_length" if len(token_ids) > recipe.data.max_length else ""
        counts = f"{len(token_ids)} tokens, {int(trained.sum())} trained{too_long}"
        print(f"── {conversation.row_id}: template {template.name}, {counts}")
        offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        print(_mark(rendered.text, [span for span, is_trained in zip(offsets, trained, strict=True) if is_trained]))


def _mark(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with its trained stretches marked; touching and overlapping spans make one stretch."""
    stretches: list[list[int]] = []
    for start, end in spans:
        if stretches and start <= stretches[-1][1]:
            stretches[-1][1] = max(end, stretches[-1][1])
        else:
            stretches.append([start, end])
    shown = []
    position = 0
    for start, end in stretches:
        marked = typer.style(text[start:end], fg="green") if sys.stdout.isatty() else f"«{text[start:end]}»"
        shown += [text[position:start], marked]
        position = end
    return "".join(shown) + text[position:]


def _refuse_in_one_sentence(work: Callable[[], None]) -> None:
    try:
        work()
    except LaunchError as error:
        print(f"Refused: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
