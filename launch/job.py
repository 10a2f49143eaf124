"""What the loop works with: the engine, the samples, and how a micro-batch becomes a loss."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from launch import batching, preemption
from launch import engine as engines
from launch.deadline import Deadline
from launch.head import LossHead
from launch.packing import batch_loss, collate
from launch.recipe import Recipe
from launch.samples import Samples
from launch.watchdog import Watchdog
from metrics.tokens import TokenCounts, counts_from_sums


@dataclass(frozen=True)
class Job:
    """One run on this rank."""

    recipe: Recipe
    accelerator: Accelerator
    engine: engines.Engine
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    samples: Samples
    held_out: Samples
    packed: bool
    accepts: frozenset[str]  # by name, what the base model's forward can be given
    head: LossHead | None  # that has the loss within it
    identity: dict[str, Any]
    watchdog: Watchdog
    deadline: Deadline

    @property
    def total_samples(self) -> int:
        """Samples of the whole run, repeats counted."""
        settings = self.recipe.train
        return batching.samples_in_run(
            len(self.samples), settings.global_batch_size, settings.num_train_epochs, settings.max_steps
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.total_samples / self.recipe.train.global_batch_size)

    def micro_batches(self, samples: Samples, ids: Sequence[int]) -> list[batching.MicroBatch]:
        """This rank's micro-batches of these samples; every rank has as many."""
        lengths = (samples.lengths[list(ids)] + self.recipe.adapter.num_virtual_tokens).tolist()
        budget = self.recipe.train.max_tokens_per_micro_batch
        return batching.lay_out(ids, lengths, budget, dist.get_world_size(), padded=not self.packed)[dist.get_rank()]

    def loss(self, samples: Samples, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(summed loss, its sums, cells computed) of one micro-batch."""
        self.watchdog.hear()
        batch = collate(samples, ids, self.accelerator.device, packed=self.packed)
        virtual_columns = self.recipe.adapter.num_virtual_columns
        loss_sum, sums = batch_loss(
            self.engine, batch, accepts=self.accepts, virtual_columns=virtual_columns, head=self.head
        )
        return loss_sum, sums, batch.input_ids.numel()

    def wants_to_stop(self, *, evaluation: bool = False) -> bool:
        """Whether this rank was asked to stop, or is rank zero and has no time for a step (an evaluation) more."""
        return preemption.stop_requested() or (dist.get_rank() == 0 and self.deadline.is_near(evaluation=evaluation))

    def is_tight(self) -> bool:
        """Whether this is rank zero, and a stop may not have the time to end its step."""
        return dist.get_rank() == 0 and self.deadline.is_tight


def gives_up_step(job: Job, *, share_left: float) -> bool:
    """Whether a rank was asked to stop and rank zero has no time for the rest of the step; a collective."""
    has_no_time = dist.get_rank() == 0 and job.deadline.drops_step(share_left, preemption.seconds_since_request())
    both = torch.tensor([preemption.stop_requested(), has_no_time], dtype=torch.float64, device=job.accelerator.device)
    dist.all_reduce(both)
    return bool((both > 0).all())


@torch.no_grad()
def evaluate(job: Job) -> tuple[TokenCounts, float] | None:
    """(counts over the held-out samples, seconds); the counts are the same for any ranks and any packing.

    None when a rank was asked to stop, or there is no time for it before the job's end.
    """
    start = time.monotonic()
    job.engine.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=job.accelerator.device)
    for index, micro_batch in enumerate(job.micro_batches(job.held_out, range(len(job.held_out)))):
        asked = torch.tensor(float(job.wants_to_stop(evaluation=index == 0)), device=job.accelerator.device)
        dist.all_reduce(asked)  # ranks agree before each micro-batch, of which all have as many
        if asked > 0:
            job.engine.train()
            return None
        sums += job.loss(job.held_out, micro_batch)[1]
    dist.all_reduce(sums)
    job.engine.train()
    counts, seconds = counts_from_sums(sums), time.monotonic() - start
    job.deadline.evaluations.add(seconds)
    return counts, seconds
