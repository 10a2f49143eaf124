"""What is wrong with a machine, or with machines that are to train together, before any of them starts NCCL or gloo."""

import ctypes
import errno
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, World, run_ranks, start_ranks
from typer.testing import CliRunner

import train
from launch import fingerprint, runs
from launch.__main__ import app
from launch.errors import ConfigError, LaunchError, PreflightError
from launch.findings import Finding, collect
from launch.machine import Machine, choose_precision, from_text, memlock_bytes, read_machine, room_of, to_text
from launch.machine_findings import (
    checks_of_ranks,
    find_gpu_fault,
    find_little_locked_memory,
    find_missing_kernels,
    find_small_shm,
    find_too_many_processes,
    find_unseen_gpus,
    find_used_gpu_memory,
    has_kernels,
)
from launch.meeting import agree, gather_texts, meet

GIB = 1 << 30
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
A100 = Machine(
    host="n1",
    rank=0,
    num_ranks=1,
    num_local_ranks=1,
    versions={"python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2", "CUDA": "13.0", "NCCL": "2.29.3"},
    driver="580.65.06",
    precisions=("fp32", "bf16", "fp16"),
    num_gpus=1,
    num_driver_gpus=1,
    num_slurm_gpus=0,
    hides_gpus=False,
    gpu_name="A100",
    gpu_uuid="a",
    gpu_capability=(8, 0),
    gpu_total_bytes=40 * GIB,
    gpu_free_bytes=39 * GIB,
    gpu_fault="",
    arch_list=CU130,
    host_memory_bytes=400 * GIB,
    host_available_bytes=300 * GIB,
    shm_total_bytes=200 * GIB,
    shm_free_bytes=200 * GIB,
    memlock_bytes=None,
    has_rdma=True,
)
V100 = replace(A100, gpu_name="V100", gpu_capability=(7, 0), precisions=("fp32", "fp16"), arch_list=CU126)
NO_GPU = replace(
    A100,
    precisions=("fp32", "bf16"),
    num_gpus=0,
    num_driver_gpus=0,
    gpu_name=None,
    gpu_uuid=None,
    gpu_capability=None,
    gpu_total_bytes=None,
    gpu_free_bytes=None,
)


def ranks(*kinds: Machine, per_host: int = 1) -> list[Machine]:
    """A job of these, so many a host: n1, n2, ..., each rank with its own GPU."""
    return [
        replace(
            kind,
            host=f"n{1 + rank // per_host}",
            rank=rank,
            num_ranks=len(kinds),
            num_local_ranks=per_host,
            num_gpus=per_host if kind.num_gpus else 0,
            gpu_uuid=f"uuid {rank}" if kind.num_gpus else None,
        )
        for rank, kind in enumerate(kinds)
    ]


def findings(machines: Sequence[Machine], precision: str = "auto") -> list[tuple[bool, str]]:
    return [(finding.stops, finding.sentence) for finding in collect(checks_of_ranks(machines, precision))]


def only(found: Iterator[Finding] | list[Finding], *, stops: bool) -> str:
    (finding,) = found
    assert finding.stops == stops and finding.sentence.endswith(".") and "\n" not in finding.sentence
    return finding.sentence


# ---- of one machine ----


def test_a_machine_with_nothing_wrong() -> None:
    assert findings(ranks(A100)) == findings(ranks(*[V100] * 4, per_host=2)) == findings(ranks(NO_GPU, NO_GPU)) == []
    here = read_machine()
    assert from_text(to_text(here)) == here and not any(stops for stops, _ in findings([here]))
    assert here.versions["torch"].startswith("2.") and here.host_available_bytes is not None
    assert 0 < here.host_available_bytes <= (here.host_memory_bytes or 0)


