"""accelerate's YAML and DeepSpeed's JSON beside the recipe: what has two owners, or would train something else."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, World, deepspeed_json, run_ranks
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from typer.testing import CliRunner

import train
from launch import runs
from launch.__main__ import app
from launch.config import load_recipe
from launch.errors import ConfigError
from launch.findings import Finding, collect
from launch.layout_files import KEYS, Layout, check, layout_of_environment, layout_of_file

TINY = ROOT / "configs" / "recipes" / "tiny.yaml"
TUTORIAL = {
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-5, "warmup_num_steps": 500}},
}
NO_FP32_SUMS = "data_types.grad_accum_dtype is not fp32, so that under fp16 and bf16 the micro-batches"


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with `block.key` set, or taken out where the value is an ellipsis."""
    result: dict[str, Any] = json.loads(json.dumps(tree))
    for key, value in changes.items():
        *blocks, last = key.split(".")
        place = result
        for block in blocks:
            place = place.setdefault(block, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return result


def found_in(
    directory: Path, changes: Mapping[str, Any], *overrides: str, config: str = "zero3_no_offload", auto: str = "auto"
) -> list[Finding]:
    """In a shipped JSON with these changes, beside the tiny recipe with these overrides."""
    path = directory / "deepspeed.json"
    shipped = json.loads((ROOT / f"configs/deepspeed/{config}.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps(changed(shipped, changes)), encoding="utf-8")
    return check(load_recipe(TINY, overrides), Layout("a test", "DEEPSPEED", str(path), {}), auto)


# ---- DeepSpeed's JSON ----


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"optimizer": TUTORIAL["optimizer"]},
            "the block optimizer is owned by the recipe, as train.learning_rate, train.weight_decay, train.adam_beta1, "
            "train.adam_beta2 and train.adam_epsilon; take it out here, and set those there.",
        ),
        (
            {"scheduler": TUTORIAL["scheduler"]},
            "the block scheduler is owned by the recipe, as train.lr_scheduler_type and train.warmup_steps or "
            "train.warmup_ratio; take it out here, and set those there.",
        ),
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping = 0.5, but the recipe decides, by train.max_grad_norm; take it",
        ),
        ({"gradient_clipping": 0}, "gradient_clipping = 0, but the recipe decides, by train.max_grad_norm"),
        ({"train_batch_size": 64}, "train_batch_size = 64, but the recipe decides, by train.global_batch_size; take"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu = 2, but the recipe decides, by train.max_tokens",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps = 4, but the recipe decides, by train.global_batch",
        ),
        ({"fp16.enabled": True}, 'fp16.enabled = true, but train.precision = auto of the recipe decides; write "ena'),
        ({"fp16": {}}, "fp16 has no enabled, which is false to DeepSpeed, but train.precision = auto"),
        ({"fp16.loss_scale": 128}, "fp16.loss_scale = 128 is a static one"),
        ({"bf16": ..., "bfloat16": {"enabled": True}}, "the block bfloat16 is owned by the recipe, as train.precision"),
        ({"torch_autocast": {"enabled": True}}, "the block torch_autocast is owned by the recipe, as train.precision"),
        (
            {"data_types.param_dtype": "bf16"},
            'data_types.param_dtype = "bf16", but the recipe decides, by train.precision',
        ),
        ({"data_efficiency": {"enabled": True}}, "the block data_efficiency is owned by the recipe, as the data block"),
        ({"wandb": {"enabled": True}}, "the block wandb is owned by the recipe, as run.report_to"),
        ({"weight_quantization": {"quantized_initialization": {}}}, "the block weight_quantization is owned by the"),
        (
            {"zero_optimization.zero_quantized_weights": True},
            "zero_quantized_weights = true, but the recipe decides, by model.load_in_4bit",
        ),
        ({"zero_optimization.zero_quantized_gradients": True}, "gradients would be sent in few bits"),
        ({"amp": {"enabled": False}}, "amp is a key that DeepSpeed no longer has, and stops at; take it out, and set"),
        ({"elasticity": {"enabled": False}}, "elasticity is a key that DeepSpeed no longer has, and stops at; take it"),
        ({"compression_training": {}}, "compression_training is a key that DeepSpeed no longer has"),
        ({"gradient_allreduce_op": "sum"}, "gradient would be as many times too large as there are ranks"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation = false cannot be had here"),
        ({"prescale_gradients": True}, "prescale_gradients = true cannot be had here"),
        ({"tensor_parallel": {"autotp_size": 2}}, "a sample is on one rank here; take it out"),
        ({"autotuning": {"enabled": True}}, "DeepSpeed ends the run after its first steps"),
        ({"zero_optimization.zenflow": {"topk_ratio": 0.1}}, "needs DeepSpeed's own Adam"),
        ({"zero_optimization.compute_grad_norm": False}, "clipping and the log need the norm"),
        ({"bf16.bf16_master_weights_and_grads": True}, "what is trained has fp32 masters"),
        ({"zero_optimization": ..., "zero_optimizaton": {"stage": 3}}, "did you mean zero_optimization?"),
        ({"zero_optimization": True}, "zero_optimization = true is no block of keys."),
        ({"zero_optimization": ...}, "zero_optimization.stage = 0 is not valid; the valid ones are 2, 3 and"),
        ({"zero_optimization.stage": 0}, "zero_optimization.stage = 0 is not valid"),
        ({"zero_optimization.stage": "auto"}, 'zero_optimization.stage = "auto" is not valid'),
        ({"zero_optimization.offload_param": {"device": "nvme"}}, "offload_param.device = nvme is not supported"),
        ({"gradient_cliping": "auto"}, "gradient_cliping is no key of DeepSpeed's; did you mean gradient_clipping?"),
        ({"zero_optimization.overlap_com": True}, "did you mean zero_optimization.overlap_comm?"),
        ({"my_own_remark": "of a tutorial"}, "my_own_remark is no key of DeepSpeed's; take it out."),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_the_json_may_not_say_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    """Each was seen on DeepSpeed 0.19.8 with four steps of the tiny model: a traceback once the weights are loaded (an
    optimizer, accumulation, what is gone), the end of the run (autotuning), or, in silence, another thing.

    That was: a clipping or batch size that nobody reads; ZeRO-2 for a stage that is "auto"; weights in fp32 in place of
    fp16, without a loss scaler, for an fp16 that is false; bf16 for fp32; a gradient norm twice as large for "sum" on
    two ranks; nothing at all for a misspelt key.
    """
    found = found_in(tmp_path, changes)
    stopping = [finding.sentence for finding in found if finding.stops]
    assert len(stopping) == 1, found
    assert stopping[0].startswith(f"{tmp_path / 'deepspeed.json'}: ") and sentence in stopping[0]


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({"gradient_clipping": 0.5}, ["train.max_grad_norm=0.5"]),
        ({"train_batch_size": 32, "gradient_accumulation_steps": "auto"}, ["train.global_batch_size=32"]),
        ({"fp16.enabled": True, "bf16.enabled": False}, ["train.precision=fp16"]),
        ({"fp16": {}, "bf16": {}, "data_types": ...}, ["train.precision=fp32"]),
        ({"fp16.loss_scale": 128}, ["train.precision=bf16"]),
        ({"fp16": ..., "bf16": ..., "steps_per_print": 10, "wall_clock_breakdown": True}, []),
        (
            {"wandb": {"enabled": False}, "torch_autocast": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}},
            [],
        ),
        ({"zero_optimization.offload_param": None, "zero_optimization.offload_optimizer": {"device": "none"}}, []),
        ({f"zero_optimization.{key}": "auto" for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size")}, []),
        ({"zero_optimization.cpu_offload": False, "zero_force_ds_cpu_optimizer": ...}, []),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_has_one_owner_or_says_the_same_passes(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str]
) -> None:
    assert found_in(tmp_path, changes, *overrides) == []


@pytest.mark.parametrize(("key", "value"), [("offload_optimizer.device", "cpu"), ("cpu_offload", True)])
def test_an_offload_with_deepspeeds_own_adam_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """Left out, it is true: accelerate then puts DeepSpeed's CPU Adam in the place of torch's, which took minutes to
    compile here; for the old cpu_offload, DeepSpeed stops.
    """
    changes = {f"zero_optimization.{key}": value}
    (finding,) = found_in(tmp_path, {**changes, "zero_force_ds_cpu_optimizer": ...})
    assert (
        finding.stops and "the optimizer is offloaded without zero_force_ds_cpu_optimizer = false" in finding.sentence
    )
    assert found_in(tmp_path, changes) == []


def test_stage_1_is_refused_under_bf16_only(tmp_path: Path) -> None:
    """There DeepSpeed takes its BF16_Optimizer, but for an offload or gradients that are added up in bf16."""

    def found(precision: str, auto: str, **changes: Any) -> list[bool]:
        changes = {f"zero_optimization.{key}": value for key, value in changes.items()}
        override = f"train.precision={precision}"
        said = found_in(tmp_path, {"zero_optimization.stage": 1, **changes}, override, auto=auto)
        assert all("zero_optimization.stage = 1 is run by another optimizer" in finding.sentence for finding in said)
        return [finding.stops for finding in said]

    assert found("bf16", "auto") == [True] == found("auto", "bf16")
    assert found("auto", "auto") == [False]  # known when the job is on its GPU
    assert found("fp16", "auto") == [] == found("auto", "fp16") == found("bf16", "auto", cpu_offload=True)


def test_bf16_without_a_look_for_overflow_is_refused_where_deepspeed_obeys(tmp_path: Path) -> None:
    """ZeRO-2 was seen to end a run as finished with weights that were not a number after one bad step; ZeRO-3 looks."""
    unchecked = {"bf16.check_grad_overflow": False}
    (finding,) = found_in(tmp_path, unchecked, config="zero2_no_offload")
    assert finding.stops and "ZeRO-2 would put gradients that are not finite into the weights" in finding.sentence
    assert found_in(tmp_path, unchecked) == []
    assert found_in(tmp_path, unchecked, config="zero2_no_offload", auto="fp16") == []


@pytest.mark.parametrize(
    ("changes", "overrides", "sentence"),
    [
        ({"data_types": ...}, [], NO_FP32_SUMS),
        ({"data_types.grad_accum_dtype": "bf16"}, ["train.precision=bf16"], NO_FP32_SUMS),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, [], "train.gradient_checkpointing decides."),
        ({"pipeline": {"stages": 2}}, [], "pipeline has no effect"),
        (
            {"zero_optimization.stage": 2, "zero_optimization.offload_param": {"device": "cpu"}},
            [],
            "offload_param has no effect in stage 2",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_only_has_no_effect_is_said(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str], sentence: str
) -> None:
    (finding,) = found_in(tmp_path, changes, *overrides)
    assert not finding.stops and sentence in finding.sentence


def test_sizes_by_the_hidden_size_are_for_models_of_transformers(world: World, tmp_path: Path) -> None:
    """accelerate fills them from the model's config, and stops, once it is built, where there is none."""
    given = [f"model.factory={ROOT / 'tests/own_model.py'}:build", "adapter.target_modules=[query_key_value]"]
    overrides = [*given, f"model.name_or_path={tmp_path / 'weights.pt'}", f"model.tokenizer={world.base}"]
    (finding,) = found_in(tmp_path, {"zero_optimization.reduce_bucket_size": "auto"}, *overrides)
    assert finding.stops and 'zero_optimization.reduce_bucket_size = "auto" goes by the config' in finding.sentence
    assert found_in(tmp_path, {}, *overrides) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{optimizer: 1}", "is not JSON: Expecting property name"),
        ("[1, 2]", "is no object of keys."),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "is not JSON: stage is given twice."),
        (None, "deepspeed.json does not exist."),
    ],
)
def test_a_json_that_is_none_is_named(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    (finding,) = check(load_recipe(TINY), Layout("zero.yaml", "DEEPSPEED", str(path), {}))
    assert finding.stops and str(path) in finding.sentence and sentence in finding.sentence


def test_the_keys_are_those_of_deepspeed() -> None:
    """Which stops at any other, once the model is loaded."""
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for block, model in models.items():
        assert KEYS[block] == {field.alias or name for name, field in model.model_fields.items()}, block


# ---- accelerate's YAML, and the environment that it becomes ----

YAML: dict[str, Any] = yaml.safe_load((ROOT / "configs/accelerate/zero3.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (
            {"distributed_type": "FSDP"},
            ["distributed_type = FSDP, but train.py runs on DEEPSPEED; take one of configs/"],
        ),
        (
            {"mixed_precision": "bf16"},
            ["mixed_precision = bf16, but the recipe decides, by train.precision; leave it out."],
        ),
        (
            {"deepspeed_config.gradient_accumulation_steps": 4, "deepspeed_config.gradient_clipping": 0.5},
            [
                "gradient_clipping = 0.5, but the recipe decides, by train.max_grad_norm; leave",
                "gradient_accumulation_steps = 4, but the recipe decides, by train.global_batch_size",
            ],
        ),
        (
            {"deepspeed_config.zero_stage": 2},
            ["zero_stage = 2, but configs/deepspeed/zero3_offload.json decides; leave it out."],
        ),
        (
            {
                "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_clipping": 1.0},
            },
            ["names no deepspeed_config_file", "gradient_clipping = 1.0, but the recipe decides, by train.max"],
        ),
        (
            {"deepspeed_config.deepspeed_config_file": "configs/deepspeed/zero4.json"},
            ["deepspeed_config_file = configs/deepspeed/zero4.json does not exist."],
        ),
        ({"deepspeed_config": "zero3.json"}, ["does not hold accelerate's keys"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_accelerates_yaml_may_not_say_is_refused_in_a_sentence_each(
    tmp_path: Path, changes: dict[str, Any], sentences: list[str]
) -> None:
    """accelerate says a YAML with mixed_precision or a ZeRO stage beside a JSON would be ignored, in a traceback."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(YAML, changes)), encoding="utf-8")
    found = collect([lambda: check(load_recipe(TINY), layout_of_file(path))])
    assert len(found) == len(sentences), found
    for finding, sentence in zip(found, sentences, strict=True):
        assert finding.stops and str(path) in finding.sentence and sentence in finding.sentence


def test_a_yaml_that_is_not_there_or_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    for name, sentence in (("none.yaml", ": there is no such file."), ("bad.yaml", " is not YAML")):
        with pytest.raises(ConfigError, match=re.escape(f"--config-file {tmp_path / name}{sentence}")):
            layout_of_file(tmp_path / name)


def test_a_job_reads_the_same_from_its_environment(tmp_path: Path) -> None:
    """As accelerate launch sets it; `--gradient_clipping` on its command line would be passed over."""
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": YAML["deepspeed_config"]["deepspeed_config_file"],
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    of_yaml = layout_of_file(ROOT / "configs/accelerate/zero3.yaml")
    assert layout_of_environment(environment) == Layout("accelerate launch", "DEEPSPEED", of_yaml.deepspeed_file, {})
    given = environment | {"ACCELERATE_GRADIENT_CLIPPING": "0.5", "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert layout_of_environment(given).others == {"mixed_precision": "bf16", "gradient_clipping": "0.5"}
    said = environment | {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,mixed_precision"}
    assert layout_of_environment(said).others == {"mixed_precision": "no"}  # at which accelerate stops, too
    (finding,) = check(load_recipe(TINY), layout_of_environment({}))
    assert finding.sentence.startswith("train.py runs on DeepSpeed: start it with accelerate launch --config_file ")


# ---- together ----


@pytest.mark.parametrize("config", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_files_agree_with_the_shipped_recipes(config: Path) -> None:
    layout = layout_of_file(config)
    assert [(path, check(load_recipe(path), layout)) for path in TINY.parent.glob("*.yaml")] == [
        (path, []) for path in TINY.parent.glob("*.yaml")
    ]


def test_check_says_what_is_wrong_with_the_recipe_and_the_layout_together(world: World, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, **TUTORIAL}), encoding="utf-8")
    config = changed(YAML, {"deepspeed_config.deepspeed_config_file": str(tmp_path / "ds.json")})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    recipe = world.recipe("both", adapter={"target_modules": ["no_such"]})
    done = CliRunner().invoke(app, ["check", str(recipe), "--config-file", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 2 and "3 things stand in the way." in done.stderr
    for part in ("no_such", "the block optimizer", "the block scheduler"):
        assert part in done.stderr
    assert f"Note: {tmp_path / 'ds.json'}: {NO_FP32_SUMS}" in done.stdout


def test_a_job_with_a_tutorials_json_is_refused_before_the_model_is_loaded(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed passes over the scheduler, for the loop sets the learning rate, or obeys it in part: with OneCycle
    {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3} it set Adam's betas to (0.9, 0.99) where the recipe says (0.9, 0.999),
    and six steps of this model ended at a loss of 6.5877 in place of 6.6074, without a word.
    """
    path = deepspeed_json(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | TUTORIAL), encoding="utf-8")
    name = str(world.recipe("tutorial"))
    assert run_ranks(1, main_that_loads_no_model, [name], deepspeed=path) == [1]
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "Refused: 2 things stand in the way."
    assert said[1].startswith(f"  1. {path}: the block optimizer is owned by the recipe, as train.learning_rate, ")
    assert said[2].startswith(f"  2. {path}: the block scheduler is owned by the recipe, as train.lr_scheduler_type ")
    assert runs.read_status(world.run_directory("tutorial"))["state"] == "refused"


def main_that_loads_no_model(arguments: list[str]) -> int:
    """train.py's main, in which loading the base is a failure; on rank zero of what might be many."""
    train.adapted_base = lambda *_: os._exit(3)
    return train.main(arguments)
