"""python -m launch COMMAND: plan, check, prepare and submit a run, see how far it is, use what it has made."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from launch import preflight, runs
from launch.config import DEFAULT_RECIPE, as_override, parse_command_line
from launch.errors import ConfigError, LaunchError
from launch.modes import keep_private
from launch.recipe import Recipe

ZERO3 = Path("configs/accelerate/zero3.yaml")
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[RECIPE.yaml] [block.key=value]...", show_default=str(DEFAULT_RECIPE))
]


@app.command()
def plan(
    arguments: Arguments = None,
    gpu: Annotated[str | None, typer.Option(help="Such as v100-32gb.", show_default="this machine's")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="On each node.", show_default="this machine's")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, show_default="Slurm's, else 1")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Of a node, such as 380GB.", show_default="this one's")
    ] = None,
    interconnect: Annotated[str | None, typer.Option(help="nvlink or pcie.", show_default="this machine's")] = None,
    trained_share: Annotated[float, typer.Option(min=0.01, max=1, help="Of the tokens, that are trained.")] = 1.0,
    config: Annotated[Path | None, typer.Option(help="A config.json to plan by, instead of the base's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    write: Annotated[Path | None, typer.Option(help="Put accelerate.yaml and recipe.yaml there.")] = None,
) -> None:
    """Say what a run takes in every layout and which is the fastest that fits, without a weight or a GPU."""

    def work() -> None:
        from launch.hardware import find_hardware
        from launch.plan import choices, find_base, make_case, recommend
        from launch.plan_report import plan_json, plan_lines, write_plan

        recipe = parse_command_line(arguments or [])
        hardware = find_hardware(gpu, gpus, nodes, host_memory, interconnect)
        case = make_case(recipe, find_base(recipe, config), hardware, trained_share)
        found = choices(case)
        chosen = recommend(case, found)
        print((plan_json if as_json else plan_lines)(case, found, chosen, arguments or []))
        if chosen is None:
            raise typer.Exit(2)
        if write is not None:
            start = write_plan(case, chosen, write)
            print(f"\n{write}: written; start it with\n  {start}", file=sys.stderr if as_json else sys.stdout)

    _refuse_in_one_sentence(work)


@app.command()
def check(
    arguments: Arguments = None,
    config_file: Annotated[Path, typer.Option(help="Of accelerate launch.")] = ZERO3,
) -> None:
    """Make every check of a run that needs no weights; exit code 2 and all that is wrong when it would be refused."""

    def work() -> None:
        from launch.check import check as check_run

        check_run(parse_command_line(arguments or []), config_file, arguments or [])

    _refuse_in_one_sentence(work)


@app.command()
def data(
    arguments: Arguments = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a row was dropped.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with lengths and coloured samples.")] = None,
) -> None:
    """Prepare the rows as a run would, needing the tokenizer only, and say what became of every one of them."""

    def work() -> None:
        from launch.data_commands import show_data

        num_dropped = show_data(parse_command_line(arguments or []), html)
        if strict and num_dropped:
            print(f"--strict: {num_dropped:,} rows were dropped.", file=sys.stderr)
            raise typer.Exit(1)

    _refuse_in_one_sentence(work)


@app.command()
def prepare(arguments: Arguments = None) -> None:
    """Fetch the base and prepare the rows where there is a network, for a job that has none.

    The job's nodes must see the same directories: the run's, the base's, and HF_HOME, where the hub's files go.
    HF_ENDPOINT names a mirror of the hub; HF_HUB_OFFLINE=1 in the job keeps it from asking the hub at all. A model
    that ModelScope has fetched is a directory: model.name_or_path=~/.cache/modelscope/hub/models/ORG/NAME, each dot of
    its name as ___.
    """
    given = arguments or []

    def work() -> None:
        from launch.prepare import prepare_ahead

        print(prepare_ahead(parse_command_line(given), given))

    _refuse_in_one_sentence(work)


@app.command()
def preview(
    arguments: Arguments = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show rows as the model will see them, what is trained marked (green on a terminal, «guillemets» elsewhere)."""

    def work() -> None:
        from launch.data_commands import preview_rows

        preview_rows(parse_command_line(arguments or []), rows)

    _refuse_in_one_sentence(work)


