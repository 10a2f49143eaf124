"""What may differ between a checkpoint and the recipe that resumes it: the fault matrix, rows 29 to 31."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, launch, make_rows, run_ranks
from safetensors.torch import load_file

import train
from launch import batching, runs, same_run
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.errors import CheckpointError, ConfigError, ModelError
from launch.fingerprint import fingerprint_base, fingerprint_code, hash_weights
from launch.recipe import ADAPTERS, ModelBlock, Recipe
from launch.samples import Samples

CHECKPOINT = Path("runs/x/checkpoints/step-000004")
ROWS = {"rows.jsonl": (50, "a")}


# ---- the table ----


def test_every_key_of_the_recipe_stands_in_the_table_once() -> None:
    blocks = {name: [field.annotation] for name, field in Recipe.model_fields.items()} | {"adapter": ADAPTERS.values()}
    del blocks["slurm"]  # how Slurm starts a run makes no other
    keys = {f"{block}.{key}" for block, kinds in blocks.items() for kind in kinds for key in kind.model_fields}
    in_table = Counter(
        f"{block}.{key}" for rule in same_run.TABLE.values() for block, names in rule.items() for key in names.split()
    )
    assert keys == in_table.keys()
    assert set(in_table.values()) == {1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adapter.r", "cannot change within a run"),
        ("train.lr", "is not a recipe key"),
        ("train.logging_steps", "may change without being allowed to"),
    ],
)
def test_what_cannot_be_allowed_is_refused_by_the_recipe(world: World, name: str, kind: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(world.recipe("names"), [f"run.allow_change=[train.max_steps, {name}]"])
    assert f"names.yaml: run.allow_change: {name} {kind}; the valid names are " in str(refused.value)
    assert "train.learning_rate" in str(refused.value) and "train.seed" not in str(refused.value)


# ---- what is compared ----


def split(sources: dict[str, tuple[int, str]], samples: int) -> dict[str, Any]:
    listed = [{"path": path, "rows": rows, "sha256": sha256} for path, (rows, sha256) in sources.items()]
    return {"samples": samples, "sha256": repr([sha256 for _, sha256 in sources.values()]), "sources": listed}


def state(recipe: Recipe, step: int = 4, rows: dict[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
    """state.json as it is read again."""
    known: dict[str, Any] = {
        "precision": "fp32",
        "base": "sha256 " + "0" * 64,
        "weights": None,
        "code": {},
        "tokenizer": "1" * 64,
        "template_sha256": "2" * 64,
        "init_from_sha256": None,
        "data_sha256": ["3" * 64] * 2,
        "rows": rows or {"train": split(ROWS, 40), "evaluation": split(ROWS, 10)},
    }
    identity = same_run.identity_of_run(recipe, **known | facts)
    return dict(json.loads(json.dumps({"step": step, "versions": {}, "identity": identity})))


def said(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What is said when the run goes on."""
    return same_run.check_same_run(CHECKPOINT, saved, now["identity"], now["versions"])


