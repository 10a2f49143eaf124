"""Whose a run directory is: one file, `.lock`, that names its owner and is touched as long as the owner lives.

A claim is one hard link, which either is made or is there already, on NFS as well. Who takes over from a dead owner
links its own record to a name made of the dead one's token: of many newcomers one can. The owner is thus the last of a
chain, `.lock`, `.lock.after-TOKEN` and so on, which it then shortens to `.lock` again with one rename.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.errors import PreflightError, RunInUseError

NAME = ".lock"
# Of jobs that Slurm still knows; COMPLETING is none, since a process may still be writing.
ENDED_JOB_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}
_SQUEUE_SECONDS = 30.0


@dataclass(frozen=True)
class Times:
    """How an owner shows that it lives, and after what silence it is dead."""

    beat_seconds: float = 30.0
    silent_seconds: float = 600.0  # of an owner of whom nothing else can be known


@dataclass(frozen=True)
class Owner:
    """A process that no other process, here or elsewhere, is mistaken for."""

    host: str
    boot_id: str
    pid_namespace: str  # containers may have the host's name and boot, but number their processes anew
    pid: int
    start_ticks: int  # since boot: a pid is used again
    slurm_cluster: str | None
    slurm_job_id: str | None
    slurm_restart_count: int
    since_unix_seconds: float  # for people
    token: str

    @classmethod
    def this_process(cls) -> "Owner":
        """With a token that no other owner ever had."""
        return cls(
            host=socket.gethostname(),
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            pid_namespace=str(Path("/proc/self/ns/pid").readlink()),
            pid=os.getpid(),
            start_ticks=_state_and_start(Path("/proc/self/stat"))[1],
            slurm_cluster=os.environ.get("SLURM_CLUSTER_NAME"),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            slurm_restart_count=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since_unix_seconds=time.time(),
            token=secrets.token_hex(8),
        )

    def __post_init__(self) -> None:
        """Raises TypeError for what was read from a file and is no record of ours."""
        numbers = (self.pid, self.start_ticks, self.slurm_restart_count, self.since_unix_seconds)
        texts = (self.host, self.boot_id, self.pid_namespace, self.token, self.slurm_job_id or "")
        if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(t, str) for t in texts):
            raise TypeError("an owner has numbers and texts")

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job_id}" if self.slurm_job_id else ""
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.since_unix_seconds))
        return f"process {self.pid} on {self.host}{job}, since {since}"


@dataclass(frozen=True)
class Sight:
    """What can be seen of an owner by who changes nothing."""

    owner: Owner | None  # None: its record cannot be read
    lives: bool | None  # None: it is on another machine, and only its silence tells
    silent_seconds: float  # by the clock of this machine


@dataclass(frozen=True)
class _Record:
    """A file of the chain as it was read."""

    path: Path
    token: str
    owner: Owner | None  # None: it cannot be read
    user_id: int
    touched_nanoseconds: int  # by the clock of the file system

    def __str__(self) -> str:
        return str(self.owner or "an owner whose record cannot be read")


@dataclass(frozen=True)
class _Held:
    """The lock of this process."""

    directory: Path
    owner: Owner
    is_over: threading.Event


_held: _Held | None = None
_checking = threading.Lock()  # a check that overlaps with the release would see a lock that is gone


def acquire(directory: Path, say: Callable[[str], None], times: Times | None = None) -> None:
    """Make `directory` this process's own until `release`; a thread shows from now on that it lives.

    Raises RunInUseError when it is another's who may be alive, PreflightError where there are no hard links.
    """
    global _held
    times = times or Times()
    own = Owner.this_process()
    while not _try_to_acquire(directory, own, say, times):
        pass  # somebody else has changed something in the meantime
    assert _held is None or _held.owner.pid != own.pid, "one directory at a time"
    _held = _Held(directory, own, threading.Event())
    threading.Thread(target=_beat, args=(_held, times.beat_seconds), daemon=True).start()
    for path in directory.glob(f"{NAME}.*"):  # what killed newcomers left; one that lives writes its own anew
        if path != _after(directory, own.token):
            path.unlink(missing_ok=True)


def look(directory: Path) -> Sight | None:
    """Whose `directory` is, without a change to it; None when it is nobody's."""
    last = _last(directory)
    if last is None:
        return None
    lives = None
    if last.owner is not None and _is_same_machine(last.owner, Owner.this_process()):
        lives = _lives(last.owner.pid, last.owner.start_ticks)
    return Sight(last.owner, lives, time.time() - last.touched_nanoseconds / 1e9)


