"""What a micro-batch needs, against the tensors that autograd keeps and the peak of torch's allocator, on CPU."""

import functools
import gc
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from launch import activations
from launch.activations import (
    FP32_BYTES,
    Adapted,
    MicroBatch,
    Way,
    adapter_bytes,
    layer_saved_bytes,
    logits_bytes,
    passing_bytes,
    saved_bytes,
)
from launch.head import LossHead
from launch.memory import dora_numbers
from launch.sample_attention import one_by_one
from launch.shapes import Base, base_of_config
from metrics.tokens import loss_and_sums

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "phi": {"model_type": "phi", "resid_pdrop": 0.1},
}


def config_of(family: str, **sizes: Any) -> dict[str, Any]:
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    given: dict[str, Any] = {"num_key_value_heads": 4, "vocab_size": 128, "tie_word_embeddings": False}
    return given | tiny | FAMILIES[family] | sizes


def tuned(
    config: dict[str, Any], *, dropout: float, attention: str, recomputed: bool, use_dora: bool = False
) -> torch.nn.Module:
    settings = AutoConfig.for_model(**config)
    settings._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(settings).to(torch.bfloat16)
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    if recomputed:
        peft_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(peft_model, torch.nn.Module)
    return peft_model


def forward(model: torch.nn.Module, num_tokens: int, num_targets: int, *, masked: bool = True) -> torch.Tensor:
    """Logits of two packed samples, attended one by one unless `masked`."""
    half = num_tokens // 2
    positions = torch.cat([torch.arange(half), torch.arange(num_tokens - half)])[None]
    ids, kept = torch.arange(num_tokens)[None] % 100, torch.arange(num_targets)
    with nullcontext() if masked else one_by_one([half, num_tokens - half]):
        logits: torch.Tensor = model(input_ids=ids, position_ids=positions, logits_to_keep=kept, use_cache=False).logits
    return logits


def kept_by_autograd(model: torch.nn.Module, num_tokens: int, *, masked: bool = True) -> int:
    """Bytes of the tensors that a forward pass leaves for the backward pass, each storage once, no parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, num_tokens, 1, masked=masked)
    return sum(storages.values())


def terms(config: dict[str, Any], dropout: float) -> tuple[Base, Adapted]:
    base = base_of_config(config, "tiny")
    return base, Adapted({path: (inputs, 4) for path, (inputs, _) in base.linear_layers.items()}, dropout)


ALL = list(itertools.product(FAMILIES, [False, True], [0.0, 0.1], ["sdpa", "one by one", "eager"]))
FAST = {
    ("qwen2", True, 0.1, "sdpa"),
    ("qwen2", False, 0.0, "eager"),
    ("phi", True, 0.1, "sdpa"),
    ("qwen2", True, 0.1, "one by one"),
}
CASES = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("family", "is_zero3", "dropout", "attention"), CASES)
def test_a_layer_keeps_what_autograd_keeps(
    family: str, is_zero3: bool, dropout: float, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: what a model of four layers keeps more than one of two. Under ZeRO-3 DeepSpeed's linear layers."""
    if is_zero3:
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    kept, masked = [], attention != "one by one"
    for num_layers in (2, 4):
        config = config_of(family, num_hidden_layers=num_layers)
        name = attention if masked else "sdpa"
        model = tuned(config, dropout=dropout, attention=name, recomputed=False)
        kept.append(kept_by_autograd(model, 50, masked=masked))
    base, adapted = terms(config, dropout)
    way = Way(2, 2, attention == "eager", False, is_zero3)  # on a CPU a dropout's mask is of the values' type
    batch = MicroBatch(50, 50 if masked else 25, 1, 1, is_masked=masked)
    layer = layer_saved_bytes(base, adapter_bytes(base, adapted, way, is_masked=masked)[-1], batch, way)
    assert (kept[1] - kept[0]) / 2 == layer


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_dora_keeps_two_results_of_each_layer(dropout: float) -> None:
    """To the byte, for each token; what does not grow with the tokens is gone when the backward pass begins."""
    kept = {}
    for num_layers, num_tokens in ((2, 20), (2, 50), (4, 20), (4, 50)):
        model = tuned(
            config_of("qwen2", num_hidden_layers=num_layers),
            dropout=dropout,
            attention="eager",
            recomputed=False,
            use_dora=True,
        )
        kept[num_layers, num_tokens] = kept_by_autograd(model, num_tokens)
    base, adapted = terms(config_of("qwen2", num_hidden_layers=4), dropout)
    way, dora = Way(2, 2, True, False, False), replace(adapted, use_dora=True)
    adapters = adapter_bytes(base, dora, way, is_masked=True)
    layer = [layer_saved_bytes(base, adapters[-1], MicroBatch(count, count, 1, 1), way) for count in (20, 50)]
    more = [(kept[4, count] - kept[2, count]) // 2 for count in (20, 50)]
    assert more[1] - more[0] == layer[1] - layer[0]
    plain = adapter_bytes(base, adapted, way, is_masked=True)
    outputs = sum(outputs for path, (_, outputs) in base.linear_layers.items() if path.startswith("model.layers.0."))
    assert adapters[0] - plain[0] == 2 * outputs * 2


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 256), (512, 256), (256, 1024)])
def test_dora_makes_copies_of_the_weight(inputs: int, outputs: int) -> None:
    """The peak of a layer with two tokens, and the matrices that the plan counts."""
    layer = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False)).to(torch.bfloat16)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["0"], use_dora=True)
    model = get_peft_model(layer, lora, autocast_adapter_dtype=False).train()
    given = torch.randn(2, inputs, dtype=torch.bfloat16, requires_grad=True)

    def work() -> None:
        model(given).sum().backward()

    work()  # what is made once
    assert dora_numbers((inputs, outputs)) * 2 <= peak_bytes(work) <= dora_numbers((inputs, outputs)) * 2 * 1.02


