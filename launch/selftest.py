"""python -m launch selftest: the proof, on this machine and this file system, that a run survives being ended."""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launch import preemption, runs
from launch.errors import ConfigError, PreflightError
from launch.recipe import TINY_MODEL_NAME, Recipe
from launch.table import format_table

LEAST_STEPS = 8
SECONDS_TO_END = 30.0  # for ranks whose launcher is gone
POLL_SECONDS = 0.01  # a tiny model makes a step in a few of these
RELATIVE_ROUNDING = 1e-6
NAME_COLUMNS = 12
TAIL_LINES = 25
LAUNCHER = "torch/distributed/elastic/"


class StageError(Exception):
    """What did not survive, for a person; `log` is that of the start in which it was seen."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence)
        self.log = log


@dataclass(frozen=True)
class Difference:
    """Between the ends of two runs; `where` is empty when every bit is the same."""

    relative: float
    where: str

    def __bool__(self) -> bool:
        return bool(self.where)


def compare(one: Path, other: Path) -> Difference:
    """The largest difference between two run directories, in the last checkpoints' tensors and the losses.

    That of a tensor is relative to its largest number. Raises StageError when they are not to be compared.
    """
    import numpy as np
    from safetensors.numpy import load_file

    def bits(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return values.view(f"u{values.itemsize}")  # a NaN equals itself, and 0.0 is not -0.0

    tensors, others = (load_file(last_checkpoint(directory) / "optimizer.safetensors") for directory in (one, other))
    losses, other_losses = _losses(one), _losses(other)
    for what, keys, other_keys in (
        ("tensors", tensors, others),
        ("lines of metrics.jsonl", losses, other_losses),
    ):
        if keys.keys() != other_keys.keys():
            only = sorted(map(str, keys.keys() ^ other_keys.keys()))
            raise StageError(f"{one} and {other} have not the same {what}: {', '.join(only[:4])}.")
    found = []
    for name, values in tensors.items():
        differs = bits(values) != bits(others[name])
        if differs.any():
            scale = np.abs(values).max() or 1.0
            relative = float(np.abs(others[name] - values).max() / scale)
            place = ", ".join(map(str, np.argwhere(differs)[0]))
            found.append((relative, f"{name}: {int(differs.sum()):,} of {values.size:,}, the first at [{place}]"))
    for (kind, step), loss in losses.items():
        other_loss = other_losses[kind, step]
        if loss != other_loss:
            relative = math.nan if loss is None or other_loss is None else abs(other_loss - loss) / (abs(loss) or 1.0)
            found.append((relative, f"the loss of {kind} {step}: {loss} and {other_loss}"))
    # What is not a number is the largest of all.
    return Difference(*max(found, key=lambda pair: (math.isnan(pair[0]), pair[0]))) if found else Difference(0.0, "")


def last_checkpoint(directory: Path) -> Path:
    """Of a run directory. Raises StageError when there is none."""
    found = sorted(directory.glob("checkpoints/step-*[0-9]"))
    if not found:
        raise StageError(f"{directory} has no checkpoint.")
    return found[-1]


def _losses(directory: Path) -> dict[tuple[str, int], float | None]:
    """By kind and step. Raises StageError when one stands there twice."""
    found: dict[tuple[str, int], float | None] = {}
    for record in runs.read_metrics(directory):
        if record["kind"] in ("train", "evaluation"):
            key = record["kind"], record["step"]
            if key in found:
                raise StageError(f"{directory}/metrics.jsonl has {key[0]} {key[1]} twice.")
            found[key] = record["loss"]
    return found


@dataclass(frozen=True)
class Selftest:
    """How every start is launched, and where."""

    directory: Path
    arguments: Sequence[str]  # the recipe and what the user overrides
    steps: int
    num_processes: int
    config_file: Path

    def launch(self, name: str, stage: str) -> "Start":
        """Start the run called `name`."""
        quarter = self.steps // 4
        overrides = {
            "train.max_steps": self.steps,
            "train.save_steps": quarter,
            "train.eval_steps": quarter,
            "train.logging_steps": 1,
            "run.name": name,
            "run.output_dir": self.directory,
            "run.merge": "false",
            "run.report_to": "[]",
        }
        options = ["--config_file", str(self.config_file), "--num_processes", str(self.num_processes)]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
        command += ["--main_process_port", "0", "train.py", *self.arguments]
        command += [f"{key}={value}" for key, value in overrides.items()]
        log = self.directory / f"{stage}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process alone
                preexec_fn=preemption.end_with_parent,
            )
        return Start(process, self.directory / name, log)

    def processes(self) -> list[int]:
        """Those that work on its runs: launchers, ranks, and what they forked."""
        mark = f"run.output_dir={self.directory}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
        return found

    def wait_until_gone(self, log: Path) -> float:
        """Seconds until no process is left. Raises StageError after `SECONDS_TO_END`."""
        start = time.monotonic()
        while left := self.processes():
            if time.monotonic() - start > SECONDS_TO_END:
                raise StageError(f"{len(left)} processes outlive their launcher by {SECONDS_TO_END:.0f} s.", log)
            time.sleep(POLL_SECONDS)
        return time.monotonic() - start

    def end(self) -> None:
        """Kill whatever is left."""
        while left := self.processes():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Start:
    """One `accelerate launch`."""

    process: "subprocess.Popen[bytes]"
    run_directory: Path
    log: Path

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Until `condition` holds. Raises StageError when the launcher ends before."""
        while not condition():
            if self.process.poll() is not None:
                if runs.read_status(self.run_directory).get("state") == "finished":
                    raise StageError(f"The run was over before {what}; make it longer with --steps.", self.log)
                self.fail(f"The launch ended with exit code {self.process.returncode} before {what}")
            time.sleep(POLL_SECONDS)

    def wait_for_end(self, state: runs.State) -> None:
        """Until the launcher ends. Raises StageError when the run is then in another state."""
        code = self.process.wait()
        if runs.read_status(self.run_directory).get("state") != state:
            self.fail(f"The launch ended with exit code {code}, and the run is not {state}")

    def check_continued(self, step: int) -> None:
        """Raises StageError when it does not say that it continues after `step`."""
        said = " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())
        if f"resumed after step {step} " not in said:
            raise StageError(f"The run did not continue after step {step}, which was saved.", self.log)

    def steps_made(self) -> int:
        """The last step in metrics.jsonl."""
        return max((r["step"] for r in runs.read_metrics(self.run_directory) if r["kind"] == "train"), default=0)

    def fail(self, sentence: str) -> NoReturn:
        """Raise StageError with what status.json says."""
        status = runs.read_status(self.run_directory)
        said = f"{status['state']}, {status['reason']}" if status else "nothing"
        raise StageError(f"{sentence}; status.json says: {said}", self.log)


