"""The loss within the output head is that of whole logits, which never exist: values, gradients, memory, ranks."""

import functools
from typing import Any

import numpy as np
import pytest
import test_architectures
import torch
from conftest import World, launch
from peft import LoraConfig, PeftModel, get_peft_model
from test_activations import peak_bytes
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from launch import head as heads
from launch.activations import LOGITS_AT_ONCE_BYTES
from launch.errors import ModelError
from launch.head import LossHead, Seen, find_head, loss_head, observed
from launch.packing import batch_loss, collate, forward_arguments, predictions
from launch.samples import Samples

CPU = torch.device("cpu")
SIZES = test_architectures.SIZES | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def some_samples() -> Samples:
    """Three, of 9, 14 and 5 tokens; about half of them are trained."""
    lengths = np.array([9, 14, 5])
    random = np.random.default_rng(0)
    ids, is_trained = random.integers(3, 100, 28, np.int32), random.random(28) < 0.5
    starts = np.cumsum(lengths) - lengths
    is_trained[starts] = False
    return Samples(ids, is_trained, starts, lengths, np.add.reduceat(is_trained.astype(np.int64), starts))


def tuned(family: str = "qwen2", **more: Any) -> PeftModel:
    """A tiny random one whose B is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | more))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    return model.train()


def judged(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, at_once: int) -> torch.Tensor:
    """[positions, 2], by a head with these weights."""
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    positions = torch.arange(len(targets))
    with LossHead(layer, at_once).judges(torch.zeros_like(positions), positions, targets, len(targets)):
        found: torch.Tensor = layer(hidden[None])[0]
    return found


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_any_chunks_give_the_cross_entropy_and_its_gradient(at_once: int) -> None:
    """Each position has its own share of the loss, so that no gradient can stand for another's."""
    torch.manual_seed(0)
    weight, targets, shares = torch.randn(50, 8), torch.randint(0, 50, (20,)), torch.rand(20)
    hidden, same = (torch.randn(20, 8, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (expected * shares).sum().backward()
    found = judged(same, weight, targets, at_once)
    (found[:, 0] * shares).sum().backward()
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-6, atol=1e-6)
    assert found[:, 1].tolist() == ((hidden @ weight.T).argmax(-1) == targets).float().tolist()
    torch.testing.assert_close(same.grad, hidden.grad, rtol=1e-5, atol=1e-6)


def test_equals_count_as_argmax_counts_them() -> None:
    """Every token is as likely; the first one is said to be right, and no other."""
    found = judged(torch.ones(4, 8), torch.ones(50, 8), torch.tensor([0, 1, 49, 0]), 3)
    assert found[:, 1].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_what_is_nearly_known_do_not_vanish(dtype: torch.dtype) -> None:
    """Half of them are below the smallest number of fp16, 6e-8, and the loss scale comes only later."""
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 64, dtype=dtype) * 0.3, torch.arange(20)
    hidden = (3.5 * weight[targets].float()).to(dtype).requires_grad_()
    exact = hidden.detach().float().requires_grad_()
    functional.cross_entropy(exact @ weight.float().T, targets, reduction="sum").backward()
    loss_scale = 2.0**20
    (judged(hidden, weight, targets, 7)[:, 0].sum() * loss_scale).backward()
    assert exact.grad is not None and hidden.grad is not None
    assert exact.grad.abs().amax(dim=1).median() < 6e-8
    error = (hidden.grad.float() / loss_scale - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.median() < 0.05


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_a_micro_batch_is_that_of_whole_logits(packed: bool, at_once: int) -> None:
    """Loss, sums and every gradient, padding and an empty micro-batch included."""
    model = tuned()
    head = find_head(model.get_base_model())[0]
    assert head is not None
    for ids in ([0, 1, 2], [1], []):
        batch = collate(some_samples(), ids, CPU, packed=packed)
        results = []
        for within in (None, LossHead(head, at_once)):
            model.zero_grad()
            accepts = forward_arguments(model.get_base_model())
            loss, sums = batch_loss(model, batch, accepts=accepts, head=within)
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append((loss.detach(), sums, gradients))
        (loss, sums, gradients), (other_loss, other_sums, other_gradients) = results
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(other_sums, sums, rtol=1e-6, atol=0)
        assert sums[1:].tolist() == other_sums[1:].tolist()
        assert gradients.keys() == other_gradients.keys() and gradients
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype: torch.dtype) -> None:
    """512 positions of 20,000 tokens are 10 million logits; with 16 at a time there is what the plan has for those."""
    torch.manual_seed(0)
    weight, targets = torch.randn(20_000, 8, dtype=dtype), torch.randint(0, 20_000, (512,))
    hidden = torch.randn(512, 8, dtype=dtype).requires_grad_()

    def work(at_once: int) -> None:
        judged(hidden, weight, targets, at_once)[:, 0].sum().backward()

    work(16)  # what is made once
    planned = 16 * 20_000 * LOGITS_AT_ONCE_BYTES
    assert peak_bytes(functools.partial(work, 16)) < planned + 100_000
    assert peak_bytes(functools.partial(work, 512)) > 10 * planned


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("qwen2", {}, ""),
        ("qwen2", {"tie_word_embeddings": True}, ""),
        ("phi", {"num_key_value_heads": 4}, ""),
        ("glm", {"head_dim": 8}, ""),
        ("cohere", {}, "scales"),
        ("granite", {"logits_scaling": 3.0}, "scales"),
        ("gemma2", {"head_dim": 8}, "caps"),
    ],
)
def test_a_model_that_changes_its_logits_keeps_them(family: str, more: dict[str, Any], why: str) -> None:
    """The head's own values must come out of the model, or it would do to losses what it does to logits."""
    base = tuned(family, **more).get_base_model()
    head, _ = find_head(base)
    assert head is not None
    seen: list[Seen] = []
    with torch.no_grad(), observed(head, seen):
        logits = base(input_ids=torch.arange(9)[None], use_cache=False).logits
    assert (loss_head(head, seen, logits) is None) == bool(why)
    assert "forward" not in vars(head)


