"""The two files of a layout, accelerate's YAML and DeepSpeed's JSON, beside the recipe: no value is owned twice.

The recipe owns what is trained, the JSON how it is shared out, the YAML the processes. The rules are what accelerate
and DeepSpeed of requirements.txt were seen to do with a key; tests/test_layout_files.py tells what was seen.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.config import NOT_LAUNCHED
from launch.errors import ConfigError, PreflightError, first_line
from launch.findings import Finding, collect
from launch.recipe import LoraBlock, Recipe

SHIPPED = Path("configs/accelerate")
Json = Mapping[str, Any]
_ABSENT = object()
_FP32 = ("fp32", "float32", "float", "torch.float32")  # DeepSpeed's names

# ---- the rules: who owns what, and what would train something else ----

# What the recipe decides, and the value that the JSON may repeat.
_BATCH = "train.global_batch_size and train.max_tokens_per_micro_batch"
_OWNED: dict[str, tuple[str, Callable[[Recipe], object]]] = {
    "optimizer": (
        "train.learning_rate, train.weight_decay, train.adam_beta1, train.adam_beta2 and train.adam_epsilon",
        lambda _: None,
    ),
    "scheduler": ("train.lr_scheduler_type and train.warmup_steps or train.warmup_ratio", lambda _: None),
    "gradient_clipping": ("train.max_grad_norm", lambda recipe: recipe.train.max_grad_norm),
    "train_batch_size": ("train.global_batch_size", lambda recipe: recipe.train.global_batch_size),
    "train_micro_batch_size_per_gpu": ("train.max_tokens_per_micro_batch", lambda _: None),
    "gradient_accumulation_steps": (_BATCH, lambda _: 1),
    "torch_autocast": ("train.precision", lambda _: None),
    "bfloat16": ("train.precision", lambda _: None),  # which bf16 overrules
    "data_types.param_dtype": ("train.precision", lambda _: None),
    "data_efficiency": ("the data block", lambda _: None),
    "weight_quantization": ("model.load_in_4bit", lambda _: None),
    "zero_optimization.zero_quantized_weights": ("model.load_in_4bit", lambda _: None),
    "zero_optimization.zero_quantized_nontrainable_weights": ("model.load_in_4bit", lambda _: None),
    "tensorboard": ("run.report_to", lambda _: None),
    "wandb": ("run.report_to", lambda _: None),
    "csv_monitor": ("run.report_to", lambda _: None),
    "comet": ("run.report_to", lambda _: None),
}

# What DeepSpeed has given up, and stops at, even when it is off; and the recipe's field, if there is one.
_GONE = {
    "amp": "train.precision",
    "compression_training": "model.load_in_4bit",
    "quantize_training": "model.load_in_4bit",
    "curriculum_learning": "the data block",
    "elasticity": "",
    "sparse_attention": "",
    "sparse_gradients": "",
    "eigenvalue": "",
    "progressive_layer_drop": "",
    "graph_harvesting": "",
    "nebula": "",
    "zero_optimization.mics_shard_size": "",
    "zero_optimization.mics_hierarchical_params_gather": "",
    "zero_optimization.zeropp_loco_param": "",
}

# What trains something else, or breaks after the model is loaded: (the one value that does not, why).
_OTHER_ADAM = "it needs DeepSpeed's own Adam, and a run trains with torch's"
_FP32_MASTERS = "what is trained has fp32 masters"
_DIVIDED = "DeepSpeed refuses it where gradients are reduced and scattered"
_ONE_SAMPLE_ONE_RANK = "a sample is on one rank here"
_WRONG: dict[str, tuple[object, str]] = {
    "gradient_allreduce_op": ("mean", "the gradient would be as many times too large as there are ranks"),
    "managed_gradient_accumulation": (True, "the loop itself says which micro-batch is a step's last"),
    "prescale_gradients": (False, _DIVIDED),
    "gradient_predivide_factor": (1, _DIVIDED),
    "tensor_parallel": ({"autotp_size": 1}, _ONE_SAMPLE_ONE_RANK),
    "expert_parallel": ({"autoep_size": 1}, _ONE_SAMPLE_ONE_RANK),
    "sequence_parallel_size": (1, _ONE_SAMPLE_ONE_RANK),
    "autotuning": (False, "DeepSpeed ends the run after its first steps"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients would be sent in few bits"),
    "zero_optimization.compute_grad_norm": (True, "clipping and the log need the norm"),
    "zero_optimization.zenflow": (False, _OTHER_ADAM),
    "zero_optimization.offload_optimizer.super_offload": (False, _OTHER_ADAM),
    "zero_optimization.offload_optimizer.ratio": (1, _OTHER_ADAM),
    "fp16.fp16_master_weights_and_grads": (False, _FP32_MASTERS),
    "bf16.bf16_master_weights_and_grads": (False, _FP32_MASTERS),
    "bf16.bf16_optimizer_states": (False, _FP32_MASTERS),
}

_WITHOUT_EFFECT = {
    "activation_checkpointing": "only a model written for it has any; train.gradient_checkpointing decides",
    "pipeline": "only a PipelineModule of DeepSpeed's has stages",
}

# What accelerate's YAML and options may say although others own it: the environment variable that they become, and
# the recipe's field, or "" for what the JSON owns. zero3_init_flag is not here: accelerate goes by the stage.
_LAUNCHED = {
    "mixed_precision": ("ACCELERATE_MIXED_PRECISION", "train.precision"),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", "train.max_grad_norm"),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", _BATCH),
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", ""),
    "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ""),
    "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ""),
    "offload_optimizer_nvme_path": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", ""),
    "offload_param_nvme_path": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", ""),
    "zero3_save_16bit_model": ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", ""),
}

# ---- the keys that DeepSpeed reads, by block; it passes over a misspelt one at the top, and stops at one below ----

_BY_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
KEYS: dict[str, frozenset[str]] = {
    "": frozenset(
        """aio bf16 checkpoint communication_data_type comms_logger compile data_parallel_size data_types
        dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state flops_profiler fp16
        hybrid_engine log_level memory_breakdown seq_parallel_communication_data_type steps_per_print timers
        use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer zero_optimization""".split()
    ),
    "zero_optimization": frozenset(
        """allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload
        cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters
        leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear
        offload_optimizer offload_param overlap_comm override_module_apply parameter_alignment
        pipeline_loading_checkpoint reduce_bucket_size reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
        stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
        stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
        sub_group_size use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights""".split()
    ),
    "zero_optimization.offload_optimizer": frozenset(
        """buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
        super_offload""".split()
    ),
    "zero_optimization.offload_param": frozenset(
        "buffer_count buffer_size device max_in_cpu nvme_path pin_memory".split()
    ),
    "fp16": frozenset(
        """auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis initial_scale_power
        loss_scale loss_scale_window min_loss_scale""".split()
    ),
    "bf16": frozenset(
        """bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled
        immediate_grad_update""".split()
    ),
    "data_types": frozenset("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype".split()),
}

# ---- what is there ----


@dataclass(frozen=True)
class Layout:
    """What accelerate launch was told, as far as it concerns DeepSpeed."""

    source: str  # the YAML, or the command, for sentences
    distributed_type: str
    deepspeed_file: str | None
    others: Mapping[str, object]  # keys of _LAUNCHED


def layout_of_file(path: Path) -> Layout:
    """accelerate's YAML. Raises ConfigError when it cannot be read."""
    if not path.is_file():
        raise ConfigError(f"--config-file {path}: there is no such file.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config-file {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("deepspeed_config") or {}, dict):
        raise ConfigError(f"--config-file {path} does not hold accelerate's keys; take one of {_shipped()}.")
    said = tree | (tree.get("deepspeed_config") or {})
    others = {key: said[key] for key in _LAUNCHED if said.get(key) is not None}
    return Layout(str(path), str(tree.get("distributed_type")), said.get("deepspeed_config_file"), others)


def layout_of_environment(environment: Mapping[str, str]) -> Layout:
    """The same, in a job: from the variables that accelerate launch sets."""
    others = {key: environment[name] for key, (name, _) in _LAUNCHED.items() if name in environment}
    of_yaml = environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    if others.get("mixed_precision") == "no" and "mixed_precision" not in of_yaml:
        del others["mixed_precision"]  # which accelerate sets where nobody said anything
    distributed_type = "DEEPSPEED" if environment.get("ACCELERATE_USE_DEEPSPEED") == "true" else ""
    return Layout("accelerate launch", distributed_type, environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"), others)


def read_deepspeed(path: Path, source: str) -> Json:
    """DeepSpeed's JSON. Raises PreflightError when it is none, or has a key twice, of which the last would count.

    `source` is where it is named.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice")
        return dict(pairs)

    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise PreflightError(f"{source}: deepspeed_config_file = {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise PreflightError(f"The DeepSpeed configuration {path} is not JSON: {first_line(error)}.") from None
    if not isinstance(tree, dict):
        raise PreflightError(f"The DeepSpeed configuration {path} is no object of keys.")
    return tree


# ---- what is wrong with it ----


def check(recipe: Recipe, layout: Layout, auto_precision: str = "auto") -> list[Finding]:
    """All that is wrong with the two files. `auto_precision` is what train.precision = auto means here, if known."""
    precision = auto_precision if recipe.train.precision == "auto" else recipe.train.precision

    def of_json() -> list[Finding]:
        name = layout.deepspeed_file
        if layout.distributed_type != "DEEPSPEED" or name is None:
            return []
        return findings_of_deepspeed(recipe, read_deepspeed(Path(name), layout.source), name, precision)

    return collect([lambda: findings_of_launch(layout), of_json])


def findings_of_launch(layout: Layout) -> Iterator[Finding]:
    """Of accelerate's YAML, or of its options."""
    if not layout.distributed_type:
        yield Finding(NOT_LAUNCHED)
        return
    if layout.distributed_type != "DEEPSPEED":
        said = f"{layout.source}: distributed_type = {layout.distributed_type}"
        yield Finding(f"{said}, but train.py runs on DEEPSPEED; take one of {_shipped()}.")
        return
    if layout.deepspeed_file is None:
        yield Finding(
            f"{layout.source} names no deepspeed_config_file, without which gradients are added up in 16 bits, and an "
            f"offloaded optimizer is not torch's; take one of {_shipped()}, or give it such a JSON."
        )
    for key, value in layout.others.items():
        field = _LAUNCHED[key][1]
        decides = f"the recipe decides, by {field}" if field else f"{layout.deepspeed_file} decides"
        if field or layout.deepspeed_file is not None:
            yield Finding(f"{layout.source}: {key} = {value}, but {decides}; leave it out.")


def findings_of_deepspeed(recipe: Recipe, deepspeed: Json, name: str, precision: str) -> list[Finding]:
    """Of DeepSpeed's JSON, which is called `name`; `precision` may be auto."""
    blocks = {block: _at(deepspeed, block, {}) for block in KEYS}
    found = [
        Finding(f"{block} = {_shown(value)} is no block of keys.")
        for block, value in blocks.items()
        if not isinstance(value, dict) and not (value is None and "offload" in block)
    ]
    if not found:
        found += _owned_twice(recipe, deepspeed)
        found += _not_to_be_had(deepspeed)
        found += _misspelt(deepspeed)
        found += _of_precision(recipe, deepspeed, precision)
        is_misspelt = "zero_optimization" not in deepspeed and difflib.get_close_matches("zero_optimization", deepspeed)
        found += [] if is_misspelt else _of_zero(recipe, deepspeed, precision)
    return [replace(finding, sentence=f"{name}: {finding.sentence}") for finding in found]


def _owned_twice(recipe: Recipe, deepspeed: Json) -> Iterator[Finding]:
    for key, (owner, value_of) in _OWNED.items():
        value, in_recipe = _at(deepspeed, key), value_of(recipe)
        if _is_off(value) or (in_recipe is not None and value == in_recipe):
            continue
        if isinstance(value, dict):
            yield Finding(f"the block {key} is owned by the recipe, as {owner}; take it out here, and set those there.")
        else:
            yield Finding(f"{key} = {_shown(value)}, but the recipe decides, by {owner}; take it out here.")


def _not_to_be_had(deepspeed: Json) -> Iterator[Finding]:
    for key, owner in _GONE.items():
        if _at(deepspeed, key, _ABSENT) is not _ABSENT:
            instead = f", and set {owner} of the recipe" if owner else ""
            yield Finding(f"{key} is a key that DeepSpeed no longer has, and stops at; take it out{instead}.")
    for key, (right, why) in _WRONG.items():
        value = _at(deepspeed, key, right)
        if value != right and not (_is_off(value) and right is not True):
            yield Finding(f"{key} = {_shown(value)} cannot be had here, for {why}; take it out.")
    for key, why in _WITHOUT_EFFECT.items():
        if key in deepspeed:
            yield Finding(f"{key} has no effect, for {why}.", stops=False)


def _misspelt(deepspeed: Json) -> Iterator[Finding]:
    ruled = {*_OWNED, *_GONE, *_WRONG, *_WITHOUT_EFFECT}
    for block, keys in KEYS.items():
        prefix = f"{block}." if block else ""
        for key in _at(deepspeed, block) or {}:
            if key in keys or prefix + key in ruled:
                continue
            near = difflib.get_close_matches(key, [*keys, *(ruled if not block else ())], n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else "take it out."
            yield Finding(f"{prefix}{key} is no key of DeepSpeed's; {remedy}")


def _of_precision(recipe: Recipe, deepspeed: Json, precision: str) -> Iterator[Finding]:
    wanted = recipe.train.precision
    for block in ("fp16", "bf16"):
        value = _at(deepspeed, f"{block}.enabled", False)
        if block in deepspeed and value != "auto" and (wanted == "auto" or value != (wanted == block)):
            said = f"{block}.enabled = {_shown(value)}"
            if "enabled" not in deepspeed[block]:
                said = f"{block} has no enabled, which is false to DeepSpeed"
            yield Finding(f'{said}, but train.precision = {wanted} of the recipe decides; write "enabled": "auto".')
    scale = _at(deepspeed, "fp16.loss_scale", 0)
    if scale not in (0, "auto") and precision in ("auto", "fp16"):
        yield Finding(
            f"fp16.loss_scale = {_shown(scale)} is a static one, which ends in steps that overflow; write 0, for a "
            "dynamic one."
        )
    stage = _at(deepspeed, "zero_optimization.stage")
    if _at(deepspeed, "bf16.check_grad_overflow") is False and stage in (1, 2) and precision in ("auto", "bf16"):
        yield Finding(
            f"bf16.check_grad_overflow = false: ZeRO-{stage} would put gradients that are not finite into the weights; "
            "write true."
        )
    if _at(deepspeed, "data_types.grad_accum_dtype") not in _FP32 and precision != "fp32":
        yield Finding(
            "data_types.grad_accum_dtype is not fp32, so that under fp16 and bf16 the micro-batches of a step are "
            "added up in 16 bits.",
            stops=False,
        )


def _of_zero(recipe: Recipe, deepspeed: Json, precision: str) -> Iterator[Finding]:
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        yield Finding(
            f"zero_optimization.stage = {_shown(stage)} is not valid; the valid ones are 2, 3 and, but for bf16, 1."
        )
        return
    devices = {key: _at(zero, f"{key}.device") for key in ("offload_optimizer", "offload_param")}
    for key, device in devices.items():
        if device == "nvme":
            yield Finding(f"zero_optimization.{key}.device = nvme is not supported; the valid ones are cpu and none.")
    is_offloaded = devices["offload_optimizer"] in ("cpu", "nvme") or bool(zero.get("cpu_offload"))
    if is_offloaded and deepspeed.get("zero_force_ds_cpu_optimizer") is not False:
        yield Finding(
            "the optimizer is offloaded without zero_force_ds_cpu_optimizer = false, and so becomes DeepSpeed's own, "
            "which is compiled first and makes a resumed run drift; write false."
        )
    has_own_optimizer = _at(deepspeed, "data_types.grad_accum_dtype") in _FP32 and not is_offloaded
    if stage == 1 and has_own_optimizer and precision in ("auto", "bf16"):
        yield Finding(
            "zero_optimization.stage = 1 is run by another optimizer of DeepSpeed's under bf16, whose state cannot be "
            "saved for another number of ranks; write 2 or 3.",
            stops=precision == "bf16",
        )
    if stage < 3 and (devices["offload_param"] in ("cpu", "nvme") or zero.get("cpu_offload_param")):
        yield Finding(f"zero_optimization.offload_param has no effect in stage {stage}, only in 3.", stops=False)
    automatic = [key for key in _BY_HIDDEN_SIZE if zero.get(key) == "auto"]
    if automatic and recipe.model.factory is not None:
        yield Finding(
            f'zero_optimization.{automatic[0]} = "auto" goes by the config of a model of transformers, which '
            "model.factory need not have; write a number, such as 50000000."
        )
    if stage == 3 and recipe.model.load_in_4bit and isinstance(recipe.adapter, LoraBlock) and recipe.adapter.use_dora:
        yield Finding(
            "adapter.use_dora on a base in 4 bits unpacks weights that ZeRO-3 does not know as its own, and stops; "
            f"start with --config_file {SHIPPED / 'zero2.yaml'}, or set adapter.use_dora: false."
        )


def _at(tree: Json, key: str, default: object = None) -> Any:
    """What `block.key` has; the default where there is none."""
    value: Any = tree
    for part in key.split(".") if key else ():
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def _is_off(value: object) -> bool:
    """Left to the recipe, or switched off."""
    is_disabled = isinstance(value, dict) and value.get("enabled") is False
    return value is None or value is False or value == "auto" or is_disabled


def _shown(value: object) -> str:
    return json.dumps(value)


def _shipped() -> str:
    return ", ".join(str(path) for path in sorted(SHIPPED.glob("*.yaml")))
