"""Samples on disk: tokens end to end in flat files, mapped and never read whole, and the arrays that index them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

_TOKEN_IDS = "token_ids.int32"
_IS_TRAINED = "is_trained.bool"
_INDEX = "samples.safetensors"
_SPLIT = "split.safetensors"


@dataclass(frozen=True)
class Samples:
    """Some samples of a store; sample i is the `lengths[i]` tokens from `starts[i]` on. One may stand here twice."""

    token_ids: npt.NDArray[np.int32]  # [tokens of the store]
    is_trained: npt.NDArray[np.bool_]  # [tokens of the store]; never the first token of a sample
    starts: npt.NDArray[np.int64]  # [samples]
    lengths: npt.NDArray[np.int64]  # [samples] tokens
    num_trained: npt.NDArray[np.int64]  # [samples] trained tokens

    def __len__(self) -> int:
        return len(self.starts)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(token ids, trained) of one sample, both [tokens]."""
        part = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self.token_ids[part].astype(np.int64), np.array(self.is_trained[part])

    def select(self, indices: npt.NDArray[np.int64]) -> "Samples":
        """These samples, in this order."""
        return Samples(
            self.token_ids, self.is_trained, self.starts[indices], self.lengths[indices], self.num_trained[indices]
        )

    @classmethod
    def load(cls, store: Path, split: str | None = None) -> "Samples":
        """Every sample of a store, or those of a split that `save_split` wrote."""
        index = load_file(store / _INDEX)
        lengths, num_trained = index["lengths"], index["num_trained"]
        starts = np.cumsum(lengths) - lengths
        num_tokens = int(lengths.sum())
        whole = cls(
            _mapped(store / _TOKEN_IDS, np.int32, num_tokens),
            _mapped(store / _IS_TRAINED, np.bool_, num_tokens),
            starts,
            lengths,
            num_trained,
        )
        return whole if split is None else whole.select(load_file(store / _SPLIT)[split])


def save_split(store: Path, split: dict[str, npt.NDArray[np.int64]]) -> None:
    """Write which samples are whose."""
    temporary = store / f".{_SPLIT}.tmp"
    save_file(split, temporary)
    temporary.replace(store / _SPLIT)


class StoreWriter:
    """Appends samples to a new store. Use it as a context; `sha256` is then of all that was written."""

    def __init__(self, store: Path, num_files: int) -> None:
        self._store = store
        self._token_ids = (store / _TOKEN_IDS).open("wb")
        self._is_trained = (store / _IS_TRAINED).open("wb")
        self._lengths: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._num_trained: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._digest = _Digest()
        self._digest_of_file = [_Digest() for _ in range(num_files)]

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._token_ids.close()
        self._is_trained.close()
        if error is None:
            lengths, num_trained = np.concatenate(self._lengths), np.concatenate(self._num_trained)
            save_file({"lengths": lengths, "num_trained": num_trained}, self._store / _INDEX)

    def append(
        self,
        token_ids: npt.NDArray[np.int32],
        is_trained: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.int64],
        num_trained: npt.NDArray[np.int64],
        *,
        file: int,
    ) -> None:
        """Samples of a file end to end, [tokens] and [samples]."""
        for digest in (self._digest, self._digest_of_file[file]):
            digest.update(token_ids, is_trained, lengths)
        self._token_ids.write(token_ids.tobytes())
        self._is_trained.write(is_trained.tobytes())
        self._lengths.append(lengths)
        self._num_trained.append(num_trained)

    @property
    def sha256(self) -> str:
        """Of the tokens, the masks and the lengths, whatever the batches in which they came."""
        return self._digest.hexdigest()

    @property
    def sha256_of_files(self) -> list[str]:
        """The same of each file's samples."""
        return [digest.hexdigest() for digest in self._digest_of_file]


class _Digest:
    """Of arrays that come in pieces, each of them hashed by itself, so that where they are cut does not matter."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(3)]

    def update(self, *arrays: npt.NDArray[Any]) -> None:
        for part, array in zip(self._parts, arrays, strict=True):
            part.update(array.tobytes())

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(part.hexdigest() for part in self._parts).encode()).hexdigest()


def _mapped(path: Path, dtype: type[Any], count: int) -> npt.NDArray[Any]:
    if count == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, "r", shape=(count,))
