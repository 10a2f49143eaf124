"""What knows DeepSpeed's inside: set-up, the accumulation boundary, whole parameters; training_state.py has the rest.

Facts about DeepSpeed 0.19 that the functions rest on are told where they are used; the exact pins are in
requirements.txt, and tests/test_step.py and tests/test_resume.py fail when one of them no longer holds.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

# DeepSpeed warns at import that there is no GPU, on every rank; its errors still come through.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator, InitProcessGroupKwargs  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from torch.distributed.distributed_c10d import _get_default_store  # noqa: E402
from transformers import get_scheduler  # noqa: E402
from transformers.integrations.deepspeed import (  # noqa: E402
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    prevent_arange_dtype_change,
    unset_hf_deepspeed_config,
)

from launch.errors import TrainingError  # noqa: E402
from launch.recipe import Recipe, TrainBlock  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's AdamW
NOTHING_REACHES_THE_LOSS = (
    "Nothing that is trained reaches the loss: the forward pass does not use what the adapted modules compute; name "
    "others in adapter.target_modules"
)

Engine = Any  # deepspeed.DeepSpeedEngine, which is untyped


def quiet_libraries() -> None:
    """Progress bars, notices and deprecations of the libraries are not news to the user; their errors still are."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers|peft")
    warnings.filterwarnings("ignore", message="torch.utils.checkpoint: the use_reentrant")  # of old remote code
    warnings.filterwarnings(
        "ignore", message="(?s).*(of compute capability|with CUDA capability)", module=r"torch\.cuda"
    )
    warnings.filterwarnings("ignore", message="Position ids are not supported", module="peft")  # with soft prompts
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def precisions_of_device(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Those that a GPU of this compute capability, or else the CPU, computes in itself.

    torch.cuda.is_bf16_supported() says yes to a V100, where bf16 is emulated.
    """
    if capability is None:
        supported = {"bf16": get_accelerator().is_bf16_supported(), "fp16": get_accelerator().is_fp16_supported()}
    else:
        supported = {"bf16": bool(torch.version.hip) or capability >= (8, 0), "fp16": capability >= (7, 0)}
    return "fp32", *(name for name, is_supported in supported.items() if is_supported)


def has_bf16_units() -> bool:
    """Whether there is a GPU that has them."""
    return torch.cuda.is_available() and "bf16" in precisions_of_device(torch.cuda.get_device_capability())


def create_accelerator(recipe: Recipe, precision: str) -> Accelerator:
    """Join the process group (NCCL, or gloo without GPUs) and settle what the DeepSpeed JSON leaves to the recipe."""
    use_gpu = torch.cuda.is_available()
    if not use_gpu:
        # Which compiled ops could be built: none. Otherwise DeepSpeed probes for compilers, and then compiles its
        # shared-memory collectives at process-group start (35 s).
        deepspeed.ops.__compatible_ops__ = {}
    process_group = InitProcessGroupKwargs(
        backend="nccl" if use_gpu else "gloo", timeout=timedelta(seconds=recipe.run.process_group_timeout_seconds)
    )
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[process_group],
        log_with=list(recipe.run.report_to) or None,
        project_dir=str(recipe.run_directory / "logs"),
    )
    # No dataloader is prepared, so accelerate cannot fill these; "auto" clipping would silently become 1.0.
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["train_batch_size"] = accelerator.num_processes
    settings["gradient_clipping"] = recipe.train.max_grad_norm
    return accelerator


def after_rank_zero(what: str, work: Callable[[], str | None] = str) -> str:
    """What `work` returned on rank zero; the others wait on the store, not in a collective that could time out.

    `what` is done, once in a process group.
    """
    store, key = _get_default_store(), f"cairn/{what}"
    if dist.get_rank() == 0:
        store.set(key, work() or "")
    store.wait([key], timedelta(days=1))
    return str(store.get(key).decode())


def has_lost_a_peer(error: Exception) -> bool:
    """Whether it says no more than that another rank has ended, or its node."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def learning_rate_schedule(train: TrainBlock, total_steps: int) -> Callable[[int], float]:
    """Step (from 0) -> learning rate: transformers' own schedules, as a pure function of the step."""
    warmup_steps = train.warmup_steps or math.ceil(train.warmup_ratio * total_steps)
    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    scheduler = get_scheduler(train.lr_scheduler_type, unused, warmup_steps, total_steps)
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(train.learning_rate * factor(step))


def start_engine(accelerator: Accelerator, model: torch.nn.Module, train: TrainBlock) -> Engine:
    """Wrap the model and a torch AdamW over its trainable parameters; the optimizer's state exists from the start.

    torch's AdamW instead of DeepSpeed's: that one is compiled on first use, and keeps a running product of beta that
    makes a resumed run drift.
    """
    optimizer = _adamw(model, train)
    engine = accelerator.prepare(model, optimizer)[0]
    engine.train()  # from_pretrained leaves the model in eval mode, without dropout and gradient checkpointing
    for group in flat_groups(engine):
        state = engine.optimizer.optimizer.state[group]
        state["step"] = torch.zeros((), dtype=torch.float32, device=group.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(group)
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False  # linked to the state before it existed
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    _check_masters(engine)
    if engine.fp16_enabled():  # DeepSpeed makes a static scaler for what is trained in fp32
        assert isinstance(engine.optimizer.loss_scaler, DynamicLossScaler), "something trained is not in fp16"
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # train.max_bad_steps decides, for any precision
    return engine


def _check_masters(engine: Engine) -> None:
    """AssertionError for a trainable parameter that the optimizer does not know, or not in fp32."""
    optimizer = engine.optimizer
    for name, parameter in trainable_parameters(engine):
        if engine.zero_optimization_stage() == 3:
            has_master = optimizer.get_param_id(parameter) in optimizer.grad_position
        else:
            has_master = hasattr(parameter, "_hp_mapping")
        assert has_master, f"{name} is trained, and has no master"
    assert {group.dtype for group in flat_groups(engine)} == {torch.float32}, "masters are fp32"


def _adamw(model: torch.nn.Module, train: TrainBlock) -> torch.optim.Optimizer:
    """Each group's `lr_ratio` is its learning rate over the run's; there are several groups under LoRA+ only."""
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "fused": True,
    }
    if train.loraplus_lr_ratio is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, weight_decay=train.weight_decay, **options)
    else:
        assert isinstance(model, PeftModel)
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            loraplus_lr_ratio=train.loraplus_lr_ratio,
            loraplus_weight_decay=train.weight_decay,
            loraplus_lr_embedding=train.learning_rate,
            **options,
        )
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]  # DeepSpeed's wish
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / train.learning_rate
    return optimizer


