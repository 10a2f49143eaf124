"""The state of a training, whole, out of DeepSpeed's partitions and into those of any number of ranks."""

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from launch.engine import MOMENTS, Engine, flat_groups, trainable_parameters, whole_shape
from launch.errors import CheckpointError

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def gather(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 masters and moments, whole, as `<name>.master | .exp_avg | .exp_avg_sq`, on the CPU of rank zero.

    A collective, one tensor at a time; the other ranks get an empty dict.
    """
    state = {}
    for name, parameter in trainable_parameters(engine):
        whole = {"master": safe_get_full_fp32_param(parameter)}
        whole |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if dist.get_rank() == 0:
            for key, tensor in whole.items():
                tensor = tensor.detach().to("cpu", copy=True)
                state[f"{name}.{key}"] = tensor.reshape(whole_shape(parameter)).contiguous()
    return state


def restore(engine: Engine, state: dict[str, torch.Tensor], adam_step: int) -> None:
    """The inverse of `gather` on any number of ranks and any ZeRO stage; every rank passes the whole.

    Raises CheckpointError when names or shapes differ from the model's.
    """
    expected = {
        f"{name}.{key}": whole_shape(parameter)
        for name, parameter in trainable_parameters(engine)
        for key in ("master", *MOMENTS)
    }
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"The checkpoint does not fit the model: {name} has shape {found.get(name, 'none')} in the checkpoint "
                f"and {expected.get(name, 'none')} in the model."
            )
    if engine.zero_optimization_stage() == 3:
        _restore_partitions(engine, state)
    else:
        for name, parameter in trainable_parameters(engine):
            master = state[f"{name}.master"]
            safe_set_full_fp32_param(parameter, master)
            parameter.data.copy_(master)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}.{moment}"], moment)
    for group in flat_groups(engine):
        engine.optimizer.optimizer.state[group]["step"].fill_(adam_step)


def adam_step(engine: Engine) -> int:
    """Updates that Adam has made; skipped steps are not among them."""
    return int(engine.optimizer.optimizer.state[flat_groups(engine)[0]]["step"])


def scaler_state(engine: Engine) -> dict[str, float | int]:
    """Every changing field of the dynamic loss scaler; empty when there is none."""
    scaler = engine.optimizer.loss_scaler
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS} if engine.fp16_enabled() else {}


def restore_scaler(engine: Engine, state: dict[str, float | int]) -> None:
    """The inverse of `scaler_state`. The precision of a run does not change (same_run.check_same_run)."""
    for field, value in state.items():
        if field not in _SCALER_FIELDS:
            raise CheckpointError(f"The checkpoint's loss scaler has a field {field!r} that is not known.")
        setattr(engine.optimizer.loss_scaler, field, value)


def _restore_partitions(engine: Engine, state: dict[str, torch.Tensor]) -> None:
    """ZeRO-3: safe_set_full_* wants sizes that divide by the ranks, so each rank slices and pads its own part."""
    rank = dist.get_rank()
    # What a forward without a backward gathered, such as a prompt encoder in an evaluation, is whole until the next
    # step, and would be used as it was before.
    engine.optimizer.parameter_offload.partition_all_parameters()
    for name, parameter in trainable_parameters(engine):
        partition: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed adds it
        part_size = partition.numel()
        for key in ("master", *MOMENTS):
            part = state[f"{name}.{key}"].flatten()[part_size * rank :][:part_size]  # of a mapped file: no more is read
            part = torch.nn.functional.pad(part, (0, part_size - part.numel()))
            if key == "master":
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
    for index in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(index)  # fp32 masters -> 16-bit partitions
    persistent = engine.optimizer.persistent_parameters  # small ones, which stay whole on every rank
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
