"""Which samples are trained on, how often, and which are held out: pure arithmetic on their numbers."""

import numpy as np
import numpy.typing as npt

from launch.recipe import Recipe, Source


def split_samples(recipe: Recipe, source_of_sample: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
    """Numbers of the samples of train and evaluation, a pure function of the recipe and of how many there are."""
    data, seed = recipe.data, recipe.train.seed
    sources: list[Source] = [*data.train, *data.evaluation]
    usable = []
    for number, source in enumerate(sources):
        samples = np.flatnonzero(source_of_sample == number)
        if source.max_rows is not None and len(samples) > source.max_rows:
            samples = np.sort(_generator(seed, 1, number).permutation(samples)[: source.max_rows])
        usable.append(samples)
    train, evaluation = usable[: len(data.train)], usable[len(data.train) :]
    candidates = np.sort(np.concatenate(train))
    if data.evaluation or not len(candidates):
        held_out = np.concatenate([candidates[:0], *evaluation])
    else:
        size = 0.1 if data.test_size is None else data.test_size
        count = round(len(candidates) * size) if size < 1 else int(size)
        held_out = candidates[np.random.Generator(np.random.PCG64(seed)).permutation(len(candidates))[:count]]
    copies = []
    for number, (source, samples) in enumerate(zip(data.train, train, strict=True)):
        samples = np.setdiff1d(samples, held_out)
        whole, part = divmod(source.weight, 1)
        some = _generator(seed, 2, number).permutation(samples)[: round(part * len(samples))]
        copies += [np.repeat(samples, int(whole)), some]
    return {"train": np.sort(np.concatenate(copies)), "evaluation": np.sort(held_out)}


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, purpose, number]))
