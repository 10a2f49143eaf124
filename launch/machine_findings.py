"""What is wrong with a machine, or with machines that are to train together: facts -> findings, and nothing is read."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from launch.errors import PreflightError
from launch.findings import Check, Finding, after
from launch.hardware import slurm_number
from launch.machine import Machine, choose_precision, read_machine
from launch.table import format_bytes

# Of a channel from one GPU to another: a page, and NCCL's default buffers of its protocols Simple, LL128 and LL
# (src/include/device.h). When it fails, NCCL itself names this size: 9637888.
_NCCL_CONNECTION_BYTES = 4096 + (4 << 20) + 8 * 640 * 120 * 8 + 8 * 512 * 8 * 16
_NUM_CHANNELS = 2  # the least that NCCL takes; assumed
_NUM_COMMUNICATORS = 2  # torch's of the world, and DeepSpeed's own
# Of locked memory. Usual limits are 64 kB and 8 MB, which is too little, or none at all; in between it is not known.
_RDMA_BYTES = 1_000_000_000
# A CUDA context takes up to 0.6 GB of what is counted as used, and this process has one by now.
_CONTEXT_BYTES = 1_500_000_000
_NUM_NAMED_HOSTS = 4
_ONLY_NOTED = ("python",)  # no number depends on it, and nothing that ranks send each other

# Of one machine, and of all that train together.
OfOne = Callable[[Machine], Iterable[Finding]]
OfAll = Callable[[Sequence[Machine]], Iterable[Finding]]


def checks_of_machine(precision: str) -> list[Check]:
    """Outside a job, where no rank is: as if it had been launched with a rank on each GPU.

    Without a GPU it may be a login node, of which nothing is asked.
    """
    machine = read_machine()
    if not machine.num_gpus:
        return [lambda: find_unseen_gpus(machine)]
    num_nodes = slurm_number("SLURM_NNODES") or 1
    num_gpus = machine.num_gpus
    launched = replace(machine, num_local_ranks=num_gpus, num_ranks=num_gpus * num_nodes)
    return checks_of_ranks([launched], precision)


def checks_of_ranks(machines: Sequence[Machine], precision: str) -> list[Check]:
    """Of all ranks, given by rank; `precision` is the recipe's. What several ranks find is said once."""
    of_each: list[OfOne] = [
        find_gpu_fault,
        find_missing_kernels,
        functools.partial(find_precision, precision),
        find_unseen_gpus,
        find_small_shm,
        find_little_locked_memory,
        find_used_gpu_memory,
    ]
    of_all: list[OfAll] = [
        find_unlike_versions,
        functools.partial(find_unlike_devices, precision),
        find_shared_gpus,
        find_unlike_gpus,
    ]
    checks: list[Check] = [functools.partial(_said_once, machines, find) for find in of_each]
    checks += [functools.partial(find, machines) for find in of_all]
    return [after(functools.partial(_said_once, machines, find_too_many_processes), checks)]


# ---- of one machine --------------------------------------------------------------------------------------------------


