"""The largest micro-batches that a run has, before its first step: memory that does not suffice is found at once.

Besides engine.py and training_state.py this module alone knows DeepSpeed's inside: what a step leaves behind there.
"""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from launch import batching, plan
from launch.adapter import ADAPTER_NAME
from launch.batching import MicroBatch
from launch.engine import Engine, after_rank_zero, backward, step
from launch.errors import OutOfMemoryError, first_line
from launch.free_memory import available_bytes
from launch.job import Job
from launch.out_of_memory import Device, Tried, sentence, sentence_of_start, sentence_without_plan
from launch.outlook import case_of_run
from launch.training_state import restore_scaler, scaler_state

# What DeepSpeed's engine counts, the first two for its own reports.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
# Of an error that is none of torch.OutOfMemoryError: torch's allocator for a CPU, a thread's stack, cuBLAS, NCCL.
_WORDS = ("can't allocate memory", "can't start new thread", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


@dataclass(frozen=True)
class Largest:
    """The largest micro-batches of the whole run, as `batching.largest_micro_batches` finds them."""

    most_trained: MicroBatch
    most_tokens: MicroBatch  # of a padded one, cells
    held_out: MicroBatch


def find_largest(job: Job) -> Largest:
    """Rank zero finds them, for all ranks; a collective."""
    return Largest(*json.loads(after_rank_zero("worst case", lambda: json.dumps(_find(job)))))


def rehearse(job: Job, largest: Largest) -> None:
    """One step of the largest micro-batches on every rank, and one held-out; a collective that leaves nothing behind.

    Its loss is zero whatever the weights are, so that gradients are zeros, and fp16 does not overflow. The engine must
    be as it was started: its moments are zeros afterwards.
    """
    torch.manual_seed(batching.step_seed(job.recipe.train.seed, 0, dist.get_rank()))
    with _left_as_it_was(job.engine):
        # With the first, empty one ZeRO-3 forgets the order of modules that the probe had, with the second it
        # learns that of a backward pass, and from then on it fetches ahead. The last one's gradients are added.
        for number, ids in enumerate(([], [], largest.most_trained, largest.most_tokens), start=1):
            loss_sum, _, _ = job.loss(job.samples, ids)
            backward(job.engine, loss_sum * 0.0, is_last=number == 4)
        step(job.engine, 0.0)
    if largest.held_out:
        job.engine.eval()
        with torch.no_grad():
            job.loss(job.held_out, largest.held_out)
        job.engine.train()


def _find(job: Job) -> tuple[MicroBatch, MicroBatch, MicroBatch]:
    """(that with the most trained tokens, that with the most tokens, the longest held-out samples)."""
    settings, virtual = job.recipe.train, job.recipe.adapter.num_virtual_tokens
    largest = batching.largest_micro_batches(
        job.samples.lengths + virtual,
        job.samples.num_trained,
        global_batch_size=settings.global_batch_size,
        total_samples=job.total_samples,
        seed=settings.seed,
        max_tokens=settings.max_tokens_per_micro_batch,
        num_ranks=dist.get_world_size(),
        padded=not job.packed,
    )
    # An evaluation packs all that is held out, and may fill a micro-batch where a step does not. To lay all of it out
    # takes long; no micro-batch of it has more than the longest samples do.
    longest_first = np.argsort(-job.held_out.lengths, kind="stable")
    num_fitting = np.searchsorted(
        np.cumsum(job.held_out.lengths[longest_first] + virtual),
        settings.max_tokens_per_micro_batch * dist.get_world_size(),
        side="right",
    )
    held_out = job.micro_batches(job.held_out, longest_first[: int(num_fitting)].tolist())
    return *largest, max(held_out, key=lambda ids: int(job.held_out.lengths[ids].sum()))


@contextmanager
def _left_as_it_was(engine: Engine) -> Iterator[None]:
    """Afterwards the optimizer has made no step, and scaler and counters are those of before.

    A step ends with all gradients handed over; one whose gradients are not finite is skipped, and changes no master.
    """
    scaler = scaler_state(engine)
    counters = {name: getattr(engine, name) for name in _COUNTERS}
    yield
    for state in engine.optimizer.optimizer.state.values():
        for tensor in state.values():  # both moments, and Adam's step
            tensor.zero_()
    restore_scaler(engine, scaler)
    for name, value in counters.items():
        setattr(engine, name, value)


# ---- and when they do not fit ----


@contextmanager
def told(job: Job, largest: Largest, where: str) -> Iterator[None]:
    """Makes an OutOfMemoryError of what is raised inside when there is no memory: what to lower, and by how much."""
    with _explained(job.accelerator.device, lambda found: _sentence(job, largest, where, found)):
        yield


@contextmanager
def told_while_starting(device: torch.device) -> Iterator[None]:
    """The same while base and engine are made, before there are micro-batches."""
    with _explained(device, sentence_of_start):
        yield


@contextmanager
def _explained(device: torch.device, explain: Callable[[Device], str]) -> Iterator[None]:
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not _is_of_memory(error):
            raise
        found = _device(device)  # before the frames of the traceback let go what they hold
    raise OutOfMemoryError(explain(found))


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in _WORDS)


def _device(device: torch.device) -> Device:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Device(True, total, free, torch.cuda.memory_reserved(device))
    size, resident = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in _statm()[:2])
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    left = available_bytes() if limit == resource.RLIM_INFINITY else min(limit - size, available_bytes())
    return Device(False, resident + left, left, resident)


def _statm() -> list[str]:
    """Pages of this process: of its addresses, of what is in memory, and more."""
    return Path("/proc/self/statm").read_text(encoding="ascii").split()


def _sentence(job: Job, largest: Largest, where: str, device: Device) -> str:
    lengths = job.samples.lengths + job.recipe.adapter.num_virtual_tokens
    num_targets = int(job.samples.num_trained[largest.most_trained].sum())
    most = lengths[largest.most_tokens]
    num_tokens = batching.num_cells(most, padded=not job.packed)
    tried = Tried(where, num_tokens, num_targets, int(lengths.max()), int(most.max()))
    try:
        base_name = str(job.model.peft_config[ADAPTER_NAME].base_model_name_or_path)
        share = num_targets / tried.num_tokens
        precision, judged = job.identity["precision"], job.head is not None
        case = case_of_run(job.recipe, base_name, precision, share, packed=job.packed, judged=judged)
        sharding = plan.sharding_of(job.accelerator.state.deepspeed_plugin.deepspeed_config)
        return sentence(tried, device, case, sharding)
    except Exception as error:  # whatever the plan lacks, this is no time to fail
        return sentence_without_plan(tried, device, job.recipe, first_line(error))
