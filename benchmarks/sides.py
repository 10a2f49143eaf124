"""One run of the benchmark of prepare_rows.py, in a process of its own: `sides.py WORK TASK ...`, which that calls.

A side imports, loads the tokenizer, is timed from the JSONL on disk to token ids and masks on disk, and then leaves the
result as arrays for the comparison. TRL's side runs in an environment that has none of this project's packages.
"""

import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
FILES = ("alpaca_zh_demo.json", "huanhuan.json")  # columns: instruction, input, output
TEMPLATE = "qwen2"
MAX_VOCAB_SIZE = 48_000
LONG = 1_000_000  # tokens: no side cuts or drops a row
CORES = len(os.sched_getaffinity(0))
LIBRARIES = ("transformers", "tokenizers", "datasets", "trl", "torch", "numpy", "pyarrow")

Arrays = dict[str, npt.NDArray[Any]]  # ids [tokens], is_trained [tokens], lengths [rows]
Export = Callable[[], Arrays]  # what a run left on disk
Timed = Callable[[], Export]


# ---- what all sides start from ----


def make(work: Path, source: Path, num_rows: int) -> None:
    """`rows.jsonl`, no two rows equal, and `base`, a model directory with a tokenizer trained on the source's texts."""
    from transformers import Qwen2Config

    pairs = questions_and_answers(source)
    with (work / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, (question, answer) in enumerate(islice(cycle(pairs), num_rows), start=1):
            file.write(json_row(f"{number}. {question}", answer))
    tokenizer = build_tokenizer(pairs, MAX_VOCAB_SIZE)
    tokenizer.save_pretrained(work / "base")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(work / "base")


def questions_and_answers(source: Path) -> list[tuple[str, str]]:
    """Of the two files, in their order."""
    rows = [row for name in FILES for row in json.loads((source / name).read_text(encoding="utf-8"))]
    return [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]


def json_row(question: str, answer: str) -> str:
    """A line of JSONL."""
    turns = (("user", question), ("assistant", answer))
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def build_tokenizer(pairs: Sequence[tuple[str, str]], max_vocab_size: int) -> Any:
    """A byte-level BPE trained on these texts, with Qwen2's class, special tokens and chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer({}, []).backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in pairs for text in pair], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        learned["vocab"],
        [(left, right) for left, right in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = (ROOT / f"templates/chat/{TEMPLATE}.jinja").read_text(encoding="utf-8")
    return tokenizer


# ---- the sides: imports and the tokenizer first, then what is timed, then what it left ----


def cairn(work: Path, run: Path) -> Timed:
    """`prepare` and `publish`, as train.py calls them; in the directory of an earlier run, a second start."""
    sys.path.insert(0, str(ROOT))
    from launch.data import prepare
    from launch.model import tokenizer_and_template
    from launch.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(work / "base")},
            "data": {"train": str(work / "rows.jsonl"), "template": TEMPLATE, "test_size": 0.0, "max_length": LONG},
            "train": {"max_tokens_per_micro_batch": LONG},
            "run": {"name": "benchmark"},
        }
    )
    tools = tokenizer_and_template(recipe)

    def timed() -> Export:
        prepared = prepare(recipe, run, lambda: tools).publish(run)

        def export() -> Arrays:
            samples = prepared.samples("train")
            assert (samples.starts == np.cumsum(samples.lengths) - samples.lengths).all(), "not in file order"
            return {"ids": samples.token_ids, "is_trained": samples.is_trained, "lengths": samples.lengths}

        return export

    return timed


def datasets_map(work: Path, run: Path, *, num_proc: int, batched: bool = False) -> Timed:
    """`load_dataset("json")` and a map of `apply_chat_template`, into a cache of its own."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work / "base")

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(rows["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    def timed() -> Export:
        rows = datasets.load_dataset("json", data_files=str(work / "rows.jsonl"), split="train", cache_dir=str(run))
        encoded = rows.map(encode, batched=batched, num_proc=num_proc, remove_columns=["messages"])
        return lambda: _columns(encoded, "assistant_masks")

    return timed


def trl(work: Path, run: Path) -> Timed:
    """`SFTTrainer._prepare_dataset` on all cores; its constructor, which calls that too, is given a few rows before."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    args = SFTConfig(
        output_dir=str(run / "output"),
        assistant_only_loss=True,
        max_length=None,  # saves TRL two passes over the rows
        dataset_num_proc=CORES,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    with (work / "rows.jsonl").open(encoding="utf-8") as lines:
        some = datasets.Dataset.from_list([json.loads(line) for line in islice(lines, CORES)])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work / "base"))
    trainer = SFTTrainer(model, args, train_dataset=some, processing_class=tokenizer)

    def timed() -> Export:
        rows = datasets.load_dataset("json", data_files=str(work / "rows.jsonl"), split="train", cache_dir=str(run))
        prepared = trainer._prepare_dataset(rows, tokenizer, args, args.packing, None, "train")
        return lambda: _columns(prepared, "labels")

    return timed


def _columns(dataset: Any, mask_column: str) -> Arrays:
    assert dataset._indices is None, "not in file order"
    ids, masks = (dataset.data.column(name).combine_chunks() for name in ("input_ids", mask_column))
    mask = masks.flatten().to_numpy()
    return {
        "ids": ids.flatten().to_numpy(),
        "is_trained": mask != -100 if mask_column == "labels" else mask != 0,
        "lengths": ids.value_lengths().to_numpy(),
    }


SIDES: dict[str, Callable[[Path, Path], Timed]] = {
    "cairn": cairn,
    "datasets, 1 process": partial(datasets_map, num_proc=1),
    f"datasets, {CORES} processes": partial(datasets_map, num_proc=CORES),
    f"datasets, {CORES} pr., batched": partial(datasets_map, num_proc=CORES, batched=True),
    f"TRL, {CORES} processes": trl,
}


# ---- one run, in a process of its own ----


def run_side(side: str, work: Path, run: Path) -> None:
    """Prepare once; figures and results go into `run`."""
    timed = SIDES[side](work, run)
    before = cpu_seconds()
    start = time.perf_counter()
    export = timed()
    seconds = time.perf_counter() - start
    cpu = cpu_seconds() - before
    own, of_children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    for name, array in export().items():
        kind = {"ids": np.int32, "is_trained": np.bool_, "lengths": np.int64}[name]
        np.save(run / f"{name}.npy", np.asarray(array, kind))
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": own.ru_maxrss / 1024,
        "peak_mib_of_a_child": of_children.ru_maxrss / 1024,
        "versions": versions(),
    }
    (run / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def in_new_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What it returns; the process is a new one, not a fork, which would share, and break, this one's threads."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, *arguments))
    child.start()
    sender.close()
    found: dict[str, float] = receiver.recv()
    child.join()
    return found


def _send(sender: Any, function: Callable[..., dict[str, float]], *arguments: Any) -> None:
    sender.send(function(*arguments))


def forget_peak() -> float:
    """The peak begins anew at what is resident now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mib()


def peak_mib() -> float:
    """Peak resident memory of this process; what getrusage says goes back to before its exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def middle(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The step of median seconds, whose parts add up."""
    return sorted(steps, key=lambda step: step["seconds"])[(len(steps) - 1) // 2]


def versions() -> dict[str, str]:
    """Of what this process runs on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    directory, task, *arguments = sys.argv[1:]
    if task == "make":
        make(Path(directory), Path(arguments[0]), int(arguments[1]))
    else:
        run_side(task, Path(directory), Path(arguments[0]))
