"""What a run has: the known GPUs, and this machine's or the Slurm allocation's own; figures with their sources.

Memory is what nvidia-smi reports as total. Half-precision figures are dense tensor-core peaks with fp32 accumulation,
and bandwidths are of one direction, from NVIDIA's data sheets (V100, T4, A10, A100, L40S, H100, H200) and the GA102 and
Ada architecture white papers (RTX 3090, 4090). None was measured here.
"""

import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from launch.errors import ConfigError
from launch.free_memory import limit_bytes

MIB = 1 << 20
Interconnect = Literal["nvlink", "pcie"]


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_mib: int
    half_tflops: float
    memory_gb_per_second: float
    nvlink_gb_per_second: float  # one direction, all links; 0: it has none
    pcie_gb_per_second: float  # one direction of 16 lanes
    has_bf16: bool
    smi_name: str  # a regular expression for the name that nvidia-smi gives

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return self.memory_mib * MIB


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-16gb", 16160, 125, 900, 150, 16, False, r"V100.*16GB"),
        Gpu("v100-32gb", 32510, 125, 900, 150, 16, False, r"V100.*32GB"),
        Gpu("t4", 15109, 65, 300, 0, 16, False, r"\bT4\b"),
        Gpu("a10", 22731, 125, 600, 0, 32, True, r"\bA10\b"),
        Gpu("a100-40gb", 40536, 312, 1555, 300, 32, True, r"A100.*40GB"),
        Gpu("a100-80gb", 81251, 312, 2039, 300, 32, True, r"A100.*80GB"),
        Gpu("l40s", 46068, 362, 864, 0, 32, True, r"L40S"),
        Gpu("rtx-3090", 24576, 71, 936, 0, 32, True, r"RTX 3090"),
        Gpu("rtx-4090", 24564, 165, 1008, 0, 32, True, r"RTX 4090"),
        Gpu("h100", 81559, 989, 3350, 450, 64, True, r"H100"),
        Gpu("h200", 143771, 989, 4800, 450, 64, True, r"H200"),
    )
}


CPU = Gpu("CPU", 0, 0, 0, 0, 0, True, "")  # of ranks without a GPU


@dataclass(frozen=True)
class Hardware:
    """What a run would be given."""

    gpu: Gpu
    gpus_per_node: int
    num_nodes: int
    host_memory_bytes: int | None  # of a node; None: not known
    interconnect: Interconnect

    @property
    def num_ranks(self) -> int:
        """One a GPU."""
        return self.gpus_per_node * self.num_nodes


def find_hardware(
    gpu: str | None, gpus: int | None, nodes: int | None, host_memory: str | None, interconnect: str | None
) -> Hardware:
    """What the options say, and for the rest what this machine or the Slurm allocation has.

    Without a word about it, GPUs are joined by PCIe, but those of this machine that are modules (SXM) by NVLink.
    Raises ConfigError for a GPU that is not known, or when none is named and there is none here.
    """
    found: list[str] = []
    if gpu is None:
        found = _gpus_of_this_machine()
        if not found:
            raise ConfigError(f"This machine has no GPU that nvidia-smi knows; name one: --gpu {' | '.join(GPUS)}.")
        known = known_gpu(found[0])
        if known is None:
            raise ConfigError(
                f"This machine's {found[0]} is not known to plan; name the nearest: --gpu {' | '.join(GPUS)}."
            )
        kind, gpus = known, gpus or len(found)
    elif gpu in GPUS:
        kind = GPUS[gpu]
    else:
        raise ConfigError(f"--gpu {gpu} is not known to plan; the known ones are {', '.join(GPUS)}.")
    if interconnect not in (None, "nvlink", "pcie"):
        raise ConfigError(f"--interconnect {interconnect} is not valid; the valid ones are nvlink and pcie.")
    if interconnect == "nvlink" and not kind.nvlink_gb_per_second:
        raise ConfigError(f"--interconnect nvlink: plan has no NVLink figure for a {kind.name}; take pcie.")
    has_nvlink = interconnect == "nvlink" or (interconnect is None and gpu is None and "SXM" in found[0])
    between: Interconnect = "nvlink" if has_nvlink and kind.nvlink_gb_per_second else "pcie"
    gpus = gpus or slurm_number("SLURM_GPUS_ON_NODE") or 1
    nodes = nodes or slurm_number("SLURM_NNODES") or 1
    memory = host_memory_bytes() if host_memory is None else parse_size_bytes("--host-memory", host_memory)
    return Hardware(kind, gpus, nodes, memory, between)


def parse_size_bytes(option: str, text: str) -> int:
    """380GB, 1.5TB, 512GiB. Raises ConfigError for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{option} {text!r} is no size; write 380GB, 512GiB or 1.5TB.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2].upper())))


def _gpus_of_this_machine() -> list[str]:
    """The names that nvidia-smi gives; none where it is not, or finds none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    return names if visible is None else names[: len([number for number in visible.split(",") if number.strip()])]


def known_gpu(name: str) -> Gpu | None:
    """By the name that nvidia-smi and torch give it."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.smi_name, name)), None)


def slurm_number(variable: str) -> int | None:
    """What Slurm says of this allocation; None outside one, and for 0, which is `--mem`'s word for everything."""
    found = re.match(r"\d+", os.environ.get(variable, ""))
    return int(found[0]) if found and int(found[0]) else None


def host_memory_bytes() -> int | None:
    """The least of what the machine has, the limits of its control groups, and what Slurm gives the job of a node.

    None where that is not known.
    """
    limits = []
    if slurm_mib := _slurm_memory_mib():
        limits.append(slurm_mib * MIB)
    with suppress(OSError):  # there is no /proc
        limits.append(limit_bytes())
    return min(limits, default=None)


def _slurm_memory_mib() -> int | None:
    """Of --mem, or of --mem-per-cpu or --mem-per-gpu times what the job has of those on this node."""
    for each, count in (("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"), ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        mib, number = slurm_number(each), slurm_number(count)
        if mib and number:
            return mib * number
    return slurm_number("SLURM_MEM_PER_NODE")
