"""The logits of a merged model beside those of base and adapter, on rows that the run holds out.

Everything else that a merge proves looks at one tensor. This loads the written directory as its users will, and what
it was made of as PEFT does, and lets both read the same rows.
"""

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch import factory
from launch.adapter import WEIGHTS_FILE
from launch.errors import MergeError, first_line
from launch.free_memory import available_bytes
from launch.merge_rule import DTYPES
from launch.model import added_token_ids, load_base
from launch.packing import collate, forward_arguments, predictions
from launch.recipe import ModelBlock
from launch.samples import Samples
from launch.table import format_bytes
from launch.vocabulary import fit_vocabulary

# Of each row a stretch around its first trained tokens: a 7B model in fp32 takes a CPU 14 GFLOP a token.
NUM_ROWS, TOKENS_BEFORE, POSITIONS_PER_ROW = 4, 48, 16
_MOST_BYTES_OF_LIVE_RUN = 64e9  # minutes; its GPUs are idle meanwhile
_MEMORY_MARGIN = 1.25  # for logits, activations, and what loading holds besides the weights
# Each weight is rounded once, by at most half an eps; those errors average out in a product and add up over the layers
# as their root. A tensor that is wrong, or in another's place, changes logits by tenths. The floor is fp32's own sums.
_ROUNDINGS, _LEAST = 10, 1e-3


@dataclass(frozen=True)
class Unmerged:
    """What a merged model was made of, and where rows of its run are."""

    base: str
    settings: ModelBlock
    dtype: torch.dtype  # that the base had while the adapter was trained: its files may have a wider one
    tokenizer: PreTrainedTokenizerBase
    adapter: Path  # a directory that PEFT reads
    store: Path | None  # of launch.samples; None: the adapter is no run's


Compare = Callable[[Path, Unmerged, str], dict[str, dict[str, Any]]]


def check_logits_of_live_run(merged: Path, unmerged: Unmerged, dtype_name: str) -> dict[str, dict[str, Any]]:
    """`check_logits` on rank zero, after the last thing that it does with the others.

    Ranks have been given one core each by their launcher, and the other ranks have nothing left to do.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        return check_logits(merged, unmerged, dtype_name, most_bytes=_MOST_BYTES_OF_LIVE_RUN)
    finally:
        torch.set_num_threads(num_threads)


def check_logits(
    merged: Path,
    unmerged: Unmerged,
    dtype_name: str,
    *,
    free_bytes: int | None = None,
    most_bytes: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Compare on the CPU, in fp32; what merge_report.json says of it. `free_bytes`: None asks the machine.

    One of the two models is in memory at a time. Where there is no room (for more than `most_bytes`: no time), or
    there are no rows, that is said aloud, and in the report. Raises MergeError when the logits differ by more than
    rounding to the output type explains.
    """
    split, rows = _few_rows(unmerged.store)
    needed_bytes = _needed_bytes(merged, unmerged.adapter, dtype_name)
    free_bytes = available_bytes() if free_bytes is None else free_bytes
    if rows is None:
        return _skipped(split)
    if needed_bytes > most_bytes:
        return _skipped(
            f"that takes {format_bytes(needed_bytes)} of memory, and for more than {format_bytes(most_bytes)} a run "
            f"does not let its GPUs wait; python -m launch merge {merged.parent} --output DIR compares them"
        )
    if needed_bytes > free_bytes:
        return _skipped(f"that takes {format_bytes(needed_bytes)} of memory, and {format_bytes(free_bytes)} are free")
    try:
        before, expected = _logits_of_unmerged(unmerged, rows)
        (found,) = _logits(lambda: _load(str(merged), merged / "model.pth", unmerged.settings), rows)
    except Exception as error:
        if not unmerged.settings.trust_remote_code and "allocate memory" not in str(error):
            raise
        return _skipped(f"it failed with {type(error).__name__}: {first_line(error)}")

    allowed = max(_ROUNDINGS * torch.finfo(DTYPES[dtype_name]).eps, _LEAST)
    deviation = _deviation(found, expected)
    num_positions = sum(len(one) for one in expected)
    if not deviation <= allowed:
        raise MergeError(
            f"The merged model's logits differ by {deviation:.2%} from those of base and adapter on {len(expected)} "
            f"rows of {unmerged.store}, and rounding to {dtype_name} explains {allowed:.2%}; nothing was kept, and "
            "this is a fault of the merge to be reported."
        )
    same = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in zip(found, expected, strict=True))
    return {
        "logits": {
            "rows": len(expected),
            "of": split,
            "positions": num_positions,
            "largest_logit": max(float(one.abs().max()) for one in expected),
            "largest_difference": max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)),
            "same_choice": same / num_positions,
            "deviation": deviation,
            "allowed_deviation": allowed,
            "deviation_of_the_base": _deviation(before, expected[:1]),
        }
    }


