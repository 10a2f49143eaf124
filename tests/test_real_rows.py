"""300 steps on rows that nobody here wrote: the loss falls and every row has its outcome."""

import json
from pathlib import Path
from statistics import mean

import pytest
from conftest import SHARED_DATA, World, build_base, launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["huanhuan", "alpaca_zh_demo"])
def test_300_steps_on_real_rows(name: str, tmp_path: Path) -> None:
    source = SHARED_DATA / f"{name}.json"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    rows = json.loads(source.read_text(encoding="utf-8"))
    texts = [row["instruction"] + row["input"] + row["output"] for row in rows]
    world = World(tmp_path, build_base(tmp_path / "base", texts, vocab_size=3000), source)
    recipe = world.recipe(
        name,
        data={"template": "qwen2", "max_length": 2048, "test_size": 100},
        adapter={"r": 8, "modules_to_save": ["embed_tokens", "lm_head"]},
        train={
            "max_steps": 300,
            "global_batch_size": 16,
            "max_tokens_per_micro_batch": 2048,
            "learning_rate": 5e-3,
            "warmup_steps": 20,
            "logging_steps": 25,
            "eval_steps": 100,
            "save_steps": 150,
        },
    )
    launch(recipe, 2)
    report = json.loads((world.run_directory(name) / "data_report.json").read_text(encoding="utf-8"))
    assert report["rows"] == len(rows)
    assert report["outcomes"] == {"trained": len(rows) - 100, "evaluated": 100}
    losses = [record["loss"] for record in world.metrics(name, "evaluation")]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True), f"the held-out loss must fall at every evaluation: {losses}"
    curve = [record["loss"] for record in world.metrics(name, "train")]
    assert mean(curve[-3:]) < 0.8 * curve[0]
    print(f"{name}: held-out loss {' '.join(f'{loss:.3f}' for loss in losses)}")
