"""The largest micro-batches that a run has, before its first step: memory that does not suffice is found at once.

Besides engine.py this module alone knows DeepSpeed's inside: what a step leaves behind there.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from launch import batching
from launch.batching import MicroBatch
from launch.engine import Engine, after_rank_zero, backward, restore_scaler, scaler_state, step
from launch.job import Job

# What DeepSpeed's engine counts, the first two for its own reports.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def rehearse(job: Job) -> None:
    """One step of the largest micro-batches on every rank, and one held-out; a collective that leaves nothing behind.

    Its loss is zero whatever the weights are, so that gradients are zeros, and fp16 does not overflow. The engine must
    be as it was started: its moments are zeros afterwards.
    """
    # With the first ZeRO-3 forgets the order of modules that the packing probe had, with the second it learns that of
    # a backward pass, with the third it fetches ahead; the last one is added to the gradients of another.
    most_trained, most_tokens, held_out = json.loads(after_rank_zero("worst case", lambda: json.dumps(_find(job))))
    torch.manual_seed(batching.step_seed(job.recipe.train.seed, 0, dist.get_rank()))
    with _left_as_it_was(job.engine):
        for number, ids in enumerate(([], [], most_trained, most_tokens), start=1):
            loss_sum, _, _ = job.loss(job.samples, ids)
            backward(job.engine, loss_sum * 0.0, is_last=number == 4)
        step(job.engine, 0.0)
    if held_out:
        job.engine.eval()
        with torch.no_grad():
            job.loss(job.held_out, held_out)
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