def _skipped(why: str) -> dict[str, dict[str, Any]]:
    print(f"The merged model's logits are not compared with those of base and adapter: {why}.", flush=True)
    return {"logits": {"skipped": why}}


def _few_rows(store: Path | None) -> tuple[str, Samples | None]:
    """(evaluation or train, stretches of its first rows), or (why there are none, None)."""
    if store is None:
        return "the adapter is no run's, so that there are no rows to compare them on", None
    try:
        held_out, trained_on = (Samples.load(store, split) for split in ("evaluation", "train"))
    except (OSError, LookupError, ValueError, SafetensorError) as error:
        return f"the rows in {store} cannot be read ({type(error).__name__})", None
    split, samples = ("evaluation", held_out) if len(held_out) else ("train", trained_on)
    if split == "train":
        print("No rows are held out, so the merged model's logits are compared on rows of train.", flush=True)
    rows = samples.select(np.flatnonzero(samples.num_trained)[:NUM_ROWS])
    trained = [np.flatnonzero(rows.sample(index)[1]) for index in range(len(rows))]
    begin = np.asarray([max(places[0] - TOKENS_BEFORE, 0) for places in trained], np.int64)
    ends = [
        min(places[:POSITIONS_PER_ROW][-1] + 1, start + TOKENS_BEFORE + POSITIONS_PER_ROW)
        for places, start in zip(trained, begin, strict=True)
    ]
    counts = [int((places < end).sum()) for places, end in zip(trained, ends, strict=True)]
    return split, replace(
        rows, starts=rows.starts + begin, lengths=np.asarray(ends) - begin, num_trained=np.asarray(counts)
    )


def _needed_bytes(merged: Path, adapter: Path, dtype_name: str) -> int:
    """For either model in fp32."""
    files = [path for path in merged.iterdir() if path.suffix in (".safetensors", ".pth")]
    weights_bytes = sum(path.stat().st_size for path in files) * 4 // DTYPES[dtype_name].itemsize
    return int((weights_bytes + (adapter / WEIGHTS_FILE).stat().st_size) * _MEMORY_MARGIN)


def _logits_of_unmerged(unmerged: Unmerged, rows: Samples) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of the base alone, on the first row, and of base and adapter."""

    def load() -> PeftModel:
        base = _load(unmerged.base, Path(unmerged.base), unmerged.settings)
        for parameter in base.parameters():
            parameter.data = parameter.data.to(unmerged.dtype).float()
        if isinstance(base, PreTrainedModel):
            added = added_token_ids(unmerged.tokenizer, unmerged.base, unmerged.settings)
            fit_vocabulary(base, unmerged.tokenizer, added, unmerged.settings)
        return PeftModel.from_pretrained(base, str(unmerged.adapter), autocast_adapter_dtype=False)

    before, expected = _logits(load, rows)
    return before, expected


def _load(directory: str, state_dict: Path, settings: ModelBlock) -> torch.nn.Module:
    """A whole model in fp32; of a factory, from its state dict."""
    if settings.factory is not None:
        return factory.build_alone(settings.factory, state_dict, torch.float32)
    is_local = Path(directory).is_dir()
    revision = None if is_local else settings.revision
    return load_base(directory, settings.model_copy(update={"load_in_4bit": False, "revision": revision}), "fp32")


@torch.no_grad()
def _logits(load: Callable[[], torch.nn.Module], rows: Samples) -> list[list[torch.Tensor]]:
    """[positions, vocab] of each row; before that, where there is an adapter, of the first row without it."""
    model = load().eval()
    accepts = forward_arguments(model.get_base_model() if isinstance(model, PeftModel) else model)

    found = []
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            found.append(_read(model, rows.select(np.arange(1)), accepts))
    found.append(_read(model, rows, accepts))
    del model
    gc.collect()
    return found


def _read(model: torch.nn.Module, rows: Samples, accepts: frozenset[str]) -> list[torch.Tensor]:
    batches = (collate(rows, [index], torch.device("cpu"), packed=False) for index in range(len(rows)))
    return [predictions(model, batch, accepts=accepts).float().clone() for batch in batches]


def _deviation(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of the row with the largest: the median over its positions of the largest difference over the largest logit.

    The median, since where two experts of a mixture are all but equal, rounding may choose the other one.
    """
    of_rows = [
        ((one - other).abs().amax(1) / other.abs().amax(1).clamp_min(1e-12)).median()
        for one, other in zip(found, expected, strict=True)
    ]
    return float(torch.stack(of_rows).max())
