"""Writes docs/plans.md: `python tests/plans_page.py > docs/plans.md`, in the checkout."""

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.config import load_recipe
from launch.errors import ModelError
from launch.hardware import find_hardware
from launch.plan import choices, find_base, make_case, recommend
from launch.plan_report import plan_lines

CONFIGS = Path("tests/model_configs")
RECIPES = Path("configs/recipes")
PLANNED = {
    "qwen1.5-14b-lora": "qwen1.5-14b-chat.json",
    "qwen2-7b-lora": "qwen2-7b-instruct.json",
    "phi-2-qlora": "phi-2.json",
}
OPTIONS = {"gpu": "v100-32gb", "gpus": "4", "nodes": "1", "host-memory": "380GB", "interconnect": "pcie"}

HEAD = """# Plans of the shipped recipes on 4 x V100-32GB

What `python -m launch plan` says, written by `python tests/plans_page.py`; a test compares it with this page. Bytes are
computed by formulas whose terms are tested against DeepSpeed, bitsandbytes and torch on a CPU: the shares of ZeRO-2 and
ZeRO-3 are equal, and the peak of a whole micro-batch (6 layers, bf16, 2 ranks) was 4 % below the sum without gradient
checkpointing, 10 % below with it. **Nothing was measured on a GPU**, and seconds are a range between two assumptions
(`launch/speed.py`). For another recipe:

```
{command} RECIPE.yaml
```
"""


def options() -> str:
    """As on the command line."""
    return " ".join(f"--{name} {value}" for name, value in OPTIONS.items())


def page() -> str:
    """The whole page."""
    hardware = find_hardware(OPTIONS["gpu"], 4, 1, OPTIONS["host-memory"], OPTIONS["interconnect"])
    parts = [HEAD.format(command=f"python -m launch plan {options()}")]
    for name, config in PLANNED.items():
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        case = make_case(recipe, find_base(recipe, CONFIGS / config), hardware, 1.0)
        found = choices(case)
        text = plan_lines(case, found, recommend(case, found), [str(RECIPES / f"{name}.yaml")])
        parts.append(f"## {name}\n\nPlanned by the figures of `{CONFIGS / config}`.\n\n```\n{text}\n```\n")
    try:
        find_base(load_recipe(RECIPES / "chatglm-6b-own-model.yaml"), None)
    except ModelError as error:
        parts.append(f"## chatglm-6b-own-model\n\n{textwrap.fill(f'Not planned: {error}', 120)}\n")
    parts.append(
        "## bluelm-7b-lora\n\nNot planned here: the figures of its `config.json` are not known for certain. Where the\n"
        "hub is in reach, the command above fetches that file; the layers are then taken to be Llama's.\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
