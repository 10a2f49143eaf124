"""launch status: what the files of runs say, whoever writes them and whatever has become of them."""

import functools
import json
import multiprocessing
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, World, launch, start_ranks
from typer.testing import CliRunner

import train
from launch import lock, runs, status
from launch.__main__ import app
from launch.status import Figures, RunStatus, find_runs, read_runs
from launch.status_lines import block, table

HOUR = 3600.0


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks at the time are at the same second and minute, however busy the machine is."""
    now = float(int(time.time()))
    monkeypatch.setattr(time, "time", lambda: now)


def python_m_launch(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr


def read(directory: Path) -> RunStatus:
    return read_runs([directory])[0]


def train_record(step: int, **others: Any) -> dict[str, Any]:
    """Of ten steps that took 20 s."""
    rates = {"trained_tokens": 1000, "trained_tokens_per_second": 50.0, "tokens_per_second": 250.0}
    return {"kind": "train", "step": step, "loss": 2 - step / 100, "token_accuracy": step / 200, **rates, **others}


def fill(directory: Path, state: runs.State = "running", reason: str = "training", steps: int = 50) -> None:
    """What a run of 100 steps writes that owns the directory, by its own functions."""
    runs.begin(directory, 0, "model: {}")
    runs.write_text(directory / "recipe.yaml", "model: {}")
    for after in (0, 0, 20):
        runs.write_environment(directory, {"after_step": after, "lost_steps": 7 if after else 0})
    runs.append_metrics(directory, {"kind": "evaluation", "step": 0, "loss": 3.0, "token_accuracy": 0.1})
    runs.append_metrics(directory, {"kind": "start", "step": 0})
    for step in range(10, steps + 1, 10):
        runs.append_metrics(directory, train_record(step))
    checkpoint = directory / "checkpoints" / f"step-{steps:06d}"
    checkpoint.mkdir(parents=True)
    runs.write_json(checkpoint / "manifest.json", {})
    ages_before(checkpoint / "manifest.json", 130)
    runs.write_status(directory, state, reason, pid=os.getpid())
    runs.write_progress(directory, steps + 3, 100)
    ages_before(directory / "progress.json", 4)


def ages_before(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def older_status(directory: Path, **changes: Any) -> None:
    """As if the status had been written an hour ago, and with these changes."""
    path = directory / "status.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(facts | {"unix_seconds": time.time() - HOUR - 120} | changes), encoding="utf-8")


def ended(directory: Path, state: runs.State = "preempted", reason: str = "asked to stop; step 50 is saved") -> Path:
    """A run that has come to an end."""
    with runs.open_run(directory):
        fill(directory, state, reason)
    return directory


def killed(directory: Path) -> int:
    """A run whose process was killed; its pid."""

    def work() -> None:
        with runs.open_run(directory):
            fill(directory)
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and child.pid is not None
    return child.pid


# ---- one run ----


@pytest.mark.usefixtures("stopped_clock")
def test_a_run_at_work(tmp_path: Path) -> None:
    directory = tmp_path / "r"
    with runs.open_run(directory):
        fill(directory)
        older_status(directory)
        said = block(read(directory))
        owner = str(lock.Owner.this_process())
    assert len(said.splitlines()) == 13 and all(len(line) <= 80 or str(tmp_path) in line for line in said.splitlines())
    assert said.replace(str(directory), "RUN").splitlines() == [
        "",
        "  run         RUN",
        "  state       running for 1 h 2 min: training",
        "  step        53 of 100 (53.0%), the last one 4 s ago",
        "  training    loss 1.5000, accuracy 0.250, after step 50",
        "  evaluation  loss 3.0000, accuracy 0.100, after step 0",
        "  speed       250 tokens/s, 2 s a step, about 1 min 34 s left",
        "  restarts    2; 7 steps were done twice",
        f"  job         {owner}",
        "  checkpoint  step 50, 2 min 10 s ago",
        "",
        "Watch it:",
        "  python -m launch status RUN --watch",
    ]


@pytest.mark.usefixtures("stopped_clock")
@pytest.mark.parametrize(
    ("state", "next_line"),
    [
        ("preempted", "Continue it:"),
        ("failed", "Look at what it printed, and mend that; then continue:"),
        ("no progress", "Look at what it printed, and mend that; then continue:"),
        ("refused", "Mend what the reason says; then start it again:"),
    ],
)
def test_what_to_do_with_a_run_that_has_ended(tmp_path: Path, state: runs.State, next_line: str) -> None:
    directory = ended(tmp_path / "with space", state, "because")
    said = block(read(directory)).splitlines()
    assert said[2] == f"  state       {state} 0 s ago: because"
    command = "accelerate launch --config_file configs/accelerate/zero3.yaml train.py"
    assert said[-2:] == [next_line, f"  {command} '{directory}/recipe.yaml'"]
    assert not any(line.startswith("  job ") for line in said), "the directory is nobody's"
    (directory / "recipe.yaml").unlink()
    assert block(read(directory)).splitlines()[-1] == "  the command that started it, once more"


def test_what_to_do_with_a_run_that_is_finished(tmp_path: Path) -> None:
    directory = ended(tmp_path / "r", "finished", "every step is done")
    assert f"Ask it:\n  python -m launch chat {directory}\nMerge it, " in block(read(directory))
    (directory / "merged").mkdir()
    assert block(read(directory)).splitlines()[-2:] == ["Ask it:", f"  python -m launch chat {directory}"]
    assert " left" not in block(read(directory))


def test_skipped_steps_are_shown(tmp_path: Path) -> None:
    directory = ended(tmp_path / "r")
    assert "skipped so far" not in block(read(directory))
    runs.append_metrics(directory, train_record(60, skipped_steps=3))
    assert "  training    loss 1.4000, accuracy 0.300, after step 60; skipped so far: 3\n" in block(read(directory))


@pytest.mark.usefixtures("stopped_clock")
def test_a_killed_run_says_so(tmp_path: Path) -> None:
    """Its status says running; the next start, or another command, may have the directory meanwhile."""
    directory = tmp_path / "r"
    pid = killed(directory)
    run = read(directory)
    assert (run.state, run.owner, run.step) == ("killed", None, 53)
    assert run.reason.startswith(f"it was running, but process {pid} on ") and run.reason.endswith(" is gone")
    assert block(run).splitlines()[-2] == "Continue it:"
    with runs.open_run(directory, say=lambda _: None):
        run = read(directory)
        assert (run.state, run.reason) == ("killed", "it was running, but no process has the directory any more")
        assert run.owner == str(lock.Owner.this_process())
    assert read(directory).state == "killed"


@pytest.mark.usefixtures("stopped_clock")
@pytest.mark.parametrize(("silent_seconds", "state"), [(5, "running"), (300, "running"), (700, "silent")])
def test_a_run_elsewhere_is_heard_of(tmp_path: Path, silent_seconds: float, state: str) -> None:
    directory = ended(tmp_path / "r", "running")
    owner = replace(lock.Owner.this_process(), host="node7", boot_id="another")
    (directory / lock.NAME).write_text(json.dumps(asdict(owner)), encoding="utf-8")
    ages_before(directory / lock.NAME, silent_seconds)
    run = read(directory)
    assert run.state == state
    said = " ".join(block(run).split())
    assert ("last heard of 5 min ago" in said) == (silent_seconds == 300)
    if state == "silent":
        assert "silent 11 min ago: it was running, but nothing was heard of process" in said and "on node7" in said


def test_before_the_first_start(tmp_path: Path) -> None:
    (tmp_path / "r" / "data").mkdir(parents=True)
    assert read(tmp_path / "r").state == "not started"
    (tmp_path / "r" / "data" / "prepared.json").write_text("{}", encoding="utf-8")
    assert "state  prepared: its rows are prepared" in block(read(tmp_path / "r"))
    assert block(read(tmp_path / "r")).splitlines()[-2] == "Start it:"


# ---- files in any condition ----


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def test_reading_changes_nothing(tmp_path: Path) -> None:
    killed(tmp_path / "a")
    ended(tmp_path / "b")
    with runs.open_run(tmp_path / "c"):
        fill(tmp_path / "c")
        before = snapshot(tmp_path)
        assert python_m_launch("status", tmp_path)[0] == 0
        assert snapshot(tmp_path) == before


def test_a_line_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    directory = ended(tmp_path / "r")
    before = read(directory)
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 60, "loss": 0.')
    after = read(directory)
    assert (after.training, after.seconds_per_step) == (before.training, before.seconds_per_step)
    (directory / "progress.json").write_text('{"step": 5', encoding="utf-8")
    assert read(directory).step == 50


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "empty": ("status.json", lambda p: p.write_text(""), "unknown", "status.json is damaged: it holds no JSON"),
    "half": ("status.json", lambda p: p.write_text('{"sta'), "unknown", "status.json is damaged: it holds no JSON"),
    "list": ("status.json", lambda p: p.write_text("[1]"), "unknown", "status.json is damaged: it holds no keys"),
    "deep": ("status.json", lambda p: p.write_text("[" * 99999), "unknown", "status.json is damaged: it holds no JSON"),
    "other": ("status.json", lambda p: p.write_bytes(b"\xff\xfe\0"), "unknown", "status.json is damaged: it holds no"),
    "folder": ("status.json", make_directory, "unknown", "status.json cannot be read: Is a directory"),
    "missing": ("status.json", Path.unlink, "not started", ""),
    "types": ("status.json", lambda p: p.write_text('{"state": [], "reason": {}, "job": 1}'), "not started", ""),
    "numbers": ("status.json", lambda p: p.write_text('{"state": "failed", "unix_seconds": "soon"}'), "failed", ""),
    "environment": ("environment.json", lambda p: p.write_text("nul"), "preempted", "environment.json is damaged: it"),
    "starts": ("environment.json", lambda p: p.write_text('{"earlier": [1, {"lost_steps": "a"}]}'), "preempted", ""),
    "metrics": ("metrics.jsonl", make_directory, "preempted", "metrics.jsonl cannot be read: Is a directory"),
    "lines": (
        "metrics.jsonl",
        lambda p: p.write_bytes(b'\0\n{"kind": "train"\n{"kind": "train", "step": 1}\n'),
        "",
        "",
    ),
    "progress": ("progress.json", lambda p: p.write_text('{"step": 1e999, "total_steps": {}}'), "preempted", ""),
    "manifest": ("checkpoints/step-000050/manifest.json", Path.unlink, "", "step-000050 has no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    name, do, state, fault = DAMAGE[damage]
    directory = ended(tmp_path / "r")
    do(directory / name)
    code, out, err = python_m_launch("status", directory)
    assert (code, err) == (0, "")
    assert f"  state       {state or 'preempted'}" in out
    assert [line[14:].startswith(fault) for line in out.splitlines() if "  damaged" in line] == (
        [True] if fault else []
    )
    assert json.loads(python_m_launch("status", directory, "--json")[1])[0]["state"] == state or not state


def test_an_owner_that_cannot_be_read(tmp_path: Path) -> None:
    directory = ended(tmp_path / "r", "running")
    for content in ("", '{"pid": 1}', json.dumps(asdict(lock.Owner.this_process()) | {"pid": "1"})):
        (directory / lock.NAME).write_text(content, encoding="utf-8")
        assert "an owner whose record cannot be read" in block(read(directory))


def test_hostile_texts_are_printed_harmlessly(tmp_path: Path) -> None:
    reason = "one\ntwo\r\x1b[31mred\x07 \u202e \ud800" + " long" * 1000
    directory = tmp_path / "a\x1b[2Jb\nc;rm -rf $(x)\udcff"
    directory = ended(directory, "failed", reason)
    older_status(directory, job="a b 12 0")
    ended(tmp_path / "second", "failed", reason)
    for name in (directory, tmp_path):
        code, out, err = python_m_launch("status", name)
        assert (code, err) == (0, "")
        assert all(char.isprintable() or char == "\n" for char in out)
        assert len(out.splitlines()) < 30 and "one two" in out and "\\x1b[31mred" in out
    assert "a\\x1b[2Jb\\nc;rm -rf $(x)\\udcff" in python_m_launch("status", directory)[1]
    assert json.loads(python_m_launch("status", directory, "--json")[1])[0]["reason"].startswith("one\ntwo")


# ---- several runs ----


@pytest.mark.usefixtures("stopped_clock")
def test_a_table_is_calm_and_aligned(tmp_path: Path) -> None:
    killed(tmp_path / "a-run-with-a-name-that-is-much-longer-than-the-others")
    ended(tmp_path / "b", "finished", "every step is done")
    ended(tmp_path / "c", "refused", "train.learning_rte is not a recipe key; " + "and so on " * 40)
    with runs.open_run(tmp_path / "d"):
        fill(tmp_path / "d")
        said = table(read_runs(find_runs([str(tmp_path)]))).splitlines()
    assert all(len(line) <= 80 for line in said)
    assert said[1:6] == [
        "  run                        state       step   loss   eval  tok/s   left  saved",
        "  a-run-with-a-name-that-i…  killed    53/100  1.500  3.000                2 min",
        "  b                          finished  53/100  1.500  3.000                2 min",
        "  c                          refused   53/100  1.500  3.000                2 min",
        "  d                          running   53/100  1.500  3.000    250  1 min  2 min",
    ]
    assert said[7].startswith("  a-run-with-a-name-that-i…  it was running, but process ")
    assert said[-2:] == ["One of them in full, and what to do next:", "  python -m launch status RUN"]
    assert "train.learning_rte is not a recipe key" in "\n".join(said)


def test_runs_are_found_by_what_people_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"run: {{output_dir: {tmp_path / 'elsewhere'}}}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, out, _ = python_m_launch("status")
    assert code == 0 and out.startswith("There is no run in runs/ yet. Start one:\n  accelerate launch ")
    for name in ("runs/a", "runs/b", "elsewhere/mine"):
        ended(tmp_path / name)
    (tmp_path / "runs" / "base-models" / "tiny").mkdir(parents=True)
    a, b, mine = Path("runs/a"), Path("runs/b"), tmp_path / "elsewhere" / "mine"
    assert find_runs([]) == [a, b]
    assert find_runs(["a", "runs/b/", "runs/a"]) == [a, b]
    assert find_runs(["mine.yaml"]) == [mine]
    assert find_runs([str(tmp_path / "elsewhere")]) == [mine]
    code, _, err = python_m_launch("status", "runs/c")
    assert code == 2 and err.startswith("Refused: There is no run runs/c; give a run's directory, its name in runs/, ")


def test_json_is_for_programs(tmp_path: Path) -> None:
    ended(tmp_path / "a")
    (found,) = json.loads(python_m_launch("status", tmp_path / "a", "--json")[1])
    assert found["training"] == asdict(Figures(50, 1.5, 0.25)) and found["seconds_left"] == 94
    assert (found["num_restarts"], found["num_lost_steps"], found["faults"]) == (2, 7, [])


# ---- Slurm ----


def with_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program in the place of squeue."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "squeue").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_a_run_that_waits_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = '[ "$*" = "-h -t all -j 4711 -o %A|%T|%r" ] || exit 1'
    with_squeue(tmp_path, monkeypatch, f"{asked}; printf '4711|PENDING|(a|b) \\033[2J\\n'")
    directory = ended(tmp_path / "runs" / "r")
    older_status(directory, job="node1 29500 4711 1")
    said = block(read(directory))
    assert "  job         Slurm has job 4711 as PENDING ((a|b) \\x1b[2J)\n" in said
    assert said.splitlines()[-2] == "Slurm has its job, which goes on by itself. Watch it:"
    assert said.splitlines()[-1] == f"  python -m launch status {directory} --watch"
    older_status(directory, job="node1  4712 0", state="failed")
    (directory / "logs").mkdir()
    (directory / "logs" / "job.log").touch()
    assert block(read(directory)).splitlines()[-2:] == [
        f"Look at what it printed (tail {directory}/logs/job.log), and mend that; then continue:",
        f"  python -m launch submit {directory}/recipe.yaml",
    ]


def test_a_failed_run_does_not_go_on_though_its_job_is_not_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_squeue(tmp_path, monkeypatch, "echo '12|RUNNING|None'")
    directory = ended(tmp_path / "r", "failed", "because")
    older_status(directory, job="node1 29500 12 0")
    assert "then continue:" in block(read(directory))
    older_status(directory, state="preempted")
    assert "goes on by itself" in block(read(directory))


def test_a_run_that_was_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_squeue(tmp_path, monkeypatch, "echo '12|PENDING|Priority'")
    directory = tmp_path / "r"
    directory.mkdir()
    record = {"job_id": "12", "cluster": None, "unix_seconds": time.time()}
    (directory / "submitted.json").write_text(json.dumps(record), encoding="utf-8")
    run = read(directory)
    assert (run.state, run.slurm_job_id, run.queue_state) == ("not started", "12", "PENDING")
    assert block(run).splitlines()[-2] == "Slurm has its job, which goes on by itself. Watch it:"
    ended(directory)
    older_status(directory, job="node1 29500 11 0")
    assert read(directory).slurm_job_id == "12"
    for number, restarts in ((13, {}), (14, {"SLURM_RESTART_COUNT": "1"})):
        job = runs.this_job({"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "SLURM_JOB_ID": str(number), **restarts})
        older_status(directory, job=job, unix_seconds=time.time() + 1)
        assert read(directory).slurm_job_id == str(number), "which was started since"


def test_a_job_that_slurm_knows_to_be_over_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_squeue(tmp_path, monkeypatch, "echo '12|NODE_FAIL|None'")
    directory = ended(tmp_path / "r", "running")
    owner = replace(lock.Owner.this_process(), host="node7", slurm_job_id="12")
    (directory / lock.NAME).write_text(json.dumps(asdict(owner)), encoding="utf-8")
    assert read(directory).reason == "it was at work, but Slurm says that its job is NODE_FAIL"


def test_a_queue_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_squeue(tmp_path, monkeypatch, "sleep 60")
    monkeypatch.setattr(status, "_SQUEUE_SECONDS", 0.1)
    directory = ended(tmp_path / "r")
    older_status(directory, job="node1 29500 4711 1")
    since = time.monotonic()
    assert read(directory).queue_state is None and time.monotonic() - since < 5


# ---- speed, and no torch ----


def test_twenty_long_runs_are_read_at_once(tmp_path: Path) -> None:
    """Each has 20,000 lines of training after its only evaluation; parsing those of five would take longer."""
    first = ended(tmp_path / "0")
    lines = "".join(json.dumps(train_record(step)) + "\n" for step in range(60, 200_060, 10))
    with (first / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(lines)
    for number in range(1, 20):
        shutil.copytree(first, tmp_path / str(number))
    begin = time.process_time()
    found = read_runs(find_runs([str(tmp_path)]))
    seconds, begin = time.process_time() - begin, time.process_time()
    runs.read_metrics(first)
    assert seconds < 5 * (time.process_time() - begin)
    assert len(found) == 20 and all(run.evaluation == Figures(0, 3.0, 0.1) for run in found)


def test_status_needs_no_torch(tmp_path: Path) -> None:
    ended(tmp_path / "r")
    code = f"""if True:
        import sys
        from launch.__main__ import app
        app(["status", {str(tmp_path / "r")!r}], standalone_mode=False)
        print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_end_of_metrics_is_that_of_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the blocks fall."""
    generator = random.Random(0)
    wanted = {"train": 3, "evaluation": 1, "start": 2}
    for number in range(60):
        monkeypatch.setattr(runs, "_BLOCK_BYTES", generator.randint(1, 200))
        kinds = generator.choices(["train", "evaluation", "start", "save"], k=generator.randint(0, 12))
        lines = [json.dumps({"kind": kind, "step": step}) for step, kind in enumerate(kinds)]
        lines += generator.choice([[], ["{"], ['{"kind": "train"}'], [""]])
        text = "\n".join(lines) + generator.choice(["", "\n"])
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
        everything = runs.read_metrics(tmp_path)
        of_kind = {kind: [record for record in everything if record["kind"] == kind] for kind in wanted}
        expected = {kind: records[::-1][: wanted[kind]] for kind, records in of_kind.items()}
        assert runs.last_metrics(tmp_path, wanted) == expected, (number, text)


# ---- watching ----


@pytest.mark.slow
def test_watching_ends_quietly(tmp_path: Path) -> None:
    ended(tmp_path / "r")
    command = [sys.executable, "-m", "launch", "status", str(tmp_path / "r"), "--watch", "--interval", "0.5"]
    main, terminal = pty.openpty()
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=heed)
    os.close(terminal)
    said = b""
    while said.count(b"Ctrl-C ends this") < 2:
        said += os.read(main, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    os.close(main)
    assert said.count(b"\x1b[H") >= 2 and b"Traceback" not in said and b"preempted" in said


def test_watching_needs_a_terminal(tmp_path: Path) -> None:
    ended(tmp_path / "r")
    for options in ([], ["--json"]):
        code, _, err = python_m_launch("status", tmp_path / "r", "--watch", *options)
        assert code == 2 and err.startswith("Refused: --watch is for a terminal; ")


# ---- a real run ----


def die_before_step(number: int, recipe: Path) -> None:
    """train.py's main in a process that kills itself before its `number`th optimizer step; 0: before the base."""
    real, seen = train.engines.step, 0
    if number == 0:
        train.adapted_base = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def step(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    train.engines.step = step
    train.main([str(recipe)])


@pytest.mark.slow
def test_steps_lost_to_kills_are_counted_one_by_one(world: World) -> None:
    """Though figures are logged every hundred steps only, and a start that dies before its first step loses none."""
    recipe = world.recipe("lost", train={"max_steps": 12, "save_steps": 4, "logging_steps": 100})
    directory, expected = world.run_directory("lost"), 0
    for number in (8, 0, 1, 3):
        before = runs.published_checkpoints(directory)
        ((child, _),) = start_ranks(1, die_before_step, number, recipe)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        reached = (before[-1][0] if before else 0) + max(number - 1, 0)
        expected += reached - dict([(0, directory), *runs.published_checkpoints(directory)]).popitem()[0]
        assert (read(directory).step or 0) == reached and read(directory).total_steps == (12 if number else None)
        assert read(directory).state == "killed"
    launch(recipe, 1)
    run = read(directory)
    assert (run.state, run.step, run.num_restarts, run.num_lost_steps) == ("finished", 12, 4, expected)
    assert expected >= 3
