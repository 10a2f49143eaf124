"""Tiny real models, tokenizers and rows, and ranks forked from one process that has already imported everything."""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import train
from launch import engine as engines
from launch import preemption, runs
from launch.adapter import add_adapter
from launch.model import DTYPES, enable_gradient_checkpointing, load_base
from launch.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
RANK_TIMEOUT_SECONDS = 1200  # of ranks that hang; the slowest that do not take two minutes
ON_DISK = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
# Below those that Linux gives of itself (net.ipv4.ip_local_port_range); each worker of pytest-xdist has its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_PORTS = itertools.cycle(range(30_000 + _WORKER, 32_768, _NUM_WORKERS))
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def build_tokenizer(texts: list[str], vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_base(
    directory: Path, texts: list[str], *, family: str = "qwen2", tied: bool = False, vocab_size: int = 600
) -> Path:
    """A random model with weights large enough that its samples matter to each other."""
    tokenizer = build_tokenizer(texts, vocab_size)
    torch.manual_seed(0)
    model: torch.nn.Module
    if family == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                initializer_range=0.2,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    else:
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=2048,
                word_embed_proj_dim=32,
                init_std=0.2,
                dropout=0.0,
                bos_token_id=None,
                pad_token_id=0,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return directory


def build_remote_base(directory: Path, texts: list[str]) -> Path:
    """A random model whose code, tests/remote_code, transformers does not have, with a slow SentencePiece tokenizer."""
    shutil.copytree(ROOT / "tests" / "remote_code", directory, ignore=shutil.ignore_patterns("__pycache__"))
    with (directory / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=2000,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.98,
            minloglevel=2,
        )
    classes = {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}
    tokenizer = {"tokenizer_class": "TinyTokenizer", "auto_map": classes}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    classes = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    model_class = get_class_from_dynamic_module("modeling_tiny.TinyForCausalLM", str(directory))
    vocab_size = SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).get_piece_size()
    torch.manual_seed(0)
    config = model_class.config_class(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, auto_map=classes)
    model_class(config).save_pretrained(str(directory))
    return directory


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Question/answer rows of very different lengths, Chinese and English."""
    generator = torch.Generator().manual_seed(seed)
    words = "石 头 路 标 回 来 走 一 个 cairn stone way back path hill north three old grey rain".split()
    rows = []
    for number in range(count):
        picks = torch.randint(len(words), (24,), generator=generator).tolist()
        ask, answer = 1 + picks[0] % 9, 1 + picks[1]
        rows.append(
            {
                "input": f"{number} " + " ".join(words[i] for i in picks[:ask]),
                "output": " ".join(words[i] for i in picks[2 : 2 + answer]),
            }
        )
    return rows


@dataclass(frozen=True)
class World:
    """A base model, rows, and recipes that use them."""

    directory: Path
    base: Path
    rows: Path

    def recipe(self, name: str, **blocks: dict[str, Any]) -> Path:
        """Write a recipe for a run called `name`; blocks are merged over small defaults without dropout."""
        tree: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(self.base)},
            "data": {"train": str(self.rows), "template": "chatml", "max_length": 128, "test_size": 10},
            "adapter": {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
            "train": {
                "global_batch_size": 8,
                "max_steps": 4,
                "learning_rate": 1e-2,
                "max_tokens_per_micro_batch": 256,
                "logging_steps": 1,
                "warmup_steps": 1,
            },
            "run": {"name": name, "output_dir": str(self.directory / "runs"), "merge": False},
        }
        for block, values in blocks.items():
            is_other_adapter = "type" in values and block == "adapter"
            tree[block] = values if is_other_adapter else tree[block] | values
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def run_directory(self, name: str) -> Path:
        """Where the run called `name` lives."""
        return self.directory / "runs" / name

    def metrics(self, name: str, kind: str) -> list[dict[str, Any]]:
        """The metrics of one kind."""
        return [record for record in runs.read_metrics(self.run_directory(name)) if record["kind"] == kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Qwen2 and 50 rows."""
    directory = tmp_path_factory.mktemp("world")
    rows = make_rows(50)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_base(directory / "base", [row["input"] + row["output"] for row in rows])
    return World(directory, base, directory / "rows.jsonl")


def deepspeed_json(directory: Path, stage: int = 3, **fp16: Any) -> Path:
    """The shipped DeepSpeed configuration at another ZeRO stage, or with other fp16 settings.

    Nothing is too small to be partitioned: at the shipped threshold, every tensor of a tiny model would stay whole.
    """
    settings = json.loads((ROOT / "configs/deepspeed/zero3_offload.json").read_text(encoding="utf-8"))
    settings["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage < 3:
        del settings["zero_optimization"]["offload_param"]
    settings["fp16"] |= fp16
    path = directory / f"zero{stage}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def free_port() -> int:
    """Another one each time, and none that a test beside this one or the system itself gives to somebody else."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, deepspeed: Path | None = None
) -> list[tuple[Any, Any]]:
    """`function(*arguments)` on forked ranks in the environment that accelerate launch gives; (process, pipe) each."""
    port = free_port()
    config = deepspeed or deepspeed_json(Path(tempfile.mkdtemp()))
    context = multiprocessing.get_context("fork")
    children = []
    for rank in range(num_ranks):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": config,
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        }
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_be_a_rank, args=(environment, sender, function, arguments), daemon=True)
        child.start()
        sender.close()
        children.append((child, receiver))
    return children


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    deepspeed: Path | None = None,
    timeout_seconds: float = RANK_TIMEOUT_SECONDS,
) -> list[Any]:
    """`start_ranks`, and the results by rank."""
    children = start_ranks(num_ranks, function, *arguments, deepspeed=deepspeed)
    results = []
    for child, receiver in children:
        succeeded, result = False, "a rank ended without a result, or hung"
        if receiver.poll(timeout_seconds):
            try:
                succeeded, result = receiver.recv()
            except EOFError:
                child.join(5)
                result = f"a rank ended with exit code {child.exitcode} and no result"
        if not succeeded:
            for other, _ in children:
                other.kill()
            raise AssertionError(result)
        results.append(result)
    for child, _ in children:
        child.join(60)
    return results


def _be_a_rank(
    environment: dict[str, Any], sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    preemption.end_with_parent()  # as train.py does where it is started
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)  # replaces the thread pool that the fork broke: threads that load weights race to do so
    try:
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)  # pytest's own exit handlers belong to the parent


def launch(recipe: Path, num_ranks: int, *overrides: str, deepspeed: Path | None = None) -> None:
    """train.py's main on forked ranks; every rank must succeed."""
    assert run_ranks(num_ranks, train.main, [str(recipe), *overrides], deepspeed=deepspeed) == [0] * num_ranks


def engine_of(recipe: Recipe, precision: str) -> engines.Engine:
    """Around base and adapter, as a run makes it; on a rank."""
    accelerator = engines.create_accelerator(recipe, precision)
    base = load_base(recipe.model.name_or_path, recipe.model, precision)
    model = add_adapter(base, recipe.adapter, base=recipe.model.name_or_path, seed=0, dtype=DTYPES[precision])
    if recipe.train.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return engines.start_engine(accelerator, model, recipe.train)


def killed_before(number: int, where: str, work: Callable[[], object]) -> int:
    """Do this; the process kills itself before the `number`th thing that it does to a path with `where` in it.

    That is: make, write, rename, remove. How many there were, if it lives (0: none kills).
    """
    seen = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ON_DISK or not details or where not in str(details[0]):
            return
        if event == "open" and not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)):
            return  # for reading
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()
    return seen