def selftest(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    steps: int,
    num_processes: int | None,
    config_file: Path,
    keep: Path | None,
) -> bool:
    """Run straight, run again with two ends in between, compare, and say so while it goes; whether all was the same.

    What it made is removed, unless it failed or `keep` names where it shall stay. Raises ConfigError and
    PreflightError for what it cannot begin with.
    """
    if steps < LEAST_STEPS:
        raise ConfigError(f"--steps {steps} leaves no room for two ends in between; take at least {LEAST_STEPS}.")
    if not config_file.is_file():
        raise ConfigError(f"--config-file: there is no {config_file}; the shipped ones are in configs/accelerate.")
    directory, is_kept = _make_directory(recipe, keep), keep is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a script's & has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    test = Selftest(directory, arguments, steps, num_processes or _num_devices(), config_file)
    try:
        _say("selftest", f"{steps} steps on {test.num_processes} processes, in {directory}\n")
        _say("\nPassed", _stages(test))
        return True
    except StageError as error:
        is_kept = True
        if error.log is not None:
            print(f"\nThe end of {error.log}, without the launcher's own:", *_tail(error.log), sep="\n  | ")
        _say("\nFailed", f"{error} Do not rely on this machine yet; the runs and their logs are in {directory}.")
        return False
    finally:
        test.end()
        if not is_kept:
            shutil.rmtree(directory, ignore_errors=True)