@pytest.mark.parametrize(
    ("arch_list", "capability", "runs_there"),
    [
        (CU126, (7, 0), True),
        (CU130, (7, 0), False),
        (CU130, (7, 5), True),
        (CU130, (8, 9), True),  # of a later minor version
        (("sm_86", "sm_90"), (8, 0), False),  # of an earlier one
        (("sm_80",), (9, 0), False),  # of another major one
        (("sm_90", "compute_90"), (12, 0), True),  # PTX
        (("sm_90", "compute_90"), (8, 0), False),
        (CU130, (12, 1), True),
        (CU130, (10, 3), True),
        (CU130, (13, 0), True),
        (("sm_90a", "compute_90a"), (10, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100f", "compute_100f"), (10, 3), True),
        (("compute_100f",), (12, 0), False),
        ((), (7, 0), True),  # not known
        (("gfx90a", "gfx942"), (9, 4), True),  # of AMD
    ],
)
def test_code_of_which_architectures_runs_on_which_gpu(
    arch_list: tuple[str, ...], capability: tuple[int, int], runs_there: bool
) -> None:
    assert has_kernels(arch_list, capability) == runs_there


def test_a_v100_is_told_the_build_that_the_readme_names() -> None:
    said = only(list(find_missing_kernels(replace(V100, arch_list=CU130))), stops=True)
    assert said.startswith("torch 2.13.0 has no kernels for V100 (sm_70), but for sm_75, sm_80, ")
    (command,) = re.findall(r"make run TORCH=\"[^\"]+\"", said)
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    command = command.replace("==2.13.0", f"=={pinned}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{command}`, once" in readme and "do, up to torch 2.14:" in readme and "up to torch 2.14: make" in said


def test_other_gpus_without_kernels_are_told_another_build() -> None:
    blackwell = replace(A100, gpu_capability=(12, 0), arch_list=CU126, versions=A100.versions | {"CUDA": "12.6"})
    assert 'default builds have them: make run TORCH="torch==2.13.0", once' in only(
        list(find_missing_kernels(blackwell)), stops=True
    )
    kepler = replace(A100, gpu_capability=(3, 5))
    assert "https://pytorch.org/get-started/locally/" in only(list(find_missing_kernels(kepler)), stops=True)
    assert list(find_missing_kernels(NO_GPU)) == []


@pytest.mark.parametrize(
    ("wanted", "machine", "chosen", "why"),
    [
        ("auto", A100, "bf16", "A100 has bf16 units"),
        ("auto", V100, "fp16", "V100 has no bf16 units"),
        ("auto", replace(V100, gpu_name="P40", precisions=("fp32",)), "fp32", "P40 has neither bf16 nor fp16 units"),
        ("auto", NO_GPU, "fp32", "there is no GPU"),
        ("fp16", A100, "fp16", "the recipe says so"),
        ("bf16", NO_GPU, "bf16", "the recipe says so"),
        ("bf16", V100, None, "train.precision = bf16, which V100 does not do; leave it at auto."),
        ("fp16", NO_GPU, None, "train.precision = fp16, which a CPU does not do; leave it at auto."),
    ],
)
def test_the_precision_and_why(wanted: str, machine: Machine, chosen: str | None, why: str) -> None:
    if chosen is None:
        with pytest.raises(PreflightError, match=f"^{re.escape(why)}$"):
            choose_precision(wanted, machine)
        assert findings([machine], wanted) == [(True, why)]
    else:
        assert choose_precision(wanted, machine) == (chosen, why)


def test_more_processes_than_gpus_and_nothing_else_that_follows_from_it() -> None:
    crowded = [replace(machine, num_gpus=2) for machine in ranks(*[A100] * 8, per_host=4)]
    crowded[2:4] = [replace(machine, gpu_name=None, precisions=("fp32",)) for machine in crowded[2:4]]
    sentence = "4 processes were launched but this machine has 2 GPU(s); add --num_processes 4 to accelerate launch."
    assert findings(crowded) == [(True, f"n1 and n2: {sentence}")]
    assert not list(find_too_many_processes(replace(NO_GPU, num_local_ranks=4)))


def test_a_gpu_that_cuda_does_not_give() -> None:
    busy = replace(A100, gpu_free_bytes=None, gpu_fault="CUDA error: all CUDA-capable devices are busy")
    said = only(list(find_gpu_fault(busy)), stops=True)
    assert said.startswith("A100 cannot be used: CUDA error: all CUDA-capable devices are busy; see with nvidia-smi")


@pytest.mark.parametrize(
    ("changes", "stops", "part"),
    [
        ({"versions": {"torch": "2.13.0+cpu"}}, False, 'for CPUs; install another, as with make run TORCH="torch==2.'),
        ({}, False, "it needs a driver for CUDA 13.0, which 580.65.06 may be too old for"),
        ({"num_slurm_gpus": 4}, True, "There are 4 NVIDIA GPU(s), of which torch 2.13.0 sees none"),
        ({"num_slurm_gpus": 4, "hides_gpus": True}, False, "CUDA_VISIBLE_DEVICES hides them."),
    ],
)
def test_gpus_that_torch_does_not_see(changes: dict[str, Any], stops: bool, part: str) -> None:
    assert part in only(list(find_unseen_gpus(replace(NO_GPU, num_driver_gpus=4, **changes))), stops=stops)


def test_shared_memory_that_nccl_may_need() -> None:
    container = replace(A100, shm_free_bytes=64 << 20)
    assert not list(find_small_shm(container)), "a rank alone has nobody to share with"
    said = only(list(find_small_shm(replace(container, num_local_ranks=4))), stops=False)
    assert said.startswith("/dev/shm has 67.1 MB free, and NCCL takes up to some 270 MB for 4 ranks a node")
    assert list(find_small_shm(replace(container, num_local_ranks=2)))
    for enough in ({"shm_free_bytes": GIB}, {"shm_free_bytes": None}, {"gpu_name": None}):
        assert not list(find_small_shm(replace(container, num_local_ranks=8, **enough)))  # type: ignore[arg-type]


def test_locked_memory_matters_between_nodes_with_infiniband() -> None:
    small = replace(A100, memlock_bytes=8 << 20, num_ranks=8, num_local_ranks=4)
    assert "ulimit -l is 8.39 MB, and for InfiniBand NCCL " in only(list(find_little_locked_memory(small)), stops=False)
    for fine in ({"memlock_bytes": None}, {"num_ranks": 4}, {"has_rdma": False}, {"gpu_name": None}):
        assert not list(find_little_locked_memory(replace(small, **fine)))  # type: ignore[arg-type]


def test_gpu_memory_that_is_in_use_already() -> None:
    assert not list(find_used_gpu_memory(A100)), "a CUDA context is this process's own"
    said = only(list(find_used_gpu_memory(replace(A100, gpu_free_bytes=30 * GIB))), stops=False)
    assert said.startswith("10.7 GB of the 42.9 GB of A100 are in use already")


# ---- of all that train together ----


def test_other_versions_stop_and_are_named_host_by_host() -> None:
    older = replace(A100, versions=A100.versions | {"torch": "2.12.1", "NCCL": "2.27.3"})
    without = replace(A100, versions={name: v for name, v in A100.versions.items() if name != "peft"})
    assert findings(ranks(A100, A100, older, without, per_host=2)) == [
        (
            True,
            "The ranks' software is not the same: torch is 2.13.0 on n1 and rank 3 of n2 and 2.12.1 on rank 2 of n2; "
            "peft is 0.21.2 on n1 and rank 2 of n2 and missing on rank 3 of n2; NCCL is 2.29.3 on n1 and rank 3 of n2 "
            "and 2.27.3 on rank 2 of n2; let them all use one environment.",
        )
    ]


def test_another_driver_or_python_is_only_noted() -> None:
    other = replace(A100, driver="575.51.03", versions=A100.versions | {"python": "3.12.1"})
    assert findings(ranks(A100, other)) == [
        (
            False,
            "The ranks differ in what may differ: python is 3.11.7 on n1 and 3.12.1 on n2; the driver is 580.65.06 on "
            "n1 and 575.51.03 on n2.",
        )
    ]


def test_a_rank_without_a_gpu_among_others() -> None:
    (found,) = findings(ranks(A100, NO_GPU))
    assert found == (
        True,
        "Some ranks have no GPU: the device is a GPU on n1 and the CPU on n2; leave those machines out, or see what "
        "they lack.",
    )


def test_auto_that_would_be_two_precisions() -> None:
    mixed = ranks(A100, replace(V100, arch_list=CU126))
    stopping = [sentence for stops, sentence in findings(mixed) if stops]
    assert stopping == [
        "The ranks would train in different precisions: auto is bf16 on n1 and fp16 on n2; set train.precision=fp16, "
        "which all can."
    ]
    assert not any(stops for stops, _ in findings(mixed, "fp16"))
    assert findings(mixed, "bf16")[0] == (True, "n2: train.precision = bf16, which V100 does not do; leave it at auto.")


def test_ranks_that_share_a_gpu() -> None:
    sharing = [replace(machine, gpu_uuid="one") for machine in ranks(A100, A100, per_host=2)]
    ((stops, said),) = findings(sharing)
    assert stops and said.startswith("n1 have the same A100;")


def test_gpus_that_differ_are_noted_with_the_smallest() -> None:
    larger = replace(A100, gpu_total_bytes=80 * GIB, gpu_free_bytes=79 * GIB)
    assert findings(ranks(larger, A100)) == [
        (
            False,
            "The GPUs differ: the GPU is A100 of 85.9 GB on n1 and A100 of 42.9 GB on n2; every rank holds as much, so "
            "that 42.9 GB is what counts.",
        )
    ]


def test_what_many_hosts_find_is_said_once() -> None:
    everyone = [replace(V100, arch_list=CU130)] * 12
    ((_, said),) = findings(ranks(*everyone, per_host=2))
    assert said.startswith("n1, n2, n3, n4 and 2 more: torch 2.13.0 has no kernels for V100")
    ((_, said),) = findings(ranks(*everyone, per_host=12))
    assert said.startswith("torch 2.13.0 has no kernels for V100"), "one machine needs no name"
    first, second = ranks(A100, A100, per_host=2)
    ((_, said),) = findings([first, replace(second, gpu_fault="out of memory")])
    assert said.startswith("rank 1 of n1: A100 cannot be used: out of memory;")


def test_a_gpu_of_which_cuda_tells_nothing_is_one_finding() -> None:
    """It is no CPU, with precisions of its own."""
    first, second = ranks(A100, A100, per_host=2)
    lost = replace(
        second,
        precisions=("fp32",),
        gpu_name=None,
        gpu_uuid=None,
        gpu_capability=None,
        gpu_total_bytes=None,
        gpu_free_bytes=None,
        gpu_fault="CUDA error: unknown error",
    )
    for precision in ("auto", "bf16"):
        ((stops, said),) = [
            (found.stops, found.sentence) for found in collect(checks_of_ranks([first, lost], precision))
        ]
        assert stops and said.startswith("rank 1 of n1: the GPU cannot be used: CUDA error: unknown error;")


# ---- of real conditions ----


def in_a_fork(function: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_a_limit_of_locked_memory_is_read_where_the_kernel_keeps_to_it() -> None:
    limit = 1 << 20

    def is_held_to_it() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        if os.geteuid() == 0:
            os.setuid(65534)  # root locks what it likes
        libc = ctypes.CDLL(None, use_errno=True)
        memory = ctypes.create_string_buffer(2 * limit)
        is_refused = libc.mlock(memory, len(memory)) != 0 and ctypes.get_errno() == errno.ENOMEM
        return is_refused and memlock_bytes() == limit

    def locks_what_it_likes() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        libc = ctypes.CDLL(None, use_errno=True)
        memory = ctypes.create_string_buffer(2 * limit)
        return (libc.mlock(memory, len(memory)) == 0) == (memlock_bytes() is None)

    assert in_a_fork(is_held_to_it) and in_a_fork(locks_what_it_likes)


def test_the_room_of_a_small_shared_memory(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(tmp_path).encode(), b"tmpfs", 0, b"size=64m") != 0:
        pytest.skip(f"no mount here: {os.strerror(ctypes.get_errno())}")
    try:
        (tmp_path / "taken").write_bytes(bytes(1 << 20))
        assert room_of(tmp_path) == (64 << 20, 63 << 20)
    finally:
        libc.umount2(str(tmp_path).encode(), 2)
    assert room_of(tmp_path / "nowhere") == (None, None)


def at_a_meeting() -> tuple[list[str], str]:
    """(what rank zero hears, what this rank is refused with)."""
    meeting = meet(60)
    heard = gather_texts(meeting, "word", f"rank {meeting.rank} says 石")
    agree(meeting, "nothing", lambda: None)

    def refuse() -> None:
        raise ConfigError(f"{len(heard)} are too many: 石.")

    try:
        agree(meeting, "refusal", refuse)
    except LaunchError as error:
        return heard, str(error)
    return heard, ""


def test_rank_zero_hears_all_and_its_refusal_is_everyones() -> None:
    refusal = "3 are too many: 石."
    assert run_ranks(3, at_a_meeting) == [
        ([f"rank {rank} says 石" for rank in range(3)], refusal),
        ([], refusal),
        ([], refusal),
    ]


def be_on_a_v100(num_gpus: int) -> None:
    """What the hardware and a build of torch would say; nothing of ours."""
    v100 = SimpleNamespace(name="Tesla V100-SXM2-32GB", major=7, minor=0)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: num_gpus
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(**vars(v100), uuid=f"uuid {index}")
    torch.cuda.mem_get_info = lambda index: (31 * GIB, 32 * GIB)
    torch.cuda.get_arch_list = lambda: list(CU130)


def with_another_torch(arguments: list[str]) -> int:
    """train.py's main, on rank 1 in another installation."""
    if os.environ["RANK"] == "1":
        real = fingerprint.version
        fingerprint.version = lambda library: "2.12.1" if library == "torch" else real(library)
    return train.main(arguments)


def on_v100s(arguments: list[str]) -> int:
    """train.py's main where torch has no kernels for the GPUs."""
    be_on_a_v100(2)
    return train.main(arguments)


def refused_by_rank_zero(world: World, name: str, main: Callable[[list[str]], int]) -> str:
    """The reason in status.json; rank one has neither ended nor hung in a process group, but waits to be ended."""
    (zero, of_zero), (one, of_one) = start_ranks(2, main, [str(world.recipe(name))])
    assert of_zero.poll(60) and of_zero.recv() == (True, 1)
    status = runs.read_status(world.run_directory(name))
    time.sleep(0.2)
    assert one.is_alive() and not of_one.poll(0), "it is silent for a while"
    one.terminate()
    for process in (zero, one):
        process.join(10)
    assert one.exitcode == -15, "it ends as soon as its launcher says so"
    assert status["state"] == "refused"
    return str(status["reason"])


def test_ranks_with_different_torches_are_refused_by_rank_zero_alone(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    reason = refused_by_rank_zero(world, "unlike", with_another_torch)
    assert re.fullmatch(
        r"The ranks' software is not the same: torch is 2\.13\.\S+ on rank 0 of \S+ and 2\.12\.1 on rank 1 of \S+; "
        r"let them all use one environment\.",
        reason,
    )
    assert capfd.readouterr().err.count(reason) == 1


def test_a_torch_without_kernels_is_refused_before_nccl_starts(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """NCCL there is none here: a process group of it would be another error."""
    reason = refused_by_rank_zero(world, "no-kernels", on_v100s)
    assert reason.startswith("torch 2.13.0") and "has no kernels for Tesla V100-SXM2-32GB (sm_70)" in reason
    said = capfd.readouterr()
    assert said.err.count("Refused: ") == 1 and "Traceback" not in said.err


def with_another_python(arguments: list[str]) -> int:
    """train.py's main, on rank 1 in a Python of which nothing depends."""
    if os.environ["RANK"] == "1":
        fingerprint.platform.python_version = lambda: "3.99.0"
    return train.main(arguments)


@pytest.mark.slow
def test_a_note_is_said_once_and_the_run_goes_on(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, with_another_python, [str(world.recipe("noted"))]) == [0, 0]
    assert capfd.readouterr().out.count("Note: The ranks differ in what may differ: python is ") == 1
    assert runs.read_status(world.run_directory("noted"))["state"] == "finished"


def test_check_speaks_of_the_gpu_that_is_there(world: World) -> None:
    def is_refused() -> bool:
        be_on_a_v100(4)
        done = CliRunner().invoke(app, ["check", str(world.recipe("checked")), "train.precision=bf16"])
        parts = ("has no kernels for Tesla V100", "train.precision = bf16, which Tesla V100-SXM2-32GB does not do")
        return done.exit_code == 2 and all(part in done.stderr for part in parts)

    assert in_a_fork(is_refused)
    done = CliRunner().invoke(app, ["check", str(world.recipe("login-node")), "train.precision=fp16"])
    assert done.exit_code == 0, "a machine without a GPU is not the one that trains"