@app.command()
def submit(
    arguments: Arguments = None,
    nodes: Annotated[str | None, typer.Option(help="slurm.nodes, as sbatch has it; so are those up to --mem.")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="Such as 4 or a100:4; a rank for each.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str | None, typer.Option(help="The limit, such as 12:00:00 or 2-00.")] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    mem: Annotated[str | None, typer.Option(help="Of a node; all others as slurm.OPTION=VALUE.")] = None,
    processes_per_node: Annotated[int | None, typer.Option(min=1, show_default="its GPUs, else 1")] = None,
    python: Annotated[Path | None, typer.Option(help="Of the ranks, such as a script that enters a container.")] = None,
    config_file: Annotated[Path | None, typer.Option(help="Of accelerate launch.", show_default=str(ZERO3))] = None,
    gpu: Annotated[str | None, typer.Option(help="Such as v100-32gb: plan chooses the layout for it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job, and write and submit nothing.")] = False,
) -> None:
    """Check a recipe and put it into Slurm's queue; what is preempted goes on by itself until the run is finished."""
    options = {"nodes": nodes, "gpus-per-node": gpus_per_node, "partition": partition, "account": account}
    options |= {"time": time, "qos": qos, "constraint": constraint, "mem": mem}

    def work() -> None:
        given = [*(arguments or []), *(as_override("slurm", name, value) for name, value in options.items() if value)]
        recipe = parse_command_line(given)
        from launch.submit import plan_job
        from launch.submit import submit as submit_job

        layout = config_file or ZERO3
        if gpu is not None:
            if config_file is not None:
                raise ConfigError("--gpu lets plan choose the layout, and --config-file names it; keep one of them.")
            layout, overrides = plan_job(recipe, given, gpu, processes_per_node)
            given += overrides
            recipe = parse_command_line(given)
        submit_job(
            recipe,
            given,
            config_file=layout,
            processes_per_node=processes_per_node,
            rank_python=python,
            is_dry_run=dry_run,
        )

    _refuse_in_one_sentence(work)


@app.command()
def generate(
    arguments: Arguments = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to answer.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
) -> None:
    """Answer held-out rows with what a finished run has trained, beside their own answers."""
    _refuse_in_one_sentence(lambda: _generate(parse_command_line(arguments or []), rows, max_new_tokens))


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or a directory that PEFT wrote.")],
    output: Annotated[Path | None, typer.Option(help="Where to; of a run, its merged/.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the adapter says.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; else the trained type.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of a file, such as 500MB.", show_default="the run's, or 4GB")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another merge.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the base's own code.")] = False,
) -> None:
    """Merge an adapter into its base from disk, without a GPU, a few rows of a matrix at a time.

    Of a run, the logits of its held-out rows are compared where there is memory for the whole model in fp32.
    """

    def work() -> None:
        _merge(source, output, base, dtype, max_shard_size, overwrite, trust_remote_code)

    _refuse_in_one_sentence(work)


@app.command()
def chat(
    source: Annotated[str, typer.Argument(help="A merged model, a run, its checkpoint, or what PEFT wrote.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this only; else converse, or read standard input.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    compare: Annotated[str | None, typer.Option(help="Ask this one too: the base, or another SOURCE.")] = None,
    file: Annotated[Path | None, typer.Option(help='Ask each line: {"prompt": ...} or {"messages": [...]}.')] = None,
    output: Annotated[Path | None, typer.Option(help="Where the answers to --file are appended.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Above 0: sample.", show_default="0, greedy")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Sample the same again.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the adapter says.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Ask what was trained or merged, with the chat template and the end tokens that it was trained with."""

    def work() -> None:
        if temperature == 0 and (top_p, top_k, seed) != (None, None, None):
            raise ConfigError("--top-p, --top-k and --seed are for sampling; give --temperature above 0 as well.")
        if top_p == 0:
            raise ConfigError("--top-p 0 leaves no token to choose; give it above 0, or no --temperature.")
        if (file is None) != (output is None) or (file is not None and prompt is not None):
            raise ConfigError("--file and --output go together, and without --prompt.")
        if compare == source:
            raise ConfigError(f"--compare {compare} is the source itself; give its base, or another one.")
        from launch.answering import Decoding
        from launch.chat import Asking, chat

        asking = Asking(Decoding(max_new_tokens, temperature, top_p, top_k), seed, system)
        files = None if file is None or output is None else (file, output)
        chat(source, compare, asking, prompt=prompt, files=files, base=base, trust_remote_code=trust_remote_code)

    _refuse_in_one_sentence(work)


@app.command()
def status(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", show_default="all in runs/", help="A directory, a name, or a recipe."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of runs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks of --watch.")] = 5.0,
) -> None:
    """Say how far runs are, from their files alone, and what to do next; anybody's who may read them."""
    from launch.status_lines import show

    every_seconds = interval if watch else None
    _refuse_in_one_sentence(lambda: show(names or [], as_json=as_json, every_seconds=every_seconds))


@app.command()
def selftest(
    arguments: Arguments = None,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 24,
    num_processes: Annotated[int | None, typer.Option(min=1, show_default="GPUs, else 2")] = None,
    config_file: Annotated[Path, typer.Option(help="Of accelerate launch.")] = ZERO3,
    keep: Annotated[Path | None, typer.Option(help="Run in this new directory, and leave it.")] = None,
) -> None:
    """Kill and stop a run on this machine, and see that it ends as one that nothing happened to; exit code 1 if not."""
    given = arguments or []

    def run() -> None:
        from launch.selftest import selftest as survive

        recipe = parse_command_line(given)
        preflight.check(recipe)
        if not survive(recipe, given, steps=steps, num_processes=num_processes, config_file=config_file, keep=keep):
            raise typer.Exit(1)

    _refuse_in_one_sentence(run)


def _generate(recipe: Recipe, num_rows: int, max_new_tokens: int) -> None:
    from launch.generate import answers

    for answer in answers(recipe, num_rows, max_new_tokens):
        print(answer.as_text(), flush=True)


def _merge(
    source: Path,
    output: Path | None,
    base: str | None,
    dtype: str | None,
    max_shard_size: str | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    max_shard_size_bytes = None if max_shard_size is None else _bytes_of(max_shard_size)
    from launch import engine as engines
    from launch.merge_from_disk import find_source, merge_from_disk
    from launch.merge_rule import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not valid; the valid ones are {', '.join(DTYPES)}.")
    engines.quiet_libraries()
    found = find_source(source)
    is_run = (source / "recipe.yaml").is_file()
    if output is None and not is_run:
        raise ConfigError(f"{source} is no run, whose merged/ would be the place; give --output.")
    target = (output or source / "merged").absolute()
    if output is None and found.recipe is not None:
        keep_private(group_readable=found.recipe.run.group_readable)
    start = time.monotonic()
    with runs.open_run(source) if output is None else nullcontext():
        is_new = merge_from_disk(
            found,
            target,
            base=base,
            trust_remote_code=trust_remote_code,
            dtype_name=dtype,
            max_shard_size_bytes=max_shard_size_bytes,
            overwrite=overwrite,
        )
    if not is_new:
        print(f"{target}: already merged, and whole.")
        return
    print(f"{target}: merged in {time.monotonic() - start:.1f} s; merge_report.json says what was compared.")
    print(f"Serve it, for instance with: vllm serve {target}")


def _bytes_of(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        raise ConfigError(f"--max-shard-size {text!r} is no size; write 4GB or 500MB.")
    return int(float(size[1]) * 1000 ** " KMGT".index(size[2].upper() or " "))


def _refuse_in_one_sentence(work: Callable[[], None]) -> None:
    try:
        work()
    except LaunchError as error:
        print(f"Refused: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
