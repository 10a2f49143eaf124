"""A merged model that answers otherwise than base and adapter do is found out, on rows of the run itself."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World, build_base, launch, make_rows, run_ranks
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.errors import MergeError
from launch.free_memory import available_bytes, limit_bytes
from launch.merge_from_disk import find_source, merge_from_disk
from launch.parity import NUM_ROWS, POSITIONS_PER_ROW, Unmerged, check_logits
from launch.recipe import ModelBlock
from launch.samples import StoreWriter, save_split


def make(directory: Path, *, num_held_out: int) -> Unmerged:
    """A merged model, what it was made of, and rows."""
    base = build_base(directory / "base", [row["output"] for row in make_rows(20)])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(directory / "adapter"))
    merge_from_disk(find_source(directory / "adapter"), directory / "merged", max_shard_size_bytes=10**9)
    lengths = np.asarray([30, 700, 40, 12, 25, 60])
    (directory / "data").mkdir()
    with StoreWriter(directory / "data", 1) as writer:
        tokens = np.arange(lengths.sum(), dtype=np.int32) % 300
        is_trained = np.concatenate([np.arange(length) >= length - 20 for length in lengths])
        is_trained[np.cumsum(lengths) - lengths] = False
        writer.append(tokens, is_trained, lengths, np.minimum(lengths - 1, 20), file=0)
    numbers = np.arange(len(lengths))
    save_split(directory / "data", {"evaluation": numbers[:num_held_out], "train": numbers[num_held_out:]})
    settings = ModelBlock(name_or_path=str(base))
    tokenizer = AutoTokenizer.from_pretrained(base)
    return Unmerged(str(base), settings, torch.float16, tokenizer, directory / "adapter", directory / "data")


@pytest.mark.slow
def test_what_is_merged_has_the_logits_of_base_and_adapter_and_what_is_not_is_found(tmp_path: Path) -> None:
    unmerged, merged = make(tmp_path, num_held_out=6), tmp_path / "merged"
    found = check_logits(merged, unmerged, "float16")["logits"]
    assert (found["rows"], found["of"]) == (NUM_ROWS, "evaluation")
    assert found["positions"] == 3 * POSITIONS_PER_ROW + 11, "one of the first rows is short"
    assert found["same_choice"] == 1 and 0 < found["deviation"] < 0.2 * found["allowed_deviation"]
    assert found["deviation_of_the_base"] > 10 * found["allowed_deviation"], "the adapter must matter"
    assert found["largest_difference"] < 0.01 * found["largest_logit"]

    shard = merged / "model.safetensors"
    tensors = load_file(shard)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    swapped = dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
    a_row = tensors["lm_head.weight"].clone()
    a_row[17] *= 2
    for damage in (swapped, {"lm_head.weight": a_row}, {"model.norm.weight": tensors["model.norm.weight"] * torch.nan}):
        save_file(tensors | damage, shard, metadata={"format": "pt"})
        with pytest.raises(
            MergeError, match=r"differ by (nan|\d.*)% from those of base and adapter on 4 rows of"
        ) as error:
            check_logits(merged, unmerged, "float16")
        assert "rounding to float16 explains 0.98%; nothing was kept" in str(error.value)


def test_what_cannot_be_compared_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unmerged, merged = make(tmp_path, num_held_out=0), tmp_path / "merged"
    said = capsys.readouterr().out
    assert said == (
        "The merged model's logits are not compared with those of base and adapter: the adapter is no run's, so that "
        "there are no rows to compare them on.\n"
    )
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    assert report["logits"]["skipped"].startswith("the adapter is no run's")

    found = check_logits(merged, unmerged, "float16", free_bytes=10_000)["logits"]
    weights_bytes = 2 * (merged / "model.safetensors").stat().st_size
    assert found.keys() == {"skipped"} and "of memory, and 10 kB are free" in found["skipped"]
    assert weights_bytes < float(found["skipped"].split()[2]) * 1000 < 1.5 * weights_bytes
    assert found["skipped"] in capsys.readouterr().out
    found = check_logits(merged, unmerged, "float16", most_bytes=10_000)["logits"]
    assert f"not let its GPUs wait; python -m launch merge {tmp_path} --output DIR compares them" in found["skipped"]
    capsys.readouterr()

    found = check_logits(merged, unmerged, "float16")["logits"]
    assert found["of"] == "train"
    assert capsys.readouterr().out.startswith("No rows are held out, so ")


@pytest.mark.slow
def test_a_run_compares_them_at_its_end_and_so_does_the_command(world: World) -> None:
    launch(world.recipe("both", train={"max_steps": 3}, run={"merge": True}), 2)
    run = world.run_directory("both")
    assert merge_from_disk(find_source(run), run / "again", max_shard_size_bytes=10**9)
    reports = [
        json.loads((run / name / "merge_report.json").read_text(encoding="utf-8"))["logits"]
        for name in ("merged", "again")
    ]
    assert {report.pop("of") for report in reports} == {"evaluation"}
    assert reports[0] == pytest.approx(reports[1], rel=1e-2), "of the same bytes; sums differ with the cores"
    assert reports[0]["rows"] == NUM_ROWS and reports[0]["deviation"] < reports[0]["allowed_deviation"]
    before = sorted(path.name for path in run.iterdir())
    (said,) = run_ranks(1, merge_with_a_damaged_shard, run, run / "damaged")
    assert "The merged model's logits differ by" in said and "this is a fault of the merge to be reported" in said
    assert sorted(path.name for path in run.iterdir()) == before, "nothing is left"


def merge_with_a_damaged_shard(run: Path, target: Path) -> str:
    """What is said when the shard changes under the merge, once it is on the disk."""

    def damage(event: str, details: tuple[Any, ...]) -> None:
        is_written = event == "open" and isinstance(details[2], int) and details[2] & os.O_WRONLY
        if is_written and f"{target.name}-" in str(details[0]) and str(details[0]).endswith("/config.json"):
            shard = Path(details[0]).with_name("model.safetensors")
            tensors = load_file(shard)
            tensors["model.norm.weight"][:] = 0.5
            tensors["model.norm.weight"][::2] = -0.5
            save_file(tensors, shard, metadata={"format": "pt"})

    sys.addaudithook(damage)
    with pytest.raises(MergeError) as refused:
        merge_from_disk(find_source(run), target, max_shard_size_bytes=10**9)
    return str(refused.value)


@pytest.mark.slow
def test_a_run_whose_rows_are_gone_is_merged_all_the_same(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    launch(world.recipe("rowless", train={"max_steps": 1}), 1)
    run = world.run_directory("rowless")
    shutil.rmtree(run / "data")
    assert merge_from_disk(find_source(run), run / "merged", max_shard_size_bytes=10**9)
    assert f"base and adapter: the rows in {run / 'data'} cannot be read" in capsys.readouterr().out


# ---- what memory there is ----


def cgroup(directory: Path, **figures: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in figures.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n", encoding="utf-8")


def test_free_memory_is_that_of_the_tightest_cgroup(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\nHugePages_Total: 0\n", encoding="utf-8")
    mine = proc / "self" / "cgroup"
    mine.write_text("0::/slurm/job_5/task_0\n", encoding="utf-8")
    assert available_bytes(proc, cgroups) == 800 * 1024, "no cgroup can be seen"
    assert limit_bytes(proc, cgroups) == 900 * 1024

    stat = "anon 1\nactive_file 30000\ninactive_file 20000"
    cgroup(cgroups / "slurm/job_5/task_0", memory__max="max", memory__current=1, memory__stat=stat)
    assert available_bytes(proc, cgroups) == 800 * 1024
    cgroup(cgroups / "slurm/job_5", memory__max=500_000, memory__current=400_000, memory__stat=stat)
    assert available_bytes(proc, cgroups) == 150_000, "pages of files are given back"
    assert limit_bytes(proc, cgroups) == 500_000, "that of the job, below the root"
    cgroup(cgroups, memory__max=300_000, memory__current=299_000, memory__stat="active_file 0\ninactive_file 0")
    assert available_bytes(proc, cgroups) == 1_000, "a container sees its own at the root"

    mine.write_text("3:cpuset:/\n4:cpu,memory:/docker/of-the-host\n0::/\n", encoding="utf-8")
    shutil.rmtree(cgroups)
    stat = "cache 9\ntotal_active_file 30000\ntotal_inactive_file 20000"
    names = {"memory__limit_in_bytes": 500_000, "memory__usage_in_bytes": 460_000, "memory__stat": stat}
    cgroup(cgroups / "memory", **names)
    assert (available_bytes(proc, cgroups), limit_bytes(proc, cgroups)) == (90_000, 500_000)
    cgroup(cgroups / "memory", **(names | {"memory__usage_in_bytes": 600_000}))
    assert available_bytes(proc, cgroups) == 0


def test_free_memory_of_this_machine() -> None:
    assert 1e6 < available_bytes() < limit_bytes() < 1e15
