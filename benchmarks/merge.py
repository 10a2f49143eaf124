"""What merging costs: cairn's merge from disk beside PEFT's merge_and_unload + save_pretrained, and beside `cp`.

Every side runs in a process of its own, in turn, warm and cold. The times count only when cairn's weights are bitwise
those of PEFT's merge in fp32, rounded once. See benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from prepare_rows import machine  # noqa: E402
from sides import forget_peak, in_new_process, peak_mib  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from launch.merge_from_disk import find_source, merge_from_disk  # noqa: E402
from launch.shards import read_model  # noqa: E402
from launch.table import format_bytes  # noqa: E402
from launch.tiny import build_tiny_tokenizer  # noqa: E402

ROWS = ROOT / "configs/data/tiny_chat.jsonl"
WIDTH, INTERMEDIATE, VOCAB = 2048, 5632, 32_000
SHARD_BYTES = 300_000_000
MAX_TIMES, MAX_MIB = 1.2, 200  # of the seconds of cp and read together; above the imports


def make(work: Path, gigabytes: float) -> None:
    """A random Qwen2 in fp16 in shards, and a random LoRA on all of its linear layers."""
    per_layer = 4 * WIDTH**2 + 3 * WIDTH * INTERMEDIATE
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * WIDTH) / per_layer))
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        bos_token_id=None,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(work / "base", max_shard_size=SHARD_BYTES)
    build_tiny_tokenizer(ROWS).save_pretrained(work / "base")
    adapter = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", base_model_name_or_path=""))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    adapter.peft_config["default"].base_model_name_or_path = str(work / "base")
    adapter.save_pretrained(str(work / "adapter"))


# ---- the sides: each leaves its result in `out` ----


def cairn(work: Path, out: Path) -> None:
    """`python -m launch merge`, its imports done."""
    merge_from_disk(find_source(work / "adapter"), out, max_shard_size_bytes=SHARD_BYTES)


def peft(dtype: torch.dtype) -> Callable[[Path, Path], None]:
    """What PEFT's documentation does, in this type."""

    def merge(work: Path, out: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=dtype)
        merged = PeftModel.from_pretrained(base, str(work / "adapter")).merge_and_unload()
        merged.half().save_pretrained(out, max_shard_size=SHARD_BYTES)

    return merge


def copy(work: Path, out: Path) -> None:
    """The base's files, synced: what the disk alone takes."""
    out.mkdir()
    for path in (work / "base").iterdir():
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())


def read(work: Path, out: Path) -> None:
    """The base's files once, from the first byte to the last."""
    out.mkdir()
    block = bytearray(1 << 20)
    for path in (work / "base").glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


SIDES: dict[str, Callable[[Path, Path], None]] = {
    "cairn": cairn,
    "peft, fp16": peft(torch.float16),
    "peft, fp32": peft(torch.float32),
    "cp": copy,
    "read": read,
}


def run(side: str, work: Path, out: Path) -> dict[str, float]:
    """One side: seconds, those of the CPU, and peak resident memory above that of the imports."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # PEFT's of transformers, over and over
    before = forget_peak()
    begin, begin_cpu = time.monotonic(), time.process_time()
    SIDES[side](work, out)
    seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - begin_cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": peak_mib() - before}


def forget_pages(directory: Path) -> None:
    """The next reader of these files reads from the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def first_difference(one: Path, other: Path) -> str | None:
    """The first tensor of two models that is not the same in every bit."""
    expected, found = read_model(one), read_model(other)
    if expected.keys() != found.keys():
        return str(sorted(expected.keys() ^ found.keys())[0])
    return next((name for name in expected if not torch.equal(expected[name].whole(), found[name].whole())), None)


# ---- the whole ----


def measure(options: argparse.Namespace, gigabytes: float, work: Path) -> list[dict[str, Any]]:
    """Every side in turn, `repeats` times, warm and cold; the gate first."""
    make(work, gigabytes)
    size_bytes = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    num_shards = len(list((work / "base").glob("*.safetensors")))
    print(f"{format_bytes(size_bytes)} in {num_shards} shards", flush=True)
    for side in ("cairn", "peft, fp32"):
        in_new_process(run, side, work, work / side)
    difference = first_difference(work / "peft, fp32", work / "cairn")
    if difference:
        sys.exit(f"{difference} of cairn's merge is not that of PEFT in fp32.")
    for side in ("cairn", "peft, fp32"):
        shutil.rmtree(work / side)
    results = []
    for cache in ("warm", "cold"):
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                if cache == "cold":
                    forget_pages(work / "base")
                runs[side].append(in_new_process(run, side, work, work / "out"))
                shutil.rmtree(work / "out")
        for side, repeats in runs.items():
            seconds = [one["seconds"] for one in repeats]
            cpu_seconds = statistics.median(one["cpu_seconds"] for one in repeats)
            mib = max(one["mib"] for one in repeats)
            figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": mib}
            results.append({"bytes": size_bytes, "cache": cache, "side": side, **figures})
            low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
            times = f"{middle:7.2f} s  {f'({low:.2f} - {high:.2f})':17} {cpu_seconds:7.2f} CPU s"
            print(f"  {cache}  {side:12} {times} {mib:8,.0f} MiB", flush=True)
    return results


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0], help="of the base in fp16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as directory:
            results += measure(options, gigabytes, Path(directory))
    if options.json:
        about = {"machine": machine(), "versions": {"python": platform.python_version(), "torch": torch.__version__}}
        options.json.write_text(json.dumps(about | {"results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
