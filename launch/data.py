"""Rows -> samples on disk, and a ledger in which every row has exactly one outcome.

Preparation streams: chunks of rows go to as many processes as there are cores, and their tokens are appended to a store
in order. The store is kept under a key of all that went into it, so that a second start finds it done.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, compress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from launch import preemption
from launch.data_report import build_report, check_report, describe_splits
from launch.errors import DataError, TemplateError
from launch.fingerprint import digest_of, fingerprint_file, fingerprint_tokenizer
from launch.formats import BadRowError, Conversation, RowFormat, choose_format
from launch.ledger import DUPLICATE, KEPT, Batch, Dropped, Work, account_for, as_json, conversation_of
from launch.modes import give_usual_mode
from launch.recipe import DataBlock, Recipe
from launch.rows import Chunk, DataFile, find_files, hub_fingerprint, read_chunks, rows_of
from launch.runs import write_json
from launch.samples import Samples, StoreWriter, save_split
from launch.split import split_samples
from launch.templates import (
    KNOWN_CONVERSATION,
    ChatTemplate,
    load_chat_template,
    load_prompt_template,
    prove_mask,
    render_chat,
)
from launch.tokens import special_ids, special_pattern, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES_PER_OUTCOME = 3
_FRESH = ".preparing-data"
MAX_PROCESSES = 16
_SMALL_BYTES = 2_000_000  # not worth a second process
_CHUNKS_PER_PROCESS = 3  # under way at once, which bounds the memory
# What decides a sample besides the recipe: our code and these libraries.
_MADE_BY = ("fingerprint", "rows", "formats", "templates", "tokens", "ledger", "samples", "data", "model")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")

Tools = tuple["PreTrainedTokenizerBase", ChatTemplate]


@dataclass(frozen=True)
class Prepared:
    """The samples of a run and the ledger of its rows, on disk in `store`."""

    store: Path
    split: dict[str, npt.NDArray[np.int64]]  # train, evaluation: numbers of samples in the store
    report: dict[str, Any]  # data_report.json
    file_of_sample: npt.NDArray[np.int32]  # [samples of the store] places in report["files"]
    number_of_sample: npt.NDArray[np.int64]  # [samples of the store] the line or row in that file
    end_token_ids: list[int]  # the special tokens that end a trained answer
    sha256s: list[str]  # of the store with what is trained on, and with what is held out
    rows: dict[str, Any]  # data_report.describe_splits: what a run that resumes compares
    template_sha256: str  # of the chat template's source
    was_there: bool  # nothing had to be prepared

    def samples(self, split: str) -> Samples:
        """Those of `train` or `evaluation`."""
        return Samples.load(self.store).select(self.split[split])

    def row_ids(self, samples: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
        """The rows of these samples of the store: FILE:NUMBER."""
        labels = list(self.report["files"])
        return [f"{labels[self.file_of_sample[sample]]}:{self.number_of_sample[sample]}" for sample in samples]

    @property
    def evaluation_row_ids(self) -> list[str]:
        """The rows that are held out."""
        return self.row_ids(self.split["evaluation"])

    def publish(self, directory: Path) -> "Prepared":
        """Put everything into a run directory; returns what now stands there."""
        store = directory / "data"
        if self.store != store:
            shutil.rmtree(store, ignore_errors=True)
            self.store.rename(store)
        shutil.rmtree(directory / _FRESH, ignore_errors=True)
        save_split(store, self.split)
        for path in store.iterdir():
            give_usual_mode(path)
        write_json(directory / "data_report.json", self.report)
        shutil.copyfile(store / "quarantine.jsonl", directory / "quarantine.jsonl")
        row_ids = "".join(f"{row_id}\n" for row_id in self.evaluation_row_ids)
        (directory / "evaluation_rows.txt").write_text(row_ids, encoding="utf-8")
        return replace(self, store=store)


def prepare(recipe: Recipe, directory: Path, load: Callable[[], Tools]) -> Prepared:
    """Read, render, tokenise and split, or find that done in `directory`; `load` gives tokenizer and template.

    Nothing of a run that stands in `directory` is written over before `publish`, but for the report and the quarantine
    of a set that is refused. Raises DataError when rows cannot be read, when too many of them are dropped, or when
    what is trained of them cannot be right.
    """
    data = recipe.data
    files = find_files((*data.train, *data.evaluation))
    key = _key(recipe, files)
    # What a run uses, and what a start left that was refused, or killed before it was published.
    found = [store for store in (directory / "data", directory / _FRESH) if _is_whole(store, key)]
    store = found[0] if found else _prepare_anew(directory / _FRESH, key, data, files, load)
    if not found and _key(recipe, files) != key:
        shutil.rmtree(store)
        raise DataError("A data file, a template or the tokenizer changed while the rows were prepared; start again.")
    facts = json.loads((store / "prepared.json").read_text(encoding="utf-8"))
    rows = load_file(store / "rows.safetensors")  # [rows] each
    kept = rows["outcome"] == KEPT  # [rows]; these are the samples of the store
    file_of_sample = rows["file"][kept]
    sources = [*data.train, *data.evaluation]
    source_of_file = np.asarray([sources.index(file.source) for file in files])
    source_of_sample = source_of_file[file_of_sample]
    split = split_samples(recipe, source_of_sample)
    report = build_report(facts, rows, Samples.load(store), split)
    prepared = Prepared(
        store,
        split,
        report,
        file_of_sample,
        rows["number"][kept],
        [int(token) for token in facts["end_tokens"]],
        [digest_of([facts["sha256"], hashlib.sha256(indices.tobytes()).hexdigest()]) for indices in split.values()],
        describe_splits(data, source_of_file, source_of_sample, report["files"], facts["sha256_of_files"], split),
        facts["template_sha256"],
        bool(found),
    )
    try:
        check_report(report, data.max_dropped_share, must_evaluate=bool(data.evaluation))
    except DataError as error:
        write_json(directory / "data_report.json", report)
        shutil.copyfile(store / "quarantine.jsonl", directory / "quarantine.jsonl")
        raise DataError(f"{str(error).rstrip('.')}; {directory / 'quarantine.jsonl'} lists what was dropped.") from None
    return prepared


def conversations(recipe: Recipe) -> Iterator[tuple[str, Conversation | BadRowError]]:
    """(row id, conversation or what is wrong) of every row, those to train on first."""
    for file in find_files((*recipe.data.train, *recipe.data.evaluation)):
        row_format = _format_of(file, recipe.data)
        for raw in (raw for chunk in read_chunks(file) for raw in rows_of(chunk)):
            row_id = f"{file.label}:{raw.number}"
            try:
                yield row_id, conversation_of(raw, row_format, row_id)
            except BadRowError as error:
                yield row_id, error


def check_beginnings(recipe: Recipe, tools: Tools) -> None:
    """Raises a LaunchError when the template is of no use, or none of the first rows of a source can be trained on."""
    tokenizer, template = tools
    prove_mask(template)
    _check_stop_token(tokenizer, template)
    for file in {
        file.source: file for file in reversed(find_files((*recipe.data.train, *recipe.data.evaluation)))
    }.values():
        formats = {file.label: _format_of(file, recipe.data)}
        chunk = next(iter(read_chunks(file)))
        batch = account_for(chunk, Work(recipe.data, formats, template, tokenizer, special_pattern(tokenizer)))
        if batch.dropped and not len(batch.lengths):
            first = batch.dropped[0]
            raise DataError(
                f"None of the first {len(batch.dropped)} rows of {file.label} can be trained on; {first.row_id} is "
                f"{first.reason}: {first.detail}."
            )


# ---- the store and its key ----


def _key(recipe: Recipe, files: Sequence[DataFile]) -> str:
    """Of everything that decides what the store holds; what the split alone depends on is left out."""
    data = recipe.data
    own_code = [Path(__file__).with_name(f"{module}.py").read_bytes() for module in _MADE_BY]
    of_split = {"train", "evaluation", "test_size", "max_dropped_share"}
    prompt_templates = {"alpaca", data.prompt_template, *(file.source.prompt_template for file in files)}
    return digest_of(
        [
            hashlib.sha256(b"".join(own_code)).hexdigest(),
            [version(library) for library in _LIBRARIES],
            fingerprint_tokenizer(recipe.model),
            recipe.model.trust_remote_code,
            recipe.model.model_dump(include={"extra_special_tokens", "eos_token", "pad_token"}),
            "" if data.template == "tokenizer" else load_chat_template(data.template).source,
            [load_prompt_template(name) for name in sorted(filter(None, prompt_templates))],
            data.model_dump(mode="json", exclude=of_split),
            [
                [file.label, file.source.model_dump(mode="json", exclude={"weight", "max_rows"})]
                + (fingerprint_file(file.path) if file.path else [hub_fingerprint(file.source)])
                for file in files
            ],
        ]
    )


def _is_whole(store: Path, key: str) -> bool:
    """Whether a store of this key is there; prepared.json is written last, and knows how long the files are."""
    try:
        facts = json.loads((store / "prepared.json").read_text(encoding="utf-8"))
        return facts["key"] == key and all((store / name).stat().st_size == n for name, n in facts["bytes"].items())
    except (OSError, ValueError, LookupError, TypeError):  # nothing there, or not what we write
        return False


def _prepare_anew(store: Path, key: str, data: DataBlock, files: Sequence[DataFile], load: Callable[[], Tools]) -> Path:
    shutil.rmtree(store, ignore_errors=True)
    try:
        store.mkdir(parents=True)
        _fill(store, key, data, files, load())
    except BaseException as error:
        shutil.rmtree(store, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataError(f"The samples cannot be written to {store}: {error.strerror or error}.") from None
        raise
    return store


def _fill(store: Path, key: str, data: DataBlock, files: Sequence[DataFile], tools: Tools) -> None:
    tokenizer, template = tools
    prove_mask(template)
    _check_stop_token(tokenizer, template)
    formats = {file.label: _format_of(file, data) for file in files}
    work = Work(data, formats, template, tokenizer, special_pattern(tokenizer))
    outcomes, numbers, file_of_row = [np.zeros(0, np.uint8)], [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    last_tokens: Counter[int] = Counter()
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    seen: set[bytes] = set()
    place_of_file = {file.label: place for place, file in enumerate(files)}
    with (
        StoreWriter(store, len(files)) as writer,
        # A lone surrogate in somebody's row becomes its JSON escape.
        (store / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as quarantine,
        tqdm(desc="preparing rows", unit=" rows", disable=not sys.stderr.isatty(), leave=False) as bar,
    ):
        for chunk, batch in _batches(work, files):
            if data.drop_duplicates:
                batch = _without_duplicates(batch, chunk, seen)
            place = place_of_file[chunk.file.label]
            writer.append(batch.token_ids, batch.is_trained, batch.lengths, batch.num_trained, file=place)
            outcomes.append(batch.outcomes)
            numbers.append(batch.numbers)
            file_of_row.append(np.full(len(batch.numbers), place, np.int32))
            last_tokens.update(chain.from_iterable(batch.last_tokens))
            counts.update(chain.from_iterable(batch.notes))
            for row in batch.dropped:
                quarantine.write(row.as_line())
                shown = examples.setdefault(row.reason, [])
                if len(shown) < EXAMPLES_PER_OUTCOME:
                    shown.append({"row_id": row.row_id, "detail": row.detail})
            bar.update(len(batch.numbers))
    save_file(
        {"outcome": np.concatenate(outcomes), "number": np.concatenate(numbers), "file": np.concatenate(file_of_row)},
        store / "rows.safetensors",
    )
    end_tokens = special_ids(tokenizer)
    write_json(
        store / "prepared.json",
        {
            "files": [file.label for file in files],
            "template": template.name,
            "template_sha256": hashlib.sha256(template.source.encode()).hexdigest(),
            "answers": last_tokens.total(),
            "end_tokens": {str(t): count for t, count in sorted(last_tokens.items()) if t in end_tokens},
            "end_token_texts": {str(t): tokenizer.convert_ids_to_tokens(t) for t in last_tokens if t in end_tokens},
            "counts": counts,
            "examples": examples,
            "sha256": writer.sha256,
            "sha256_of_files": writer.sha256_of_files,
            "bytes": {path.name: path.stat().st_size for path in sorted(store.iterdir())},
            "key": key,
        },
    )


def _check_stop_token(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> None:
    """Before hours of preparation: the end of an answer must be a token that generation can stop at."""
    (tokens,) = tokenise([render_chat(template, KNOWN_CONVERSATION)], [[True, True]], tokenizer)
    last = int(tokens.ids[tokens.answer_ends[-1]])
    if last not in special_ids(tokenizer):
        raise TemplateError(
            f"An answer of the template {template.name} ends with {tokenizer.decode([last])!r}, which is no special "
            "token of this tokenizer, so that the model would never learn to stop; choose the data.template of this "
            "model, or add its end token with model.extra_special_tokens."
        )


def _format_of(file: DataFile, data: DataBlock) -> RowFormat:
    """From the first rows of the file that are some."""
    first_fault = ""
    for chunk in read_chunks(file):
        raws = list(rows_of(chunk))
        rows = [raw.value for raw in raws if raw.value and not raw.fault]
        if rows:
            return choose_format(file.label, rows, file.source, data)
        first_fault = first_fault or next(
            (f"{file.label}:{raw.number}: {raw.fault or 'no columns'}" for raw in raws), ""
        )
    if first_fault:
        raise DataError(f"No row of {file.label} can be read; the first is {first_fault}.")
    raise DataError(f"{file.label} holds no rows.")


def _without_duplicates(batch: Batch, chunk: Chunk, seen: set[bytes]) -> Batch:
    """The batch with rows whose tokens were seen before as dropped ones."""
    is_new = []
    for digest in batch.digests:
        is_new.append(digest not in seen)
        seen.add(digest)
    if all(is_new):
        return batch
    fresh = np.asarray(is_new)
    places = np.flatnonzero(batch.outcomes == KEPT)[~fresh]
    outcomes = batch.outcomes.copy()
    outcomes[places] = DUPLICATE
    raws = list(rows_of(chunk))
    detail = "an earlier row has the same tokens"
    again = [Dropped(f"{chunk.file.label}:{raws[p].number}", "duplicate", detail, as_json(raws[p])) for p in places]
    of_fresh = np.repeat(fresh, batch.lengths)
    return replace(
        batch,
        outcomes=outcomes,
        token_ids=batch.token_ids[of_fresh],
        is_trained=batch.is_trained[of_fresh],
        lengths=batch.lengths[fresh],
        num_trained=batch.num_trained[fresh],
        last_tokens=list(compress(batch.last_tokens, is_new)),
        notes=list(compress(batch.notes, is_new)),
        dropped=batch.dropped + again,
    )


# ---- processes ----

_work: Work  # of a process that prepares chunks


def _batches(work: Work, files: Sequence[DataFile]) -> Iterator[tuple[Chunk, Batch]]:
    """Every chunk and what became of it, in order, whichever process did it."""
    chunks = (chunk for file in files for chunk in read_chunks(file))
    num_processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    is_small = sum(_SMALL_BYTES if file.path is None else file.path.stat().st_size for file in files) < _SMALL_BYTES
    if num_processes == 1 or is_small:
        for chunk in chunks:
            yield chunk, account_for(chunk, work)
        return
    # Forked, so that nothing need be pickled or imported again; the children touch neither torch nor ranks' sockets.
    pool = ProcessPoolExecutor(num_processes, get_context("fork"), _start_process, (work,))
    under_way: deque[tuple[Chunk, Future[Batch]]] = deque()
    try:
        for chunk in chunks:
            under_way.append((chunk, pool.submit(_account_for, chunk)))
            if len(under_way) >= _CHUNKS_PER_PROCESS * num_processes:
                done, future = under_way.popleft()
                yield done, future.result()
        while under_way:
            done, future = under_way.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            "A process that prepared rows was killed, probably for its memory; give the job more, or fewer cores."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(work: Work) -> None:
    global _work
    preemption.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    gc.freeze()  # what was imported is not searched for garbage with every chunk: a tenth of the time
    gc.disable()  # _account_for collects it
    _work = work


def _account_for(chunk: Chunk) -> Batch:
    batch = account_for(chunk, _work)
    gc.collect()  # once, and not with every 700 things of its rows
    return batch
