"""Packed samples attended one by one are those alone, in value, gradient and memory; other calls stay as they were."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from test_activations import peak_bytes
from test_head import SIZES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mistral import modeling_mistral

from launch import sample_attention
from launch.errors import ModelError
from launch.packing import probe
from launch.sample_attention import one_by_one
from launch.samples import Samples

LENGTHS = [9, 1, 14, 5]


def model_of(family: str, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | more))
    return model


def packed_and_alone(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """[seq, vocab] of the samples in one row, and of each by itself."""
    samples = [torch.randint(3, 100, (1, length), generator=torch.manual_seed(length)) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with one_by_one(LENGTHS):
        together = model(input_ids=torch.cat(samples, 1), position_ids=positions, use_cache=False).logits[0]
    return together, torch.cat([model(input_ids=sample, use_cache=False).logits[0] for sample in samples])


@pytest.fixture
def count_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that sdpa was called with by the project's function."""
    seen: list[int] = []
    real = sample_attention.scaled_dot_product_attention

    def watched(query: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        output: torch.Tensor = real(query, *given, **named)
        return output

    monkeypatch.setattr(sample_attention, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen2", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("phi", {"num_key_value_heads": 4}),
        ("glm", {"head_dim": 8}),
        ("mistral", {"head_dim": 8, "sliding_window": 14}),
    ],
)
def test_packed_samples_are_those_alone(
    family: str, more: dict[str, Any], grouped: bool, count_samples: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where sdpa gets all heads, as GPUs without grouped kernels want; a window no shorter hides nothing."""
    monkeypatch.setattr(sample_attention, "groups_heads", lambda query, value: grouped)
    together, alone = packed_and_alone(model_of(family, **more).eval())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert count_samples == LENGTHS * 2


@pytest.mark.parametrize("tells_positions", [True, False])
def test_a_window_shorter_than_a_sample_is_masked(
    tells_positions: bool, count_samples: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the sample, also where a model makes its mask without positions, as Afmoe does."""
    real = modeling_mistral.create_sliding_window_causal_mask
    if not tells_positions:
        monkeypatch.setattr(
            modeling_mistral,
            "create_sliding_window_causal_mask",
            lambda **given: real(**given | {"position_ids": None}),
        )
    model = model_of("mistral", head_dim=8, sliding_window=5).eval()
    together, alone = packed_and_alone(model)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert count_samples == []
    assert (packed_and_alone(model_of("mistral", head_dim=8, sliding_window=None).eval())[0] - alone).abs().max() > 0.1


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_the_samples_alone(recomputed: bool) -> None:
    """The backward pass, which computes layers again, comes when no samples are packed any more."""
    found = []
    for which in (0, 1):
        model = model_of("qwen2").train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        packed_and_alone(model)[which].square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4)


def test_no_matrix_of_all_pairs_is_made() -> None:
    """2,048 tokens in 16 samples: a mask in fp32 takes 17 MB, one for each layer, and is not there."""
    model, lengths = model_of("qwen2").eval(), [128] * 16
    ids, positions = torch.ones(1, 2048, dtype=torch.int64), torch.arange(128).repeat(16)[None]
    kept = torch.zeros(1, dtype=torch.int64)

    @torch.no_grad()
    def work(given: list[int]) -> None:
        with one_by_one(given):
            model(input_ids=ids, position_ids=positions, logits_to_keep=kept, use_cache=False)

    work(lengths)  # what is made once
    assert peak_bytes(functools.partial(work, lengths)) < 6e6 < 20e6 < peak_bytes(functools.partial(work, []))


def test_other_calls_are_as_they_were() -> None:
    """A row of another length inside, padding, and everything outside: transformers' own, bit by bit."""
    model = model_of("qwen2").eval()
    ids, mask = torch.randint(3, 100, (2, 12), generator=torch.manual_seed(0)), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    with torch.no_grad():
        expected = [model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids[:1]).logits]
        with one_by_one([7, 5]):
            padded = model(input_ids=ids, attention_mask=mask).logits
        with one_by_one([7, 6]):
            single = model(input_ids=ids[:1]).logits
    assert torch.equal(padded, expected[0]) and torch.equal(single, expected[1])
    query = torch.randn(1, 4, 12, 8)
    one = sample_attention._attention(model, query, query, query, None)[0]
    assert torch.equal(one, sdpa_attention_forward(model, query, query, query, None)[0])


def test_a_model_that_computes_with_the_mask_is_refused_in_a_sentence() -> None:
    """Doge adds what it has learned to the mask."""
    model = model_of("doge", num_key_value_heads=4)
    lengths = np.array([9, 9])
    samples = Samples(np.arange(18, dtype=np.int32), np.ones(18, np.bool_), np.array([0, 9]), lengths, lengths)
    with pytest.raises(ModelError, match=r"^This model takes no packed rows \(.*\); set train.packing=off\.$"):
        probe("auto", 0, model, model, samples, torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"softcap": 30.0}, "softcap"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_what_sdpa_would_do_besides_is_not_left_out_silently(asked: dict[str, Any], name: str) -> None:
    """A bias of positions (Inkling) may be too small for the probe to notice."""
    query, lengths = torch.randn(1, 4, 12, 8), torch.tensor([7, 5])[None, None, None]
    with pytest.raises(ModelError, match=rf"^Linear asks its attention for {name}.*; set train.packing=off\.$"):
        sample_attention._attention(torch.nn.Linear(1, 1), query, query, query, lengths, **asked)


class NeedsItsMask(torch.nn.Module):
    """A user's own; as most of them it takes no position_ids."""

    def __init__(self, *, says_its_head: bool) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100)
        self.requires_grad_(False)
        if says_its_head:
            self.get_output_embeddings = lambda: self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(input_ids) * attention_mask[..., None])
        return logits


@pytest.mark.parametrize("says_its_head", [True, False])
def test_a_padded_model_is_probed_as_it_is_trained(says_its_head: bool) -> None:
    """With a mask, which it may need; and not at all where there is nothing to learn."""
    model, lengths = NeedsItsMask(says_its_head=says_its_head), np.array([9, 9])
    samples = Samples(np.arange(18, dtype=np.int32), np.ones(18, np.bool_), np.array([0, 9]), lengths, lengths)
    probed = probe("auto", 0, model, model, samples, torch.device("cpu"))
    assert probed.packing == "padded: NeedsItsMask takes no position_ids or logits_to_keep"
    assert (probed.head is not None) == says_its_head
