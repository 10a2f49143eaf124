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
    stale = [name for name, parameter in engines.trainable_parameters(engine) if not _is_copied(parameter)]
    has_moved = engines.checksum_of_masters(engine) != checksum_before
    num_moved, num_stale = _sums(engine.device, has_moved, len(stale))
    if not num_moved:
        raise TrainingError(
            f"The adapter has not moved {updates}, though it has gradients: no fp32 master has changed by a bit; raise "
            "train.learning_rate."
        )
    if num_stale:
        raise TrainingError(
            f"{stale[0] if stale else 'A parameter of another rank'} is not what was trained {updates}: what the "
            "forward pass uses is not its fp32 master, rounded. That is a fault of DeepSpeed's partitions; try another "
            "ZeRO stage, such as --config_file configs/accelerate/zero2.yaml."
        )


def _is_copied(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank computes with the fp32 master, rounded; a collective."""
    master = engines.whole_master(parameter)
    with engines.whole_parameter(parameter) as used:
        return torch.equal(used, master.to(used.device, used.dtype))


def _sums(device: torch.device, *counts: int) -> list[float]:
    """Over all ranks."""
    sums = torch.tensor(counts, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return list(sums.tolist())
