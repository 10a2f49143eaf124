"""Writes docs/plans.md: `python tests/plans_page.py > docs/plans.md`, in the checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.config import load_recipe
from launch.hardware import find_hardware
from launch.plan import choices, find_base, make_case, recommend
from launch.plan_report import plan_lines

CONFIGS = Path("tests/model_configs")
RECIPES = Path("configs/recipes")
PLANNED = {
    "qwen1.5-14b-lora": "qwen1.5-14b-chat.json",
    "qwen2-7b-lora": "qwen2-7b-instruct.json",
    "phi-2-qlora": "phi-2.json",
    "bluelm-7b-lora": "bluelm-7b-chat.json",
    "chatglm-6b-own-model": "chatglm-6b.json",
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

BlueLM and ChatGLM have code of their own: what their layers keep was counted with public copies of it on a CPU
(`launch/activations.py`). chatglm-6b-own-model is planned as if its module were ChatGLM-6B.

## Why there is no ZeRO-1

With a frozen base ZeRO-1 differs from ZeRO-2 by the gradients of the adapter: it reduces them once a step instead of
once a micro-batch, and every GPU keeps their whole fp32 sum instead of its share. Seen on two CPU ranks with 7,424
trained parameters and four micro-batches a step: in fp16 a rank handed 59,392 bytes a step to collectives, under
ZeRO-2 103,936; the sum took 29,696 bytes; in fp32 losses and weights were the same to 4e-7. For the 14B model below
that saves a GPU 47 MB a micro-batch, 4 to 7 ms over PCIe of the seconds that one takes, for 94 MB of its memory. In
bf16 DeepSpeed 0.19.8 runs ZeRO-1 by another optimizer, whose state cannot be saved for another number of ranks, so
that a start refuses it. One layout that V100s and A100s share is worth more than these milliseconds.
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
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