def release() -> None:
    """Remove the lock of this process, if it has one that is still its own."""
    global _held
    if (held := _held) is None or held.owner.pid != os.getpid():  # a fork's copy is the parent's
        return
    with _checking:
        _held = None
        held.is_over.set()
        with contextlib.suppress(OSError):
            if _is_owner(held.directory, held.owner):
                (held.directory / NAME).unlink()


def end_if_lost() -> None:
    """End this process at once when it had a lock that is now another's: the directory is not its to write.

    It had been stopped, or cut off from the network, for so long that it was taken for dead.
    """
    if (held := _held) is None or held.owner.pid != os.getpid():
        return
    with _checking:
        if _held is not held:
            return
        try:
            last = _last(held.directory)
        except OSError:  # a file system that does not answer: nothing else can be written there either
            return
        if last is not None and last.token == held.owner.token:
            return
        what = f"was taken over by {last}" if last else "or its lock was removed"
        print(f"Ended: {held.directory} {what}; it is not this process's any more.", file=sys.stderr, flush=True)
        os._exit(1)


def seconds_since(touched_nanoseconds: int, directory: Path) -> float:
    """By the clock of the file system, which all hosts share: that of a host may be wrong by any amount."""
    descriptor, probe = tempfile.mkstemp(dir=directory, prefix=f"{NAME}.", suffix=".now")
    try:
        return (os.fstat(descriptor).st_mtime_ns - touched_nanoseconds) / 1e9
    finally:
        os.close(descriptor)
        Path(probe).unlink(missing_ok=True)


# ---- the chain ----


def _try_to_acquire(directory: Path, own: Owner, say: Callable[[str], None], times: Times) -> bool:
    """False when it has to be tried again."""
    last, why = _last(directory), ""
    if last is not None:
        found = _why_dead(directory, last, own, times, say)
        if found is None:
            return False
        why = found
    place = directory / NAME if last is None else _after(directory, last.token)
    if not _link(directory, own, place):
        return False
    if not _is_owner(directory, own):  # it was a dead one's token, but of a chain that has been shortened since
        with contextlib.suppress(OSError):
            place.unlink()
        return False
    if last is not None:
        try:
            place.rename(directory / NAME)
        except FileNotFoundError:
            return False
        say(f"{directory} was left by {last}: {why}. This process takes over.")
    return True


def _last(directory: Path) -> _Record | None:
    """The end of the chain: the owner; None when there is none."""
    record = _read(directory / NAME)
    while record is not None and (successor := _read(_after(directory, record.token))) is not None:
        record = successor
    return record


def _is_owner(directory: Path, own: Owner) -> bool:
    last = _last(directory)
    return last is not None and last.token == own.token


def _after(directory: Path, token: str) -> Path:
    return directory / f"{NAME}.after-{token}"


def _read(path: Path) -> _Record | None:
    """None when there is no such file. It is opened for its times, too: NFS asks the server anew only then."""
    try:
        with path.open("rb") as file:
            status, content = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's
        status, content = path.stat(), b""
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError):
        owner = None
    token = owner.token if owner else f"unreadable-{status.st_ino}"
    return _Record(path, token, owner, status.st_uid, status.st_mtime_ns)


def _link(directory: Path, own: Owner, place: Path) -> bool:
    """Put this process's record there, whole, unless there is one."""
    temporary = directory / f"{NAME}.{own.token}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(own), file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, place)
        except FileNotFoundError:  # a new owner tidied up
            return False
        except FileExistsError:  # or it has just been made, and NFS asked a second time since the answer was lost
            there = _read(place)
            return there is not None and there.token == own.token
        except OSError as error:
            raise PreflightError(
                f"{directory} is on a file system without hard links ({error.strerror}), which no lock can be had on; "
                "set run.output_dir to a place on another."
            ) from None
        return True
    finally:
        temporary.unlink(missing_ok=True)