def refusal(saved: dict[str, Any], now: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as refused:
        said(saved, now)
    return str(refused.value)


@pytest.fixture(scope="module")
def path(world: World) -> Path:
    return world.recipe("pure", train={"max_steps": 8, "learning_rate": 1e-4, "global_batch_size": 8})


def test_a_refusal_shows_every_difference_in_columns(path: Path) -> None:
    saved = state(load_recipe(path))
    now = state(load_recipe(path, ["adapter.r=16", "train.learning_rate=2e-4", "data.system=Be brief.", "run.name=y"]))
    assert refusal(saved, now).splitlines() == [
        "runs/x/checkpoints/step-000004 belongs to another run:",
        "  data.system          was null    is Be brief.",
        "  adapter.r            was 4       is 16",
        "  train.learning_rate  was 0.0001  is 0.0002",
        "Restore that, or give this one another run.name;",
        "'run.allow_change=[train.learning_rate]' would go on with train.learning_rate.",
    ]
    only_fixed = refusal(saved, state(load_recipe(path, ["adapter.target_modules=all-linear"])))
    assert only_fixed.splitlines()[1:] == [
        '  adapter.target_modules  was ["q_proj", "v_proj"]  is all-linear',
        "Restore that, or give this one another run.name.",
    ]
    long = refusal(saved, state(load_recipe(path, [f"data.system={'word ' * 30}end", "train.seed=1"])))
    assert long.splitlines()[1:5] == [
        "  data.system",
        "      was null",
        f"      is  {'word ' * 30}end",
        "  train.seed  was 0  is 1",
    ]


def test_what_is_allowed_goes_on_and_is_told_once(path: Path) -> None:
    changes = ["train.learning_rate=2e-4", "train.max_steps=10"]
    saved, asked = state(load_recipe(path)), state(load_recipe(path, changes))
    assert refusal(saved, asked).splitlines()[-2:] == [
        "Restore that, give this one another run.name, or go on with it:",
        "'run.allow_change=[train.max_steps,train.learning_rate]'",
    ]
    allowed = ["run.allow_change=[train.max_steps,train.learning_rate]"]
    now = state(load_recipe(path, changes + allowed))
    assert said(saved, now).splitlines() == [
        "Going on after step 4 with what run.allow_change names:",
        "  train.max_steps      was 8       is 10",
        "  train.learning_rate  was 0.0001  is 0.0002",
    ]
    assert said(now, now) == "", "the next checkpoint has the new values"
    half = state(load_recipe(path, [*changes, "run.allow_change=[train.max_steps]"]))
    assert "'run.allow_change=[train.max_steps,train.learning_rate]'" in refusal(saved, half)
    assert "train.max_steps " not in refusal(saved, half), "what is allowed is no reason"


@pytest.mark.parametrize(
    "change", ["train.logging_steps=3", "train.gradient_checkpointing=true", "run.hang_seconds=9.0"]
)
def test_what_changes_no_result_is_not_even_mentioned(path: Path, change: str) -> None:
    assert said(state(load_recipe(path)), state(load_recipe(path, [change]))) == ""


def test_another_type_of_adapter_is_one_difference(world: World, path: Path) -> None:
    other = world.recipe("soft", train={"max_steps": 8, "learning_rate": 1e-4}, adapter={"type": "prompt_tuning"})
    assert refusal(state(load_recipe(path)), state(load_recipe(other))).splitlines()[1:-1] == [
        "  adapter.type  was lora  is prompt_tuning"
    ]


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"precision": "bf16"}, "  train.precision  was fp32  is bf16 (auto)"),
        ({"base": "sha256 " + "9" * 64}, "  base model  was sha256 000000000000  is sha256 999999999999"),
        ({"tokenizer": "tiny-qwen2 abcdef01"}, "  tokenizer  was 111111111111  is tiny-qwen2 abcdef01"),
        ({"template_sha256": "9" * 64}, "  chat template  was 222222222222  is 999999999999"),
        ({"init_from_sha256": "9" * 64}, "  adapter.init_from  was none  is 999999999999"),
    ],
)
def test_what_recipes_only_point_at_is_compared(path: Path, facts: dict[str, Any], line: str) -> None:
    recipe = load_recipe(path)
    assert refusal(state(recipe), state(recipe, **facts)).splitlines()[1] == line


