"""What `launch status` prints: one run as a block, several as a table, and what to do next."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.config import LAUNCH_COMMAND
from launch.errors import ConfigError
from launch.lock import ENDED_JOB_STATES
from launch.status import RUNS, Figures, RunStatus, find_runs, read_runs
from launch.table import format_table

COLUMNS = 80
_LONGEST_REASON, _LONGEST_NOTE = 600, 160  # characters
_TROUBLED = ("killed", "silent", "failed", "refused", "no progress", "unknown")
_HEADINGS = ("run", "state", "step", "loss", "eval", "tok/s", "left", "saved")
_LONGEST_NAME, _SHORTEST_NAME = 40, 12
_COMMAND = "python -m launch"
_PATH = "\0"  # no other text has it


def show(names: Sequence[str], *, as_json: bool, every_seconds: float | None) -> None:
    """Print the state of these runs, or of all in runs/: once, or again and again until Ctrl-C on a terminal.

    Raises ConfigError for a run that is not there, or when there is no terminal to watch on.
    """
    if every_seconds is None:
        print(_page(names, as_json=as_json))
        return
    if as_json or not sys.stdout.isatty():
        raise ConfigError("--watch is for a terminal; leave it out, or call launch status --json again and again.")
    try:
        print("\x1b[2J", end="")
        while True:
            lines = [*_page(names, as_json=False).splitlines(), "", f"{_clock()}; Ctrl-C ends this, not the run."]
            print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
            time.sleep(every_seconds)
    except KeyboardInterrupt:
        print()


def _page(names: Sequence[str], *, as_json: bool) -> str:
    found = read_runs(find_runs(names))
    if as_json:
        return json.dumps([as_record(run) for run in found], indent=2)
    if not found:
        return f"There is no run in {RUNS}/ yet. Start one:\n  {LAUNCH_COMMAND} RECIPE.yaml"
    return block(found[0]) if len(found) == 1 else table(found)


def as_record(run: RunStatus) -> dict[str, object]:
    """Everything that is known of it, for programs."""
    return {**dataclasses.asdict(run), "seconds_left": run.seconds_left}


def block(run: RunStatus) -> str:
    """One run."""
    reason = _shortened(run.reason, _LONGEST_REASON)
    state = _state_line(run) + (f": {reason}" if reason else "")
    rows = [("run", _PATH), ("state", state)]
    if run.step is not None:
        rows.append(("step", _step_line(run)))
    skipped = f"; skipped so far: {run.num_skipped_steps:,}" if run.num_skipped_steps else ""
    rows += [("training", _figures_line(run.training) + skipped)] if run.training else []
    rows += [("evaluation", _figures_line(run.evaluation))] if run.evaluation else []
    speed = [f"{run.tokens_per_second:,.0f} tokens/s"] if run.tokens_per_second is not None else []
    speed += [f"{run.seconds_per_step:.3g} s a step"] if run.seconds_per_step is not None else []
    if run.seconds_left:
        speed.append(f"about {_duration(run.seconds_left)} left")
    rows += [("speed", ", ".join(speed))] if speed else []
    if run.num_restarts:
        rows.append(("restarts", _restarts_line(run)))
    if job := _job_line(run):
        rows.append(("job", job))
    if run.checkpoint_step is not None:
        rows.append(("checkpoint", f"step {run.checkpoint_step:,}" + _ago(run.checkpoint_seconds)))
    rows += [("damaged", plain(fault)) for fault in run.faults]
    facts = format_table(rows).replace(_PATH, plain(run.directory), 1)  # which is not cut into lines
    return f"\n{facts}\n\n{next_lines(run)}"


def table(found: Sequence[RunStatus]) -> str:
    """Several runs, a line each; what is wrong with some stands below."""
    names = [plain(Path(run.directory).name) for run in found]
    if len(set(names)) < len(names):
        names = [plain(run.directory) for run in found]
    rows = [_HEADINGS, *((name, *_cells(run)) for name, run in zip(names, found, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    left = COLUMNS - 2 - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], _LONGEST_NAME, max(_SHORTEST_NAME, left))
    lines = []
    for name, state, *cells in rows:
        aligned = [_cut(name, widths[0]).ljust(widths[0]), state.ljust(widths[1])]
        aligned += [cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True)]
        lines.append("  " + "  ".join(aligned).rstrip())
    notes = [(_cut(name, widths[0]), note) for name, run in zip(names, found, strict=True) if (note := _note(run))]
    below = f"\n\n{format_table(notes)}" if notes else ""
    return "\n" + "\n".join(lines) + f"{below}\n\nOne of them in full, and what to do next:\n  {_COMMAND} status RUN"


def next_lines(run: RunStatus) -> str:
    """What to do next, with the command where there is one that can be copied."""
    directory = shlex.quote(run.directory) if run.directory.isprintable() else None
    start = f"{_COMMAND} submit" if run.slurm_job_id else LAUNCH_COMMAND
    if directory is None or not run.has_recipe:
        again = "  the command that started it, once more"
    else:
        again = f"  {start} {shlex.quote(str(Path(run.directory) / 'recipe.yaml'))}"
    directory = directory or "RUN"
    is_over = run.state in ("failed", "refused", "no progress")  # its job may not have ended yet, but is no other start
    waits = run.queue_state == "PENDING" or not (is_over or run.queue_state in (None, "COMPLETING", *ENDED_JOB_STATES))
    if run.is_alive:
        return f"Watch it:\n  {_COMMAND} status {directory} --watch"
    if run.state == "finished":
        merge = "" if run.has_merged else f"\nMerge it, if it is a LoRA:\n  {_COMMAND} merge {directory}"
        return f"Ask it:\n  {_COMMAND} chat {directory}{merge}"
    if waits:
        return f"Slurm has its job, which goes on by itself. Watch it:\n  {_COMMAND} status {directory} --watch"
    if run.state in ("prepared", "not started"):
        return f"Start it:\n  {start} RECIPE.yaml"
    if run.state in ("failed", "no progress"):
        log = f" (tail {shlex.quote(run.log)})" if run.log and run.log.isprintable() else ""
        return f"Look at what it printed{log}, and mend that; then continue:\n{again}"
    if run.state == "refused":
        return f"Mend what the reason says; then start it again:\n{again}"
    return f"Continue it:\n{again}"


def plain(text: str) -> str:
    """Without what would change the terminal: somebody's file names and error messages stand in it."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


