"""Which samples a step trains on, and how they are laid into micro-batches: pure arithmetic, no state.

World size and memory budget change only the layout. The samples of a step, and therefore its loss and gradient,
depend on (seed, step) alone, so a checkpoint stores nothing about the data but the step.
"""

import functools
import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MicroBatch = list[int]  # sample ids; an empty one keeps a rank in step with the others
# What `largest_micro_batches` looks at: so many epochs, and of steps that it lays out so many samples, or 32 steps.
_MOST_EPOCHS, _MOST_SAMPLES = 100, 8192


def samples_in_run(num_samples: int, global_batch_size: int, num_train_epochs: float, max_steps: int | None) -> int:
    """Samples of the whole run, repeats counted; `max_steps` overrides the epochs."""
    return max_steps * global_batch_size if max_steps is not None else math.ceil(num_samples * num_train_epochs)


@functools.lru_cache(maxsize=2)  # every step asks, and of millions of samples it takes seconds
def epoch_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of the sample ids in one epoch; read-only."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)
    order.setflags(write=False)
    return order


def step_samples(step: int, num_samples: int, global_batch_size: int, total_samples: int, seed: int) -> list[int]:
    """Ids of the samples of step `step` (from 0): positions [step*G, (step+1)*G) of the concatenated epochs.

    The order ends after `total_samples`, so the last step may be smaller.
    """
    start = step * global_batch_size
    stop = min(start + global_batch_size, total_samples)
    ids: list[int] = []
    for epoch in range(start // num_samples, (stop - 1) // num_samples + 1):
        first = epoch * num_samples
        order = epoch_order(num_samples, seed, epoch)
        ids.extend(order[max(start - first, 0) : stop - first].tolist())
    return ids


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of everything random (dropout) in one step on one rank; nothing about randomness needs storing."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def lay_out(
    ids: Sequence[int], lengths: Sequence[int], max_tokens: int, num_ranks: int, *, padded: bool = False
) -> list[list[MicroBatch]]:
    """Assign samples to `[rank][micro-batch]`, the same number of micro-batches on every rank.

    `lengths[i]` are the tokens of sample `ids[i]`, each at most `max_tokens`. A packed micro-batch holds at most
    `max_tokens` tokens; a padded one at most `max_tokens` cells (rows x longest row). As few micro-batches as the
    budget allows, with token counts as equal as a greedy assignment makes them.
    """
    longest_first = sorted(zip(lengths, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    if longest_first and longest_first[0][0] > max_tokens:
        raise ValueError(f"sample {longest_first[0][1]} has {longest_first[0][0]} tokens, the budget is {max_tokens}")
    bins = _fill_padded(longest_first, max_tokens) if padded else _fill_level(longest_first, max_tokens, num_ranks)
    bins += [[] for _ in range(max(1, math.ceil(len(bins) / num_ranks)) * num_ranks - len(bins))]
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _fill_level(longest_first: Sequence[tuple[int, int]], max_tokens: int, num_ranks: int) -> list[MicroBatch]:
    """As few bins for each rank as there can be, filled alike, if that keeps the budget; else as first fit needs.

    That one looks at every bin for every sample, which takes seconds where ranks are hundreds.
    """
    total = sum(length for length, _ in longest_first)
    fewest = max(1, math.ceil(total / (max_tokens * num_ranks)))
    level = _level(longest_first, max_tokens, fewest * num_ranks)
    if level is not None:
        return level
    bins = _fill_packed(longest_first, max_tokens)
    return _level(longest_first, max_tokens, math.ceil(len(bins) / num_ranks) * num_ranks) or bins


def _fill_packed(longest_first: Sequence[tuple[int, int]], max_tokens: int) -> list[MicroBatch]:
    """First fit decreasing: at most 11/9 of the fewest bins possible, plus one (Johnson, 1973)."""
    bins: list[MicroBatch] = []
    free: list[int] = []
    for length, sample in longest_first:
        for index, room in enumerate(free):
            if length <= room:
                bins[index].append(sample)
                free[index] -= length
                break
        else:
            bins.append([sample])
            free.append(max_tokens - length)
    return bins


def _fill_padded(longest_first: Sequence[tuple[int, int]], max_tokens: int) -> list[MicroBatch]:
    bins: list[MicroBatch] = []
    longest = 0
    for length, sample in longest_first:
        if bins and (len(bins[-1]) + 1) * longest <= max_tokens:
            bins[-1].append(sample)
        else:
            bins.append([sample])
            longest = length
    return bins


def _level(longest_first: Sequence[tuple[int, int]], max_tokens: int, num_bins: int) -> list[MicroBatch] | None:
    """Longest first into the emptiest of `num_bins` bins; None where that breaks the budget."""
    bins: list[MicroBatch] = [[] for _ in range(num_bins)]
    emptiest = [(0, index) for index in range(num_bins)]
    for length, sample in longest_first:
        filled, index = heapq.heappop(emptiest)
        if filled + length > max_tokens:
            return None
        bins[index].append(sample)
        heapq.heappush(emptiest, (filled + length, index))
    return bins


def num_cells(lengths: npt.NDArray[np.int64], *, padded: bool) -> int:
    """Tokens of a micro-batch of samples of these lengths; of a padded one, rows x longest row."""
    return int(lengths.max()) * len(lengths) if padded else int(lengths.sum())


def largest_micro_batches(
    lengths: npt.NDArray[np.int64],
    num_trained: npt.NDArray[np.int64],
    *,
    global_batch_size: int,
    total_samples: int,
    seed: int,
    max_tokens: int,
    num_ranks: int,
    padded: bool,
) -> tuple[MicroBatch, MicroBatch]:
    """(that with the most trained tokens, that with the most tokens; of a padded one, cells) of the whole run.

    Of equals the one that has more of the other. Layers keep something of each token, the logits are those of the
    trained ones, and which of them takes more memory depends on the model. Only the steps are laid out that have the
    most tokens, the fullest ranks, the longest samples or the most trained tokens; those of others are hardly larger.
    """
    order = _order_of_run(len(lengths), total_samples, seed)

    def sizes(micro_batch: MicroBatch) -> tuple[int, int]:
        return num_cells(lengths[micro_batch], padded=padded), int(num_trained[micro_batch].sum())

    found: dict[tuple[int, int], MicroBatch] = {}  # one of each size
    for step in _busiest_steps(lengths[order], num_trained[order], global_batch_size, max_tokens * num_ranks):
        ids = order[step * global_batch_size : (step + 1) * global_batch_size]
        ranks = lay_out(ids.tolist(), lengths[ids].tolist(), max_tokens, num_ranks, padded=padded)
        found |= {sizes(micro_batch): micro_batch for rank in ranks for micro_batch in rank if micro_batch}
    return found[max(found, key=lambda size: size[::-1])], found[max(found)]


def _order_of_run(num_samples: int, total_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Ids of all steps, one after the other, of as many epochs as are looked at."""
    epochs = min(math.ceil(total_samples / num_samples), _MOST_EPOCHS)
    return np.concatenate([epoch_order(num_samples, seed, epoch) for epoch in range(epochs)])[:total_samples]


def _busiest_steps(
    lengths: npt.NDArray[np.int64], num_trained: npt.NDArray[np.int64], global_batch_size: int, tokens_at_once: int
) -> list[int]:
    """Numbers of steps, of which `lengths` and `num_trained` have the samples one after the other.

    A step with a few tokens more than the ranks take at once has two micro-batches a rank that are half full.
    """
    starts = np.arange(0, len(lengths), global_batch_size)
    tokens = np.add.reduceat(lengths, starts)
    figures = (
        tokens,
        tokens / np.ceil(tokens / tokens_at_once),
        np.maximum.reduceat(lengths * (int(num_trained.max()) + 1) + num_trained, starts),
        np.add.reduceat(num_trained, starts),
    )
    most = max(_MOST_SAMPLES // global_batch_size, 1)
    return sorted({int(step) for figure in figures for step in np.argsort(-figure, kind="stable")[: min(most, 32)]})