def test_weights_and_code_are_told_by_file_and_compared_when_both_sides_have_them(path: Path) -> None:
    recipe = load_recipe(path)
    hashed = state(recipe, weights={"1.safetensors": "a" * 64, "2.safetensors": "b" * 64}, code={"net.py": "c" * 64})
    damaged = state(recipe, weights={"1.safetensors": "a" * 64, "2.safetensors": "d" * 64}, code={"net.py": "c" * 64})
    assert refusal(hashed, damaged).splitlines()[1] == "  2.safetensors  was bbbbbbbbbbbb  is dddddddddddd"
    assert said(hashed, state(recipe, code={"net.py": "c" * 64})) == said(state(recipe, code={}), state(recipe)) == ""
    recoded = state(recipe, code={"net.py": "c" * 64, "layers.py": "e" * 64})
    assert refusal(hashed, recoded).splitlines()[1] == "  layers.py  was none  is eeeeeeeeeeee"


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_has(path: Path) -> None:
    """What a saved recipe lacks has the default, in the form in which it would have been saved."""
    old = state(load_recipe(path))
    for key in ("modules_to_save", "use_dora", "rank_pattern", "trainable_token_indices", "init_from"):
        del old["identity"]["recipe"]["adapter"][key]
    del old["identity"]["recipe"]["train"]["loraplus_lr_ratio"], old["identity"]["recipe"]["run"]["allow_change"]
    for key in ("weights", "code", "tokenizer", "template_sha256", "init_from_sha256", "rows"):
        del old["identity"][key]
    del old["versions"]
    assert said(old, state(load_recipe(path), tokenizer="other", weights={"a": "b"})) == ""
    now = state(load_recipe(path, ["adapter.rank_pattern={q_proj: 2}", "train.loraplus_lr_ratio=2.0"]))
    assert refusal(old, now).splitlines()[1:3] == [
        '  adapter.rank_pattern     was {}    is {"q_proj": 2}',
        "  train.loraplus_lr_ratio  was null  is 2",
    ]
    other_rows = state(load_recipe(path), data_sha256=["4" * 64] * 2)
    assert "  data.train  was other rows  is these rows" in refusal(old, other_rows)
    assert not same_run.has_same_held_out(old["identity"], other_rows["identity"])


def test_library_versions_are_told_and_refuse_nothing(path: Path) -> None:
    saved, now = state(load_recipe(path)), state(load_recipe(path))
    saved["versions"], now["versions"] = {"torch": "2.13.0", "peft": "1"}, {"torch": "2.14.0", "peft": "1", "new": "3"}
    assert said(saved, now).splitlines() == [
        "Since step 4: torch 2.13.0 -> 2.14.0, new none -> 3; results may differ in the",
        "last digits.",
    ]


# ---- rows ----


def test_other_rows_are_told_by_source(path: Path) -> None:
    saved = state(
        load_recipe(path), rows={"train": split(ROWS | {"b.jsonl": (9, "b")}, 49), "evaluation": split(ROWS, 10)}
    )
    sources = {"rows.jsonl": (50, "x"), "c.jsonl": (1_200, "c")}
    rows = {"train": split(sources, 1_240), "evaluation": split(sources, 10)}
    assert refusal(saved, state(load_recipe(path), rows=rows)).splitlines()[1:] == [
        "  data.train    was 49 samples  is 1,240 samples",
        "    rows.jsonl  was 50 rows     is 50 others",
        "    b.jsonl     was 9 rows      is none",
        "    c.jsonl     was none        is 1,200 rows",
        "Restore that, give this one another run.name, or go on with it:",
        "'run.allow_change=[data.train]'",
    ]
    now = state(load_recipe(path, ["run.allow_change=[data.train]"]), rows=rows)
    assert said(saved, now).splitlines()[-3:] == [
        "From here on the order is that of the new rows.",
        "Other rows are held out: earlier evaluations are not compared with later ones.",
        "Some of them may have been trained on.",
    ]
    template = state(load_recipe(path, ["run.allow_change=[data.train]"]), rows=rows, template_sha256="9" * 64)
    assert "data.train" not in refusal(saved, template), "the template is the reason"