# ---- parts of lines ----


def _state_line(run: RunStatus) -> str:
    state = _shortened(run.state, _LONGEST_NOTE)
    if run.state_seconds is None:
        return state
    since = _duration(run.state_seconds)
    return f"{state} for {since}" if run.is_alive else f"{state} {since} ago"


def _step_line(run: RunStatus) -> str:
    assert run.step is not None
    line = f"{run.step:,}"
    if run.total_steps:
        line += f" of {run.total_steps:,} ({run.step / run.total_steps:.1%})"
    return line + (f", the last one{_ago(run.step_seconds)[1:]}" if run.is_alive and run.step_seconds else "")


def _figures_line(figures: Figures) -> str:
    loss = "not finite" if figures.loss is None else f"{figures.loss:.4f}"
    accuracy = "" if figures.token_accuracy is None else f", accuracy {figures.token_accuracy:.3f}"
    return f"loss {loss}{accuracy}, after step {figures.step:,}"


def _restarts_line(run: RunStatus) -> str:
    lost = f"{run.num_lost_steps:,} {'step was' if run.num_lost_steps == 1 else 'steps were'} done twice"
    lost = lost if run.num_lost_steps else "no step was lost"
    in_vain = f"; the last {run.num_restarts_in_vain} came no further" if run.num_restarts_in_vain else ""
    return f"{run.num_restarts:,}; {lost}{in_vain}"


def _job_line(run: RunStatus) -> str:
    parts = [plain(run.owner)] if run.owner else []
    if run.owner and run.owner_silent_seconds is not None and run.owner_silent_seconds > 120:
        parts[0] += f", last heard of {_duration(run.owner_silent_seconds)} ago"
    if run.queue_state:
        reason = f" ({plain(run.queue_reason)})" if run.queue_reason else ""
        parts.append(f"Slurm has job {run.slurm_job_id} as {plain(run.queue_state)}{reason}")
    return "; ".join(parts)


def _cells(run: RunStatus) -> tuple[str, ...]:
    """In the order of the headings, but for the name."""
    step = "" if run.step is None else f"{run.step:,}" + (f"/{run.total_steps:,}" if run.total_steps else "")
    losses = [f"{figures.loss:.3f}" if figures and figures.loss is not None else "" for figures in _both(run)]
    speed = f"{run.tokens_per_second:,.0f}" if run.is_alive and run.tokens_per_second is not None else ""
    left = _short(run.seconds_left) if run.is_alive and run.seconds_left is not None else ""
    saved = _short(run.checkpoint_seconds) if run.checkpoint_seconds is not None else ""
    return _cut(plain(run.state), 11), step, *losses, speed, left, saved


def _both(run: RunStatus) -> tuple[Figures | None, Figures | None]:
    return run.training, run.evaluation


def _note(run: RunStatus) -> str:
    reason = run.reason if run.state in _TROUBLED else ""
    queue = f"Slurm has its job as {run.queue_state}" if run.queue_state and not run.is_alive else ""
    notes = filter(None, (reason, *run.faults, queue))
    return _shortened("; ".join(notes), _LONGEST_NOTE)


def _shortened(text: str, length: int) -> str:
    return _cut(plain(" ".join(text.split())), length)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f", {_duration(seconds)} ago"


def _duration(seconds: float) -> str:
    """2 h 25 min: two units, the smaller one left out where it is nothing."""
    whole = int(seconds)
    for name, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size:,} {name}" + (f" {rest} {smaller}" if rest and whole // size < 10 else "")
    return f"{whole} s"


def _short(seconds: float) -> str:
    """One unit, for a table."""
    return " ".join(_duration(seconds).split()[:2])


def _clock() -> str:
    return time.strftime("%H:%M:%S")