def backward(engine: Engine, loss: torch.Tensor, *, is_last: bool) -> None:
    """Add this micro-batch's gradient; `is_last` marks the one before `step`.

    `loss` is this rank's share of the step's loss. DeepSpeed averages over the ranks, hence the factor.
    Raises TrainingError when nothing that is trained is in it.
    """
    if not loss.requires_grad:
        raise TrainingError(f"{NOTHING_REACHES_THE_LOSS}.")
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * dist.get_world_size())


def step(engine: Engine, learning_rate: float) -> tuple[float, bool]:
    """Clip and update at the given learning rate. Returns (gradient norm before clipping, skipped on overflow)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]
    engine.step()
    skipped = bool(engine.optimizer.overflow)
    if skipped and engine.zero_optimization_stage() < 3:
        # With an offloaded optimizer DeepSpeed 0.19.8 keeps these, and adds the next gradients to what is not finite.
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
    norm = engine.get_global_grad_norm()
    return float("nan") if skipped or norm is None else float(norm), skipped


def trainable_parameters(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what is trained, in the model's order, the same on every rank."""
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def loss_scale(engine: Engine) -> float | None:
    """The current loss scale; None without fp16."""
    return float(engine.optimizer.loss_scaler.cur_scale) if engine.fp16_enabled() else None


def lowest_loss_scale(engine: Engine) -> float:
    """To which the loss scaler goes down; for fp16."""
    return float(engine.optimizer.loss_scaler.min_scale)


@contextmanager
def partitioned_while_built() -> Iterator[None]:
    """Under ZeRO-3 each rank keeps its share only of what is built inside; otherwise nothing changes.

    Not only parameters are made in the run's precision there, but all that torch's constructors make, arange excepted.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
        yield


@contextmanager
def filled_by_rank_zero(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Inside, rank zero writes the whole parameter or buffer; then every rank has it, or its share (a collective)."""
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            yield tensor.detach()
    else:
        yield tensor.detach()
        sent = tensor.detach().to(get_accelerator().current_device_name())  # NCCL sends what is on the GPU
        dist.broadcast(sent, src=0)
        tensor.detach().copy_(sent)


@contextmanager
def whole_parameter(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The whole value of a parameter or buffer while inside (a collective for what ZeRO-3 partitions)."""
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach()
    else:
        yield parameter.detach()


@contextmanager
def written_whole(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Parameters are whole while inside; what rank zero writes is everyone's (a collective for what is partitioned)."""
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield


def end_zero_init() -> None:
    """From here on this rank loads whole models; under ZeRO-3 it would load its share, and wait for the other ranks."""
    unset_hf_deepspeed_config()


def whole_master(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 master of a trainable parameter, whole, on every rank (a collective)."""
    master: torch.Tensor = safe_get_full_fp32_param(parameter).detach()
    return master.reshape(whole_shape(parameter))


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, partitioned or not, quantised or not."""
    quantised = getattr(parameter, "quant_state", None)
    return tuple(quantised.shape if quantised is not None else getattr(parameter, "ds_shape", parameter.shape))


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(those that are trained, all), whole, partitioned or not."""
    counts = [(math.prod(whole_shape(parameter)), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)


def bytes_on_this_rank(engine: Engine) -> dict[str, int]:
    """Bytes that this rank keeps between steps: its weights, and the optimizer's masters and moments."""
    weights = 0
    for parameter in engine.module.parameters():
        kept = getattr(parameter, "ds_tensor", parameter)
        weights += kept.numel() * kept.element_size()
    optimizer = sum(group.numel() * group.element_size() * (1 + len(MOMENTS)) for group in flat_groups(engine))
    return {"weights": weights, "optimizer": optimizer}


def checksum_of_masters(engine: Engine) -> int:
    """Of the bits of this rank's fp32 masters, which takes no memory: another one as soon as one of them has moved."""
    # In pieces: a sum may first make them int64.
    bits = [group.detach().view(torch.int32) for group in flat_groups(engine)]
    pieces = [group[start : start + (1 << 22)] for group in bits for start in range(0, len(group), 1 << 22)]
    return int(torch.stack([piece.sum() for piece in pieces]).sum())


def flat_groups(engine: Engine) -> list[torch.Tensor]:
    """The fp32 master partitions that the torch optimizer updates."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)
