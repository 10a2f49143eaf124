"""A real Slurm on this machine: a controller, and two nodes whose four GPUs each are there for allocation only.

    python tests/slurm/cluster.py          a shell in it: sinfo, squeue, python -m launch submit ...

A node is a slurmd in a PID and UTS namespace. So it has a host name and processes of its own, and a killed node takes
all of them along, as a power cut does.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("node1", "node2")
GPUS_PER_NODE, CPUS_PER_NODE = 4, 8
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "unshare", "setpriv")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where daemons are
NAMESPACES = ("unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc")
WITH_US = ("setpriv", "--pdeathsig", "KILL")  # whatever ends the tests ends the daemons
# cred_expire is also how long a requeued job waits, and must: its nodes take it for the start that is over.
# Jobs have numbers of their own, since their ports are made of them. KillWait is Slurm's own; less than 5 s is 5 s.
CONFIGURATION = """\
ClusterName=cairn
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=6
StateSaveLocation={directory}/spool
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=sudden Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no such cluster here; empty when there can be."""
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (tests/slurm/install.sh, as root on Debian)"
    if os.geteuid() != 0:
        return "the nodes' namespaces and devices need root"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return f"a node is a namespace, but {tried.stderr.strip()}" if tried.returncode else ""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Raises AssertionError when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: not {what}"
        time.sleep(0.1)


@dataclass
class Cluster:
    """The running daemons, whose files are all in one directory."""

    directory: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str | Path, code: int = 0, cwd: Path | None = None) -> str:
        """What a command prints, both streams. Its exit code must be `code`."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, Reason, Restarts, ExitCode, NodeList."""
        words = self.run("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def occupy(self, num_nodes: int = len(NODES), seconds: int = 1) -> str:
        """Submit a job of high priority that wants all GPUs of so many nodes; its id."""
        wanted = (f"--nodes={num_nodes}", f"--gpus-per-node={GPUS_PER_NODE}", f"--wrap=sleep {seconds}")
        return self.run("sbatch", "--parsable", "--partition=high", "--output=/dev/null", *wanted).strip()

    def states(self) -> list[str]:
        """Of the nodes, in their order."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=high", "--format=%T").split()

    def start_node(self, name: str) -> None:
        """Power on; it is in service a little later."""
        init = f"hostname {name}; slurmd -D -N {name} & wait"  # bash, which reaps orphans
        with (self.directory / f"{name}.out").open("ab") as out:
            self.nodes[name] = subprocess.Popen(
                [*WITH_US, *NAMESPACES, "bash", "-c", init], env=self.environment, stdout=out, stderr=out
            )

    def cut_power(self, name: str) -> None:
        """Every process of the node is gone when this returns."""
        process = self.nodes.pop(name)
        for init in _children(process.pid):
            os.kill(init, signal.SIGKILL)
        process.wait()  # the kernel ends all the others first

    @contextmanager
    def silenced(self, name: str) -> Iterator[None]:
        """The node's slurmd does not answer meanwhile, but what it has started runs on."""
        (init,) = _children(self.nodes[name].pid)
        (slurmd,) = (pid for pid in _children(init) if Path(f"/proc/{pid}/comm").read_text() == "slurmd\n")
        os.kill(slurmd, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(slurmd, signal.SIGCONT)

    @contextmanager
    def configured(self, **values: object) -> Iterator[None]:
        """Other values of slurm.conf meanwhile."""
        path = self.directory / "slurm.conf"
        before = path.read_text()
        lines = [line for line in before.splitlines() if line.partition("=")[0] not in values]
        path.write_text("\n".join([*lines, *(f"{key}={value}" for key, value in values.items())]) + "\n")
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            path.write_text(before)
            self.run("scontrol", "reconfigure")

    def last_words(self) -> str:
        """The ends of all daemons' logs."""
        paths = sorted([*self.directory.glob("*.log"), *self.directory.glob("*.out")])
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Bring the cluster up; whatever happens meanwhile, no process and no mount of it is left afterwards."""
    mounts = _mounts()
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 108 bytes
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    with ExitStack() as down:  # the last one first
        down.callback(_check_nothing_is_left, directory, mounts)
        down.callback(shutil.rmtree, directory)
        _write_configuration(directory)
        ours = {"PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf"), "CUDA_VISIBLE_DEVICES": ""}
        # For jobs: a rank that is alone on its node has more threads, which on some CPUs multiply otherwise.
        ours["OMP_NUM_THREADS"] = "1"
        cluster = Cluster(directory, outside | ours)
        files = [f"--{key}-file={directory}/munge{key}" for key in ("key", "pid", "log", "seed")]
        down.enter_context(_daemon(cluster, "munged", "-F", "--force", f"--socket={directory}/munge.socket", *files))
        wait_for((directory / "munge.socket").exists, 20, "munged up")
        down.enter_context(_daemon(cluster, "slurmctld", "-D"))
        down.callback(lambda: [cluster.cut_power(name) for name in list(cluster.nodes)])
        for name in NODES:
            cluster.start_node(name)
        try:
            wait_for(lambda: _is_idle(cluster), 60, "two idle nodes")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.last_words()}") from None
        yield cluster


def _is_idle(cluster: Cluster) -> bool:
    try:
        return cluster.states() == ["idle"] * len(NODES)
    except AssertionError:  # the controller is not up yet
        return False


def _write_configuration(directory: Path) -> None:
    """slurm.conf, gres.conf and what they name."""
    key = directory / "mungekey"
    key.touch(0o600)
    key.write_bytes(os.urandom(64))
    for number in range(GPUS_PER_NODE):
        os.mknod(directory / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null is
    with ExitStack() as probes:
        servers = [probes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(1 + len(NODES))]
        port, *node_ports = (server.getsockname()[1] for server in servers)
    lines = CONFIGURATION.format(directory=directory, port=port).splitlines()
    for name, node_port in zip(NODES, node_ports, strict=True):
        (directory / "spool" / name).mkdir(parents=True)
        size = f"CPUs={CPUS_PER_NODE} RealMemory=8000 Gres=gpu:{GPUS_PER_NODE}"
        lines.append(f"NodeName={name} NodeAddr=127.0.0.1 Port={node_port} {size}")
    (directory / "slurm.conf").write_text("\n".join(lines) + "\n")
    (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-{GPUS_PER_NODE - 1}] Flags=opencl_env\n")


@contextmanager
def _daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    """In the foreground; killed at the end, since nothing that it would still write is needed."""
    with (cluster.directory / f"{command[0]}.out").open("ab") as out:
        process = subprocess.Popen([*WITH_US, *command], env=cluster.environment, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _check_nothing_is_left(directory: Path, mounts: str) -> None:
    wait_for(lambda: not _processes_with(str(directory)), 5, f"without processes of {directory}")
    assert _mounts() == mounts, "mounts of the cluster are left"


def _processes_with(text: str) -> list[int]:
    """Those in whose environment it stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has just ended
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with slurm_cluster() as here:
        subprocess.run([os.environ.get("SHELL", "bash"), *sys.argv[1:]], env=here.environment, check=False)
