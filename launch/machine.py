"""Facts of the machine that a rank is on, read once where it starts; launch/machine_findings.py judges them."""

import os
import platform
import re
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from launch import engine as engines
from launch.errors import PreflightError, first_line
from launch.fingerprint import versions
from launch.free_memory import available_bytes
from launch.hardware import host_memory_bytes, slurm_number

SHM = Path("/dev/shm")
_NVIDIA = Path("/proc/driver/nvidia")
_CAP_IPC_LOCK = 1 << 14  # linux/capability.h: whoever has it locks as much as he likes


@dataclass(frozen=True)
class Machine:
    """What one rank finds. None: it has none of it, or that is not known."""

    host: str
    rank: int
    num_ranks: int
    num_local_ranks: int
    versions: dict[str, str]  # of what must be the same on all ranks
    driver: str  # "" where there is none
    precisions: tuple[str, ...]  # that its device computes in
    num_gpus: int  # that torch sees
    num_driver_gpus: int  # that the driver has, seen by torch or not
    num_slurm_gpus: int  # of the job on this node
    hides_gpus: bool  # CUDA_VISIBLE_DEVICES says that torch is to see none
    gpu_name: str | None  # of this rank's own, as all that follows
    gpu_uuid: str | None
    gpu_capability: tuple[int, int] | None
    gpu_total_bytes: int | None
    gpu_free_bytes: int | None
    gpu_fault: str  # what CUDA says of one that cannot be used
    arch_list: tuple[str, ...]  # sm_80, compute_90: what torch was built for
    host_memory_bytes: int | None
    host_available_bytes: int | None
    shm_total_bytes: int | None
    shm_free_bytes: int | None
    memlock_bytes: int | None  # ulimit -l; None: as much as it likes
    has_rdma: bool  # InfiniBand or RoCE


_as_json = TypeAdapter(Machine)


def to_text(machine: Machine) -> str:
    """JSON."""
    return _as_json.dump_json(machine).decode()


def from_text(text: str) -> Machine:
    """The inverse of `to_text`."""
    return _as_json.validate_json(text)


def read_machine() -> Machine:
    """What this process finds; that makes its CUDA context, where there is a GPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = torch.cuda.device_count()
    name = uuid = capability = total_bytes = free_bytes = None
    fault = ""
    if torch.cuda.is_available() and local_rank < num_gpus:
        try:
            properties = torch.cuda.get_device_properties(local_rank)
            name, uuid = properties.name, str(properties.uuid)
            capability = (properties.major, properties.minor)
            free_bytes, total_bytes = torch.cuda.mem_get_info(local_rank)
        except RuntimeError as error:  # another process has it alone, or it has fallen off the bus
            fault = first_line(error)
    shm_total_bytes, shm_free_bytes = room_of(SHM)
    return Machine(
        host=platform.node(),
        rank=int(os.environ.get("RANK", "0")),
        num_ranks=int(os.environ.get("WORLD_SIZE", "1")),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        versions=versions() | _versions_of_cuda(),
        driver=_driver(),
        # Of a GPU of which CUDA tells nothing, nothing more is asked.
        precisions=("fp32",) if fault and capability is None else engines.precisions_of_device(capability),
        num_gpus=num_gpus,
        num_driver_gpus=len(list((_NVIDIA / "gpus").glob("*"))),
        num_slurm_gpus=slurm_number("SLURM_GPUS_ON_NODE") or 0,
        hides_gpus=os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        gpu_name=name,
        gpu_uuid=uuid,
        gpu_capability=capability,
        gpu_total_bytes=total_bytes,
        gpu_free_bytes=free_bytes,
        gpu_fault=fault,
        arch_list=tuple(torch.cuda.get_arch_list()),
        host_memory_bytes=host_memory_bytes(),
        host_available_bytes=_host_available_bytes(),
        shm_total_bytes=shm_total_bytes,
        shm_free_bytes=shm_free_bytes,
        memlock_bytes=memlock_bytes(),
        has_rdma=any(Path("/sys/class/infiniband").glob("*")),
    )


def choose_precision(wanted: str, machine: Machine) -> tuple[str, str]:
    """(fp16 | bf16 | fp32, why). `auto` takes what the device is good at; PreflightError for what it cannot do."""
    device = machine.gpu_name or "a CPU"
    if wanted != "auto":
        if wanted not in machine.precisions:
            raise PreflightError(f"train.precision = {wanted}, which {device} does not do; leave it at auto.")
        return wanted, "the recipe says so"
    if machine.gpu_name is None:
        return "fp32", "there is no GPU"
    if "bf16" in machine.precisions:
        return "bf16", f"{device} has bf16 units"
    if "fp16" in machine.precisions:
        return "fp16", f"{device} has no bf16 units"
    return "fp32", f"{device} has neither bf16 nor fp16 units"


def room_of(file_system: Path) -> tuple[int, int] | tuple[None, None]:
    """(all bytes, those that this user may still take) of the file system that this is on; Nones where it is not."""
    try:
        found = os.statvfs(file_system)
    except OSError:
        return None, None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def memlock_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """How much memory this process may lock, which `ulimit -l` says in kB; None for as much as it likes."""
    with suppress(OSError):
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(encoding="ascii"), re.MULTILINE)
        if found and int(found[1], 16) & _CAP_IPC_LOCK:
            return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def _versions_of_cuda() -> dict[str, str]:
    """What torch was built for, or brought along."""
    found = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        found["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    if dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {name: version for name, version in found.items() if version}


def _driver(place: Path = _NVIDIA) -> str:
    """535.104.05, as in "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ..."; "" for none."""
    with suppress(OSError):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", (place / "version").read_text(encoding="utf-8"))
        return found[0] if found else ""
    return ""


def _host_available_bytes() -> int | None:
    """Not more than Slurm gives the job, where no cgroup holds it to that."""
    limit = host_memory_bytes()
    with suppress(OSError):  # there is no /proc
        return available_bytes() if limit is None else min(available_bytes(), limit)
    return limit
