"""bitsandbytes is imported for a base in 4 bits, and for no other."""

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
LEFT_OUT = "from launch.imports import leave_out_bitsandbytes; leave_out_bitsandbytes(sys.argv[1:])"


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", *arguments], cwd=HOUSE, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        ([], "left out"),
        (["configs/recipes/qwen1.5-14b-lora.yaml"], "left out"),
        (["configs/recipes/qwen1.5-14b-lora.yaml", "model.load_in_4bit=true"], "as it was"),
        (["configs/recipes/phi-2-qlora.yaml"], "as it was"),
        (["no-such-recipe.yaml"], "left out"),
    ],
)
def test_the_recipe_decides(arguments: list[str], state: str) -> None:
    """One that does not load is refused soon after; that takes no bitsandbytes."""
    tell = "print('left out' if sys.modules.get('bitsandbytes', 0) is None else 'as it was')"
    assert run(f"{LEFT_OUT}; {tell}", *arguments) == state


@pytest.mark.slow
def test_peft_does_without() -> None:
    """Neither it nor transformers sees a package that is not there, and torch's compiler stays on the disk."""
    tell = """
from peft import LoraConfig, get_peft_model
from peft.import_utils import is_bnb_available
from torch.nn import Linear, Sequential
from transformers.utils import is_bitsandbytes_available
get_peft_model(Sequential(Linear(2, 2)), LoraConfig(target_modules=["0"]))
found = [is_bnb_available(), is_bitsandbytes_available(), "torch._inductor.compile_fx" in sys.modules]
print(found)"""
    assert run(f"{LEFT_OUT}{tell}") == "[False, False, False]"
    assert run(f"{LEFT_OUT}{tell}", "configs/recipes/phi-2-qlora.yaml") == "[True, True, True]"