class Own(torch.nn.Module):
    """A base whose code does something to its logits."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.embeddings, self.head = what, torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embeddings(input_ids))
        if self.what == "masks":
            logits[..., 90:] = -torch.inf
        if self.what == "cuts" and logits_to_keep is not None:
            logits = logits[:, logits_to_keep]
        return logits


def test_logits_that_are_changed_in_place_are_kept() -> None:
    for what, is_kept in (("nothing", False), ("masks", True)):
        model, seen = Own(what), list[Seen]()
        with torch.no_grad(), observed(model.head, seen):
            logits = model(torch.arange(9)[None])
        assert (loss_head(model.head, seen, logits) is None) == is_kept


def test_logits_that_are_cut_behind_the_head_are_refused() -> None:
    """Others would be judged than are returned."""
    model = Own("cuts")
    model.requires_grad_(False)
    batch = collate(some_samples(), [0, 1], CPU, packed=True)
    with pytest.raises(ModelError, match=r"^The model computes its output head at 23 positions where \d+ are"):
        predictions(model, batch, accepts={"logits_to_keep"}, head=LossHead(model.head, 7))


def test_a_head_that_is_trained_keeps_its_logits() -> None:
    """Nobody would compute the gradient of its weights."""
    for saved in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, {"bias": "all"}):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **SIZES | {"num_key_value_heads": 4}))
        given: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | saved
        get_peft_model(base, LoraConfig(**given))
        assert find_head(base) == (None, "the output head is trained")
    assert find_head(torch.nn.Linear(2, 2)) == (None, "Linear does not say which module is its output head")


@pytest.mark.slow
def test_ranks_with_other_numbers_of_chunks_train_alike(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A few positions at a time, of which ranks have other numbers: every step is the same as with all at once.

    Under ZeRO-3, where a head that is called once a chunk would wait for the other rank for ever.
    """
    records = {}
    for name, at_once in (("whole", 1 << 25), ("chunks", 2000)):  # of a vocabulary of at most 600
        monkeypatch.setattr(heads, "LOGITS_AT_ONCE", at_once)
        launch(world.recipe(name, train={"max_steps": 3}), 2)
        records[name] = world.metrics(name, "train")
    said = capfd.readouterr().out
    assert "positions at a time, within the output head" in " ".join(said.split())
    for one, other in zip(records["whole"], records["chunks"], strict=True):
        assert one["token_accuracy"] == other["token_accuracy"]
        for key in ("loss", "gradient_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5)