def test_code_of_their_own_keeps_what_was_counted() -> None:
    """Bytes of a token counted once (launch/activations.py): layers 64 wide, MLPs 176, four heads, 80 columns, r = 4.

    The code that they were counted with is not here. Formulas say a little more.
    """
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 512}
    groups = {"multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 16, "add_qkv_bias": True}
    counted: list[tuple[dict[str, Any], float, float]] = [
        ({"model_type": "BlueLM", "intermediate_size": 176}, 5568.025, 7072.025),
        ({"model_type": "baichuan", "intermediate_size": 176, "max_position_embeddings": 256}, 3328, 4448),
        ({"model_type": "baichuan", "intermediate_size": 176, "model_max_length": 256}, 4272.025, 5264.025),
        ({"model_type": "chatglm", "ffn_hidden_size": 176, **groups}, 3160, 4024),
        ({"model_type": "chatglm", "inner_hidden_size": 176}, 6520, 7256),
    ]
    for config, plain, dropped in counted:
        for dropout, bytes_of_a_token in ((0.0, plain), (0.1, dropped)):
            base, adapted = terms(sizes | config, dropout)
            way = Way(2, 2, False, False, False)
            layer = layer_saved_bytes(
                base, adapter_bytes(base, adapted, way, is_masked=True)[-1], MicroBatch(160, 80, 1, 1), way
            )
            assert 0 <= layer / 160 - bytes_of_a_token <= FP32_BYTES * (base.num_heads + base.head_dim + 6)


def test_recomputed_layers_keep_their_inputs() -> None:
    kept = []
    for num_layers in (2, 4):
        config = config_of("qwen2", num_hidden_layers=num_layers)
        kept.append(kept_by_autograd(tuned(config, dropout=0.1, attention="sdpa", recomputed=True), 50))
    assert (kept[1] - kept[0]) / 2 == 50 * 64 * 2


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator has given out at a time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "num_targets", "attention", "recomputed"),
    [
        ("qwen2", {}, 8, "sdpa", True),
        ("qwen2", {}, 8, "sdpa", False),
        ("qwen2", {}, 8, "eager", True),
        ("qwen2", {}, 8, "one by one", True),
        ("llama", {}, 8, "one by one", False),
        ("phi", {}, 8, "sdpa", True),
        ("qwen2", {"vocab_size": 8000}, 256, "sdpa", True),  # the logits are largest
        ("qwen2", {"vocab_size": 8000}, 256, "one by one", True),
        ("phi", {"vocab_size": 2000}, 256, "sdpa", False),
    ],
)
def test_the_peak_of_a_micro_batch_is_within_a_fifth(
    family: str,
    sizes: dict[str, Any],
    num_targets: int,
    attention: str,
    recomputed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never more than predicted; a head that has the loss makes the logits of 100 positions of 8,000 at a time."""
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 800_000)
    wide = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 512}
    config = config_of(family, **wide | sizes)
    as_in_runs = attention == "one by one"  # and the loss within the head
    model = tuned(config, dropout=0.1, attention="sdpa" if as_in_runs else attention, recomputed=recomputed)
    targets = torch.arange(num_targets) % 100
    head = LossHead(model.get_base_model().get_output_embeddings(), 800_000 // config["vocab_size"])

    def work() -> None:
        if as_in_runs:
            with head.judges(torch.zeros_like(targets), torch.arange(num_targets), targets, num_targets):
                loss = forward(model, 256, num_targets, masked=False)[0, :, 0].sum()
        else:
            logits = forward(model, 256, num_targets)[0]
            loss = loss_and_sums(logits, targets)[0]
            del logits  # as in launch.packing, which returns
        loss.backward()
        model.zero_grad()

    work()  # what is made once
    measured = peak_bytes(functools.partial(work))
    base, adapted = terms(config, 0.1)
    way = Way(2, 2, attention == "eager", recomputed, False)
    batch = MicroBatch(256, 256, num_targets, num_targets, is_masked=not as_in_runs, is_judged_in_head=as_in_runs)
    adapters = adapter_bytes(base, adapted, way, is_masked=not as_in_runs)
    largest = max(passing_bytes(base, adapters, batch, way), logits_bytes(base, batch, way))
    predicted = saved_bytes(base, adapters, batch, way) + largest
    assert 0.98 * measured <= predicted <= 1.2 * measured


def test_logits_beside_those_of_trained_tokens() -> None:
    """Padded rows have logits at every column; a model's own code makes them fp32."""
    base = terms(config_of("qwen2"), 0.0)[0]
    way = Way(2, 1, False, False, False)
    assert logits_bytes(base, MicroBatch(100, 100, 40, 40), way) == 40 * 128 * 12
    assert logits_bytes(base, MicroBatch(100, 50, 40, 100), way) == 40 * 128 * 12 + 60 * 128 * 2
    own = base_of_config(config_of("llama") | {"model_type": "BlueLM"}, "own")
    assert logits_bytes(own, MicroBatch(100, 50, 40, 100), way) == 40 * 128 * 12 + 60 * 128 * 4