def test_rows_that_are_held_out_have_a_key_of_their_own(path: Path) -> None:
    own = ["data.evaluation=held_out.jsonl", "data.test_size=null"]
    train_rows = split(ROWS, 50)
    saved = state(
        load_recipe(path, own), rows={"train": train_rows, "evaluation": split({"held_out.jsonl": (5, "h")}, 5)}
    )
    rows = {"train": train_rows, "evaluation": split({"held_out.jsonl": (6, "i")}, 6)}
    assert refusal(saved, state(load_recipe(path, own), rows=rows)).splitlines()[1:3] == [
        "  data.evaluation   was 5 samples  is 6 samples",
        "    held_out.jsonl  was 5 rows     is 6 rows",
    ]
    now = state(load_recipe(path, [*own, "run.allow_change=[data.evaluation]"]), rows=rows)
    assert said(saved, now).splitlines()[-1] == (
        "Other rows are held out: earlier evaluations are not compared with later ones."
    )


# ---- longer and shorter runs ----


def test_a_run_cannot_end_before_the_step_that_is_done(path: Path) -> None:
    allow = "run.allow_change=[train.max_steps]"
    saved = state(load_recipe(path), step=6)
    assert said(saved, state(load_recipe(path, ["train.max_steps=6", allow]))).endswith("was 8  is 6")
    assert refusal(saved, state(load_recipe(path, ["train.max_steps=5", allow]))) == (
        f"{CHECKPOINT} has 6 steps behind it, and this run would end after 5; let it end at train.max_steps=6 or "
        "later, or give it another run.name."
    )


def test_a_longer_run_trains_on_what_a_straight_one_would_and_says_what_it_cannot(path: Path) -> None:
    """40 samples, 16 a step: an epoch ends with a step of 8, so that 8 of the next epoch's first step are missing."""
    epoch = ["train.max_steps=null", "train.global_batch_size=16"]
    two = [*epoch, "train.num_train_epochs=2.0", "run.allow_change=[train.num_train_epochs]"]
    finished, going = (state(load_recipe(path, epoch), step=step) for step in (3, 2))
    now = state(load_recipe(path, two))
    assert said(finished, now).splitlines()[-2:] == [
        "Step 3 was to be the last one and was not full; the next 8 samples of the order",
        "are left out.",
    ]
    assert said(going, now).endswith("was 1  is 2"), "a step that was not the last one was full"

    def ids(steps: range, total_samples: int) -> list[int]:
        return [i for step in steps for i in batching.step_samples(step, 40, 16, total_samples, seed=0)]

    straight = ids(range(5), 80)
    assert Counter(straight) == dict.fromkeys(range(40), 2)
    assert ids(range(2), 40) + ids(range(2, 5), 80) == straight
    extended = ids(range(3), 40) + ids(range(3, 5), 80)
    assert extended == straight[:40] + straight[48:]


# ---- fingerprints ----


def test_a_byte_deep_inside_a_large_file_is_found_by_the_full_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.touch()
    os.truncate(weights, 64 * 400_000)  # the quick one reads 65,536 bytes of every 400,000
    model, quick = ModelBlock(name_or_path=str(tmp_path), hash_weights=True), ModelBlock(name_or_path=str(tmp_path))
    before = fingerprint_base(str(tmp_path), model), hash_weights(str(tmp_path), model)
    with weights.open("r+b") as file:
        file.seek(60 * 400_000 + 200_000)
        file.write(b"\1")
    after = fingerprint_base(str(tmp_path), model), hash_weights(str(tmp_path), model)
    assert before[0] == after[0]
    assert before[1] is not None and after[1] is not None
    assert before[1].keys() == {"model.safetensors"} and before[1] != after[1]
    assert hash_weights(str(tmp_path), quick) is None
    with pytest.raises(
        ModelError, match=r"model\.hash_weights is true, but model\.name_or_path = owner/name is on the hub"
    ):
        hash_weights("owner/name", model)