def _stages(test: Selftest) -> str:
    """Every stage; returns what it all means. Raises StageError."""
    straight, ended = test.directory / "straight", test.directory / "ended"
    quarter = test.steps // 4
    with _stage("straight") as say:
        test.launch("straight", "straight").wait_for_end("finished")
        say(f"{test.steps} steps, nothing happened to it")

    with _stage("SIGKILL") as say:
        start = test.launch("ended", "killed")
        start.wait_for(
            lambda: any(ended.glob("checkpoints/step-*[0-9]")) and start.steps_made() > quarter, "it could be killed"
        )
        start.process.kill()
        start.process.wait()
        gone_seconds = test.wait_until_gone(start.log)
        killed_after = start.steps_made()
        first = int(last_checkpoint(ended).name.removeprefix("step-"))
        say(f"of the launcher after step {killed_after}; its ranks ended {gone_seconds:.2f} s later; {first} is saved")

    with _stage("SIGTERM") as say:
        start = test.launch("ended", "stopped")
        start.wait_for(lambda: start.steps_made() > max(2 * quarter, killed_after), "it could be asked to stop")
        start.process.terminate()
        start.wait_for_end("preempted")
        test.wait_until_gone(start.log)
        start.check_continued(first)
        second = int(runs.read_status(ended)["step"])
        if int(last_checkpoint(ended).name.removeprefix("step-")) != second:
            raise StageError(f"status.json says that step {second} is saved, but it is not there.", start.log)
        say(f"to the launcher: continued after step {first}, stopped after {second}, which it saved")

    with _stage("the rest") as say:
        start = test.launch("ended", "continued")
        start.wait_for_end("finished")
        start.check_continued(second)
        say(f"continued after step {second}, {test.steps - second} steps")

    test.wait_until_gone(start.log)
    stray = [path for run in (straight, ended) for path in run.rglob("*") if _is_stray(path)]
    if stray:
        raise StageError(f"This was left over: {', '.join(map(str, stray[:4]))}.", start.log)
    _say("left over", "no process, no temporary file")
    return _judged(test, straight, ended)


def _judged(test: Selftest, straight: Path, ended: Path) -> str:
    """What the comparison means. Raises StageError when the runs differ by more than the machine's own noise."""
    for run in (straight, ended):
        trained = [step for kind, step in _losses(run) if kind == "train"]
        if trained != list(range(1, test.steps + 1)):
            raise StageError(f"{run}/metrics.jsonl does not have every step once: {trained}.")
    difference = compare(straight, ended)
    if not difference:
        _say("compared", "weights, moments and every loss are bitwise the same")
        return (
            "killed, stopped and continued, the run ended with the very bits of the run that nothing happened to. On "
            "this machine a job that was ended needs nothing but the same command again."
        )
    _say("compared", f"not bitwise the same, by {difference.relative:.1e}: {difference.where}")
    with _stage("again") as say:
        test.launch("again", "again").wait_for_end("finished")
        say(f"{test.steps} steps, to see what this machine repeats")
    noise = compare(straight, test.directory / "again")
    _say("noise", f"two runs that nothing happened to differ by {noise.relative:.1e}" if noise else "none")
    allowed = max(2 * noise.relative, RELATIVE_ROUNDING)
    if not difference.relative <= allowed:  # also when it is not a number
        raise StageError(f"The run that was ended differs by {difference.relative:.1e}, allowed is {allowed:.1e}.")
    return (
        f"killed, stopped and continued, the run differs by {difference.relative:.1e} from the run that nothing "
        f"happened to; two such runs differ by {noise.relative:.1e}, and {allowed:.1e} is allowed. A job that "
        "was ended needs nothing but the same command again."
    )


def _tail(log: Path) -> list[str]:
    """Its last lines before those in which the launcher tells of a rank that failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    end = next((place for place, line in enumerate(lines) if LAUNCHER in line), len(lines))
    return lines[max(0, end - TAIL_LINES) : end]


def _make_directory(recipe: Recipe, keep: Path | None) -> Path:
    """Where the runs live: on the file system of the recipe's own, beside which a tiny base is built only once."""
    output = Path(recipe.run.output_dir).resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        if keep is None:
            directory = Path(tempfile.mkdtemp(prefix=".selftest-", dir=output))
        else:
            directory = keep.resolve()
            directory.mkdir(parents=True)
        if recipe.model.name_or_path == TINY_MODEL_NAME:
            bases = output / "base-models"
            bases.mkdir(exist_ok=True)
            (directory / bases.name).symlink_to(bases)
    except FileExistsError:
        raise PreflightError(f"--keep {keep} is there already; name a directory that is not.") from None
    except OSError as error:
        raise PreflightError(f"{error.filename} cannot be made: {error.strerror}.") from None
    return directory


@contextmanager
def _stage(name: str) -> Iterator[Callable[[str], None]]:
    """A line with the seconds that it took, at its end."""
    start = time.monotonic()
    yield lambda text: _say(name, f"{text}  ({time.monotonic() - start:.0f} s)")


def _say(name: str, text: str) -> None:
    print(format_table([(name.ljust(NAME_COLUMNS), text)]), flush=True)


def _is_stray(path: Path) -> bool:
    return path.suffix in (".tmp", ".corrupt") or (path.name.startswith(".") and not path.name.startswith(".lock"))


def _num_devices() -> int:
    """GPUs, or two processes where there is none."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) or 2