def find_too_many_processes(machine: Machine) -> Iterator[Finding]:
    """They would have to share GPUs. No GPU at all means CPU."""
    if 0 < machine.num_gpus < machine.num_local_ranks:
        num_fitting = machine.num_gpus * (machine.num_ranks // machine.num_local_ranks or 1)
        yield Finding(
            f"{machine.num_local_ranks} processes were launched but this machine has {machine.num_gpus} GPU(s); "
            f"add --num_processes {num_fitting} to accelerate launch."
        )


def find_gpu_fault(machine: Machine) -> Iterator[Finding]:
    """CUDA does not give it to this process."""
    if machine.gpu_fault:
        name = machine.gpu_name or "the GPU"
        yield Finding(
            f"{name} cannot be used: {machine.gpu_fault}; see with nvidia-smi who has it, or leave it out with "
            "CUDA_VISIBLE_DEVICES."
        )


def _has_known_device(machine: Machine) -> bool:
    """Not so of a GPU of which CUDA tells nothing but a fault."""
    return machine.gpu_name is not None or not machine.gpu_fault


def find_missing_kernels(machine: Machine) -> Iterator[Finding]:
    """Of this torch, for this GPU. V100 is the one that people have: README says the same of it."""
    capability = machine.gpu_capability
    if capability is None or has_kernels(machine.arch_list, capability):
        return
    release = _release(machine)
    cuda = tuple(int(number) for number in re.findall(r"\d+", machine.versions.get("CUDA", "")))
    if (5, 0) <= capability < (7, 5):
        remedy = (
            "the CUDA 12.6 builds have them, up to torch 2.14: "
            f'make run TORCH="torch=={release} --index-url https://download.pytorch.org/whl/cu126", once'
        )
    elif capability >= (7, 5) and cuda < (12, 9):
        remedy = f'PyTorch\'s default builds have them: make run TORCH="torch=={release}", once'
    else:
        remedy = "https://pytorch.org/get-started/locally/ says which build has them"
    yield Finding(
        f"torch {machine.versions['torch']} has no kernels for {machine.gpu_name} (sm_{capability[0]}{capability[1]}), "
        f"but for {', '.join(machine.arch_list)}; {remedy}."
    )


def has_kernels(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability. True when it cannot be told.

    Machine code (sm_) runs on its own minor version and later ones of its major one; PTX (compute_) is compiled for any
    later one. With an `a` it runs on its own architecture only, with an `f` on later ones of its family.
    """
    known = [found for arch in arch_list if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch))]
    for kind, major, minor, suffix in (found.groups() for found in known):
        built_for = (int(major), int(minor))
        if suffix == "a":
            runs = capability == built_for
        elif kind == "sm" or suffix == "f":
            runs = capability[0] == built_for[0] and capability[1] >= built_for[1]
        else:
            runs = capability >= built_for
        if runs:
            return True
    return not known


def find_precision(wanted: str, machine: Machine) -> Iterator[Finding]:
    """One that its device does not compute in."""
    if not _has_known_device(machine):
        return
    try:
        choose_precision(wanted, machine)
    except PreflightError as error:
        yield Finding(str(error))


def find_unseen_gpus(machine: Machine) -> Iterator[Finding]:
    """The driver has GPUs, torch sees none, and a run would take the CPU. That stops a job that was given some."""
    if machine.num_gpus or not machine.num_driver_gpus:
        return
    if machine.hides_gpus:
        why = "CUDA_VISIBLE_DEVICES hides them"
    elif "CUDA" not in machine.versions:
        why = f'it is a build for CPUs; install another, as with make run TORCH="torch=={_release(machine)}"'
    else:
        why = (
            f"it needs a driver for CUDA {machine.versions['CUDA']}, which {machine.driver or 'this one'} may be too "
            "old for, and the job has to be given GPUs; python -c 'import torch; torch.cuda.init()' says more"
        )
    yield Finding(
        f"There are {machine.num_driver_gpus} NVIDIA GPU(s), of which torch {machine.versions['torch']} sees none, so "
        f"that it trains on the CPU: {why}.",
        stops=bool(machine.num_slurm_gpus) and not machine.hides_gpus,
    )


def find_small_shm(machine: Machine) -> Iterator[Finding]:
    """What NCCL may take of /dev/shm where GPUs of a node have no other way: a container gives 64 MB.

    A ring has a connection to the next rank; a tree goes along the same ranks in both directions.
    """
    num_ranks = machine.num_local_ranks
    if machine.gpu_name is None or num_ranks < 2 or machine.shm_free_bytes is None:
        return
    num_connections = 2 if num_ranks == 2 else 2 * num_ranks - 1
    needed_bytes = num_connections * _NUM_CHANNELS * _NUM_COMMUNICATORS * _NCCL_CONNECTION_BYTES
    if machine.shm_free_bytes < needed_bytes:
        yield Finding(
            f"/dev/shm has {format_bytes(machine.shm_free_bytes)} free, and NCCL takes up to some "
            f"{format_bytes(needed_bytes)} for {num_ranks} ranks a node whose GPUs do not reach each other directly; "
            "when it fails with a shared memory segment, give the container more: docker run --shm-size=1g.",
            stops=False,
        )


def find_little_locked_memory(machine: Machine) -> Iterator[Finding]:
    """`ulimit -l` is about NCCL between nodes: what a network card is to read has to be locked, and is counted.

    Host memory that DeepSpeed pins for offload is not: torch has it from cudaHostAlloc, where NVIDIA's driver locks the
    pages without the kernel's count. (Only DS_PIN_MEMORY_BACKEND=native, DeepSpeed's own, calls mlock.)
    """
    is_on_several_nodes = machine.num_ranks > machine.num_local_ranks
    if machine.gpu_name is None or not is_on_several_nodes or not machine.has_rdma or machine.memlock_bytes is None:
        return
    if machine.memlock_bytes < _RDMA_BYTES:
        yield Finding(
            f"ulimit -l is {format_bytes(machine.memlock_bytes)}, and for InfiniBand NCCL locks more memory than that; "
            'when it fails with "Cannot allocate memory", have the limit lifted: LimitMEMLOCK=infinity for slurmd, or '
            "docker run --ulimit memlock=-1.",
            stops=False,
        )


def find_used_gpu_memory(machine: Machine) -> Iterator[Finding]:
    """Somebody else's, which the run will not have."""
    if machine.gpu_free_bytes is None or machine.gpu_total_bytes is None:
        return
    used_bytes = machine.gpu_total_bytes - machine.gpu_free_bytes
    if used_bytes > max(_CONTEXT_BYTES, machine.gpu_total_bytes // 20):
        yield Finding(
            f"{format_bytes(used_bytes)} of the {format_bytes(machine.gpu_total_bytes)} of {machine.gpu_name} are in "
            "use already, by another process or by what is left of one; nvidia-smi names it.",
            stops=False,
        )


# ---- of all that train together --------------------------------------------------------------------------------------


def find_unlike_versions(machines: Sequence[Machine]) -> Iterator[Finding]:
    """Ranks with other libraries send each other other things, and hang; a driver or Python may differ."""
    names = dict.fromkeys(name for machine in machines for name in machine.versions)
    texts = {name: _differing(machines, name, functools.partial(_version, name)) for name in names}
    noted = [texts.pop(name, "") for name in _ONLY_NOTED]
    noted.append(_differing(machines, "the driver", lambda machine: machine.driver or "none"))
    unlike = texts.values()
    if any(unlike):
        listed = "; ".join(filter(None, unlike))
        yield Finding(f"The ranks' software is not the same: {listed}; let them all use one environment.")
    if any(noted):
        yield Finding(f"The ranks differ in what may differ: {'; '.join(filter(None, noted))}.", stops=False)


def find_unlike_devices(wanted: str, machines: Sequence[Machine]) -> Iterator[Finding]:
    """Some have a GPU and some none, or `auto` is another precision on each."""
    without = _differing(machines, "the device", lambda machine: "a GPU" if machine.num_gpus else "the CPU")
    if without:
        yield Finding(f"Some ranks have no GPU: {without}; leave those machines out, or see what they lack.")
        return
    known = [machine for machine in machines if _has_known_device(machine)]
    if wanted != "auto":
        return
    chosen = _differing(known, "auto", lambda machine: choose_precision("auto", machine)[0])
    if chosen:
        common = [name for name in ("bf16", "fp16", "fp32") if all(name in machine.precisions for machine in known)]
        yield Finding(
            f"The ranks would train in different precisions: {chosen}; set train.precision={common[0]}, which all can."
        )


def find_shared_gpus(machines: Sequence[Machine]) -> Iterator[Finding]:
    """NCCL refuses a GPU that two ranks have."""
    by_gpu: dict[str, list[Machine]] = {}
    for machine in machines:
        if machine.gpu_uuid is not None:
            by_gpu.setdefault(machine.gpu_uuid, []).append(machine)
    for sharing in by_gpu.values():
        if len(sharing) > 1:
            yield Finding(
                f"{_where(sharing, machines)} have the same {sharing[0].gpu_name}; start accelerate launch once a "
                "machine (srun --ntasks-per-node=1), which gives each of its processes its own GPU."
            )


def find_unlike_gpus(machines: Sequence[Machine]) -> Iterator[Finding]:
    """The smallest has to hold its share, and all wait for the slowest."""
    with_gpu = [machine for machine in machines if machine.gpu_total_bytes is not None]
    unlike = _differing(with_gpu, "the GPU", lambda m: f"{m.gpu_name} of {format_bytes(m.gpu_total_bytes or 0)}")
    if unlike:
        smallest = min(machine.gpu_total_bytes or 0 for machine in with_gpu)
        yield Finding(
            f"The GPUs differ: {unlike}; every rank holds as much, so that {format_bytes(smallest)} is what counts.",
            stops=False,
        )


# ---- who it is -------------------------------------------------------------------------------------------------------


def _said_once(machines: Sequence[Machine], find: OfOne) -> list[Finding]:
    """What each finds of itself; who it is, unless that is everyone."""
    found: dict[Finding, list[Machine]] = {}
    for machine in machines:
        for finding in find(machine):
            found.setdefault(finding, []).append(machine)
    is_one_host = len({machine.host for machine in machines}) == 1
    return [
        finding
        if is_one_host and len(some) == len(machines)
        else replace(finding, sentence=f"{_where(some, machines)}: {finding.sentence}")
        for finding, some in found.items()
    ]


def _differing(machines: Sequence[Machine], what: str, value_of: Callable[[Machine], str]) -> str:
    """As in: torch is 2.13.0 on n1 and 2.12.0 on n2. Nothing when it is the same everywhere."""
    by_value: dict[str, list[Machine]] = {}
    for machine in machines:
        by_value.setdefault(value_of(machine), []).append(machine)
    if len(by_value) < 2:
        return ""
    return f"{what} is " + " and ".join(f"{value} on {_where(some, machines)}" for value, some in by_value.items())


def _where(some: Sequence[Machine], machines: Sequence[Machine]) -> str:
    """As in: n1 and n2; or ranks 0, 2 of n1, where the others of that host are not meant."""
    names = []
    for host in dict.fromkeys(machine.host for machine in some):
        ranks = [machine.rank for machine in some if machine.host == host]
        is_whole = len(ranks) == sum(machine.host == host for machine in machines)
        word = "rank" if len(ranks) == 1 else "ranks"
        names.append(host if is_whole else f"{word} {', '.join(map(str, ranks))} of {host}")
    if len(names) > _NUM_NAMED_HOSTS:
        names[_NUM_NAMED_HOSTS:] = [f"{len(names) - _NUM_NAMED_HOSTS} more"]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _version(name: str, machine: Machine) -> str:
    return machine.versions.get(name, "missing")


def _release(machine: Machine) -> str:
    return machine.versions["torch"].partition("+")[0]