def test_what_a_factory_imports_from_beside_it_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    files = {
        "net.py": "import torch\nfrom parts import layers\nimport blocks\n",
        "blocks.py": "from parts.deep.norm import Norm\n",
        "parts/__init__.py": "",
        "parts/layers.py": "from . import heads\nfrom .. import nothing_here\nimport net\n",
        "parts/heads.py": "",
        "parts/deep/norm.py": "print 'of another Python'\n",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = fingerprint_code(f"{tmp_path}/net.py:build")
    assert list(found) == sorted(files.keys() - {"unused.py"})
    (tmp_path / "parts" / "heads.py").write_text("#")
    changed = fingerprint_code(f"{tmp_path}/net.py:build")
    assert [name for name in found if found[name] != changed[name]] == ["parts/heads.py"]
    assert fingerprint_code(None) == {}


# ---- runs ----

SETTINGS = {
    "max_steps": 4,
    "save_steps": 1,
    "eval_steps": 1,
    "learning_rate": 0.5,  # too high: the loss rises again after step 2
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "load_best_model_at_end": True,
}
LONGER = ("train.max_steps=6", "run.allow_change=[train.max_steps]")


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """The directory of a run that ended after 4 steps, with merged weights."""
    launch(world.recipe("finished", train=SETTINGS, run={"merge": True}), 1)
    return world.run_directory("finished")


def again(world: World, finished: Path, name: str, **blocks: dict[str, Any]) -> Path:
    """A recipe whose run directory is a copy of that one's."""
    shutil.copytree(finished, world.run_directory(name))
    return world.recipe(name, **{"train": SETTINGS, "run": {"merge": True}} | blocks)


def everything(directory: Path) -> dict[str, bytes]:
    """What stands in a run directory, but for the word that a refusal leaves."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    del files["status.json"]
    return files


def test_a_refused_run_is_left_as_it_was(world: World, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = again(world, finished, "refused")
    directory = world.run_directory("refused")
    before = everything(directory)
    assert run_ranks(1, train.main, [str(recipe), "adapter.r=8", "data.test_size=5", "train.max_steps=6"]) == [1]
    refused = f"""{path_of_step(directory, 4)} belongs to another run:
  data.test_size   was 10  is 5
  adapter.r        was 4   is 8
  train.max_steps  was 4   is 6
"""
    assert f"Refused: {refused}" in capfd.readouterr().err
    status = runs.read_status(directory)
    assert status["state"] == "refused" and status["reason"].startswith(refused)
    assert {name for name, content in everything(directory).items() if before.get(name) != content} == set()


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(world: World, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = again(world, finished, "longer")
    directory = world.run_directory("longer")
    launch(recipe, 1, *LONGER)
    assert "Going on after step 4" in capfd.readouterr().out
    launch(world.recipe("straight", train=SETTINGS | {"max_steps": 6}, run={"merge": True}), 1)
    straight = world.run_directory("straight")
    for name in ("optimizer.safetensors", "adapter_model.safetensors"):
        ours, theirs = (load_file(path_of_step(one, 6) / name) for one in (directory, straight))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    for name in ("merged/model.safetensors", "adapter/adapter_model.safetensors", "endpoint/adapter_model.safetensors"):
        ours, theirs = (load_file(one / name) for one in (directory, straight))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs), name
    assert [r["step"] for r in world.metrics("longer", "train")] == [1, 2, 3, 4, 5, 6]
    status = runs.read_status(directory)
    assert (status["state"], status["reason"], status["step"]) == ("finished", "every step is done", 6)
    launch(recipe, 1, *LONGER)
    assert "is finished." in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["deleted", "damaged"])
def test_the_best_step_is_known_without_metrics(
    world: World, finished: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = again(world, finished, damage)
    losses = {record["step"]: record["loss"] for record in world.metrics(damage, "evaluation")}
    assert min(losses, key=lambda step: losses[step]) == 2
    metrics = world.run_directory(damage) / "metrics.jsonl"
    if damage == "deleted":
        metrics.unlink()
    else:
        metrics.write_bytes(b"\xff{" + metrics.read_bytes().replace(b'"evaluation"', b'"eval\xffation"') + b"[1]\n{}\n")
    launch(recipe, 1, *LONGER)
    told = capfd.readouterr().out
    assert "Step 2 has the best held-out loss; its weights are used." in told
    assert ("Damaged lines of metrics.jsonl, which are left out: 7" in told) == (damage == "damaged")
    assert metrics.with_name("metrics.jsonl.corrupt").exists() == (damage == "damaged")


@pytest.mark.slow
def test_other_rows_go_on_when_that_is_allowed(world: World, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = world.directory / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in make_rows(30, seed=1)), encoding="utf-8")
    recipe = again(world, finished, "more", data={"train": [str(world.rows), str(more)]})
    directory = world.run_directory("more")
    assert run_ranks(1, train.main, [str(recipe), *LONGER]) == [1]
    refused = capfd.readouterr().err
    assert "  data.train  was 40 samples  is 70 samples\n" in refused
    assert f"{more}" in refused and "is 30 rows" in " ".join(refused.split()) and str(world.rows) not in refused
    change = [LONGER[0], "train.learning_rate=0.1"]
    allowed = (*change, "run.allow_change=[train.max_steps,train.learning_rate,data.train]")
    launch(recipe, 1, *allowed)
    assert "From here on the order is that of the new rows." in capfd.readouterr().out
    samples = Samples.load(directory / "data", "train")
    ids = [batching.step_samples(step, 70, 8, 6 * 8, seed=0) for step in (4, 5)]
    curve = world.metrics("more", "train")
    assert [record["trained_tokens"] for record in curve[4:]] == [int(samples.num_trained[i].sum()) for i in ids]
    assert [record["learning_rate"] for record in curve[2:]] == [0.5, 0.5, 0.1, 0.1]
    assert [record["step"] for record in world.metrics("more", "evaluation of other rows")] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in world.metrics("more", "evaluation")] == [4, 5, 6]
    exported = load_file(directory / "adapter" / "adapter_model.safetensors")
    forgotten = load_file(path_of_step(finished, 2) / "adapter_model.safetensors")
    assert any(not torch.equal(exported[key], forgotten[key]) for key in forgotten), "its loss is that of other rows"
    state = json.loads((path_of_step(directory, 6) / "state.json").read_text(encoding="utf-8"))
    assert [record["step"] for record in state["evaluations"]] == [4, 5]
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    assert [start["after_step"] for start in (*environment["earlier"], environment)] == [0, 4]
    assert "train.learning_rate" in environment["said"] and environment["earlier"][0]["said"] == ""
    launch(recipe, 1, *allowed)
    assert "is finished." in capfd.readouterr().out


@pytest.mark.slow
def test_a_finished_run_that_takes_its_last_step_after_all_has_no_other_endpoint(world: World, finished: Path) -> None:
    recipe = again(world, finished, "chosen-anew")
    directory = world.run_directory("chosen-anew")
    assert (directory / "endpoint").exists()
    launch(recipe, 1, "train.load_best_model_at_end=false")
    assert not (directory / "endpoint").exists()
    last, exported = (
        load_file(one / "adapter_model.safetensors") for one in (path_of_step(directory, 4), directory / "adapter")
    )
    assert all(torch.equal(last[key], exported[key]) for key in last | exported)


@pytest.mark.slow
def test_rows_of_which_one_byte_changed_are_another_run(
    world: World, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = world.directory / "changed.jsonl"
    content = bytearray(world.rows.read_bytes())
    content[content.index(b"cairn")] ^= 1
    rows.write_bytes(content)
    recipe = again(world, finished, "byte", data={"train": str(rows)})
    assert run_ranks(1, train.main, [str(recipe), LONGER[0], "run.allow_change=[train.max_steps]"]) == [1]
    refused = " ".join(capfd.readouterr().err.split())
    assert "data.train was 40 samples is 40 others" in refused
    assert f"{rows} was none is 50 rows" in refused