# ---- who is dead ----


def _why_dead(directory: Path, last: _Record, own: Owner, times: Times, say: Callable[[str], None]) -> str | None:
    """Why the owner is dead; None when it has to be looked at again. Raises RunInUseError when it may be alive."""
    owner, patience_seconds = last.owner, times.silent_seconds
    remedy = "wait for it, or give this run another run.name"
    silence_seconds = seconds_since(last.touched_nanoseconds, directory)
    heard = f"last heard of {abs(silence_seconds):,.0f} s {'ago' if silence_seconds >= 0 else 'in the future'}"
    if owner is not None:
        if _is_same_machine(owner, own):
            if not _lives(owner.pid, owner.start_ticks):
                return "that process is gone"
            raise RunInUseError(f"Another process is running in {directory}: {owner}, {heard}; {remedy}.")
        if owner.slurm_job_id is not None and owner.slurm_cluster == own.slurm_cluster:
            if owner.slurm_job_id == own.slurm_job_id and owner.slurm_restart_count < own.slurm_restart_count:
                return "that job was requeued, and this is its next start"
            if last.user_id == os.geteuid() and (ended := _how_slurm_ended(owner.slurm_job_id)):
                return ended
        if owner.host == own.host and owner.boot_id != own.boot_id:
            # The machine was started again; or there are two of the same name, such as localhost.
            patience_seconds = 3 * times.beat_seconds
    if abs(silence_seconds) < patience_seconds:  # below zero: the clock was set back, no matter by how much
        raise RunInUseError(
            f"Another process is running in {directory}: {last}, {heard}; {remedy}, or, if you know it to be dead, "
            f"start again in {patience_seconds - silence_seconds:,.0f} s."
        )
    # An owner that lives touches the file meanwhile, whatever the clocks say.
    listen_seconds = 2 * times.beat_seconds
    say(f"{directory} is of {last}, {heard}; listening for another {listen_seconds:,.0f} s.")
    time.sleep(listen_seconds)
    again = _read(last.path)
    is_silent = again is not None and (again.token, again.touched_nanoseconds) == (last.token, last.touched_nanoseconds)
    return f"it was {heard}" if is_silent else None


def _is_same_machine(owner: Owner, own: Owner) -> bool:
    """Whether the pid of the one says something to the other. Containers are machines of their own here."""
    return (owner.host, owner.boot_id, owner.pid_namespace) == (own.host, own.boot_id, own.pid_namespace)


def _lives(pid: int, start_ticks: int) -> bool:
    """Whether this very process of this machine can still write; a zombie cannot, once its last thread has ended."""
    process = Path("/proc", str(pid))
    try:
        state, start = _state_and_start(process / "stat")
        num_threads = sum(1 for _ in (process / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # /proc hides what other users run (hidepid)
        return False  # it ended between two looks, or is a thread of another
    return start == start_ticks and (state not in "ZX" or num_threads > 1)


def _state_and_start(stat: Path) -> tuple[str, int]:
    fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()  # a name may hold anything
    return fields[0], int(fields[19])


def ask_squeue(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str] | None:
    """What Slurm's queue says; None where there is no Slurm, or its controller does not answer in time."""
    squeue = shutil.which("squeue")
    if squeue is None:
        return None
    command = [squeue, *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _how_slurm_ended(job_id: str) -> str | None:
    """What Slurm says of a job of this user that has ended; None when it has not, or the controller does not answer."""
    done = ask_squeue("-h", "-t", "all", "-j", job_id, "-o", "%T", seconds=_SQUEUE_SECONDS)
    if done is None:
        return None
    if done.returncode != 0:
        return "Slurm knows no such job any more" if "Invalid job id specified" in done.stderr else None
    states = done.stdout.split()  # the number of an array's last task is the array's own: one line for each task
    if not states or not set(states) <= ENDED_JOB_STATES:
        return None
    return f"Slurm says that job is {states[0]}"


# ---- the sign of life ----


def _beat(held: _Held, beat_seconds: float) -> None:
    while not held.is_over.wait(beat_seconds):
        end_if_lost()
        with contextlib.suppress(OSError):  # it may be back for the next beat
            os.utime(held.directory / NAME)
