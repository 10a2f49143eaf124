"""Whether training does anything: a run whose adapter has not moved after ten updates stops."""

import torch
import torch.distributed as dist

from launch import engine as engines
from launch.errors import TrainingError

UPDATES_BEFORE_THE_LOOK = 10  # of this process


class Movement:
    """What there was to see of the first updates; steps that were skipped, or had no learning rate, are none."""

    def __init__(self, engine: engines.Engine) -> None:
        self._engine = engine
        self._checksum = engines.checksum_of_masters(engine)
        self._num_updates = 0
        self._has_gradient = False

    def after_step(self, *, gradient_norm: float, learning_rate: float, skipped: bool) -> None:
        """Every rank calls it with the same. Raises TrainingError for an adapter that stands still, on all ranks."""
        if skipped or learning_rate == 0 or self._num_updates == UPDATES_BEFORE_THE_LOOK:
            return
        self._num_updates += 1
        self._has_gradient |= gradient_norm != 0  # also where DeepSpeed tells none
        if self._num_updates == UPDATES_BEFORE_THE_LOOK:
            check_movement(self._engine, self._checksum, has_gradient=self._has_gradient)


def check_movement(engine: engines.Engine, checksum_before: int, *, has_gradient: bool) -> None:
    """A collective. Raises TrainingError on all ranks for no gradient, for masters that stand, or for stale copies."""
    updates = f"after {UPDATES_BEFORE_THE_LOOK} updates"
    if not has_gradient:
        scale = engines.loss_scale(engine)
        too_small = f", or its gradients are too small for fp16 even at a loss scale of {scale:,.0f}" if scale else ""
        raise TrainingError(
            f"The adapter has not moved {updates}: every gradient was exactly zero. {engines.NOTHING_REACHES_THE_LOSS}"
            f"{too_small}."
        )
    moved = torch.tensor(float(engines.checksum_of_masters(engine) != checksum_before), device=engine.device)
    dist.all_reduce(moved)
    if not moved:
        raise TrainingError(
            f"The adapter has not moved {updates}, though it has gradients: no fp32 master has changed by a bit; raise "
            "train.learning_rate."
        )
    for name, parameter in engines.trainable_parameters(engine):
        master = engines.whole_master(parameter)
        with engines.whole_parameter(parameter) as used:
            is_copied = torch.equal(used, master.to(used.device, used.dtype))
        if not is_copied:
            raise TrainingError(
                f"{name} is not what was trained {updates}: its fp32 master has moved, and the copy in {used.dtype} "
                "that the forward pass uses is not that master, rounded. That is a fault of DeepSpeed's partitions; "
                "try another ZeRO stage (--config_file configs/accelerate/zero2.yaml)."
            )
