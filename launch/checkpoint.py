"""Checkpoints: `runs/<name>/checkpoints/step-000500/`, whole or not there, trusted only by their manifest.

World size and ZeRO stage do not appear in the format. No pickle. A checkpoint is written to a hidden directory, synced,
and becomes visible with one rename; only then does an old one go.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from launch import engine as engines
from launch import training_state
from launch.adapter import ADAPTER_NAME, WEIGHTS_FILE, exported_state
from launch.errors import CheckpointError, UnreadableError, first_line
from launch.lock import end_if_lost
from launch.modes import give_usual_mode
from launch.runs import DELETING, SAVING, best_step, published_checkpoints, write_json

FORMAT = 1
Identity = dict[str, int | str]  # {"bytes": size, "sha256": digest} of a file


@dataclass(frozen=True)
class Resumable:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]  # state.json

    @property
    def step(self) -> int:
        """Optimizer steps that it has behind it."""
        return int(self.state["step"])

    @classmethod
    def read(cls, path: Path) -> "Resumable":
        """A checkpoint that `find_resumable` chose on rank zero."""
        return cls(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def checkpoints_directory(run_directory: Path) -> Path:
    """`<run>/checkpoints`."""
    return run_directory / "checkpoints"


def path_of_step(run_directory: Path, step: int) -> Path:
    """`<run>/checkpoints/step-000500`."""
    return checkpoints_directory(run_directory) / f"step-{step:06d}"


@dataclass(frozen=True)
class Snapshot:
    """A whole checkpoint in memory: nothing of it changes while the training goes on."""

    step: int
    tensors: dict[str, torch.Tensor]  # fp32 masters and moments, as training_state.gather names them
    adapter: dict[str, torch.Tensor]  # what PEFT reads
    state: dict[str, Any]  # state.json
    peft_config: PeftConfig
    tokenizer: PreTrainedTokenizerBase


def take_snapshot(
    engine: engines.Engine, model: PeftModel, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]
) -> Snapshot | None:
    """Gather what a checkpoint holds; a collective, and None on all ranks but zero.

    `facts` go into state.json; their `step` names the checkpoint.
    """
    tensors = training_state.gather(engine)
    if torch.distributed.get_rank() != 0:
        return None
    masters = {name.removesuffix(".master"): t for name, t in tensors.items() if name.endswith(".master")}
    state = {"adam_step": training_state.adam_step(engine), "scaler": training_state.scaler_state(engine), **facts}
    adapter = exported_state(model, masters)
    return Snapshot(int(facts["step"]), tensors, adapter, state, model.peft_config[ADAPTER_NAME], tokenizer)


def write_snapshot(run_directory: Path, snapshot: Snapshot, *, keep: int, best: Callable[[], int | None]) -> None:
    """Publish the checkpoint, then delete all but the newest `keep` and that of the step which `best` then names."""

    def write_files(directory: Path) -> None:
        save_file(snapshot.tensors, directory / "optimizer.safetensors")
        save_file(snapshot.adapter, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        snapshot.peft_config.save_pretrained(str(directory))
        snapshot.tokenizer.save_pretrained(str(directory))
        write_json(directory / "state.json", snapshot.state)

    publish(path_of_step(run_directory, snapshot.step), write_files, {"format": FORMAT, "step": snapshot.step})
    best_step = best()
    for _, old in published_checkpoints(run_directory)[:-keep]:
        if best_step is None or old != path_of_step(run_directory, best_step):
            unpublish(old)


def best_on_disk(run_directory: Path, evaluations: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The best evaluated step that has a checkpoint: a save may have failed, or been deleted before it was the best."""
    there = [record for record in evaluations if path_of_step(run_directory, record["step"]).is_dir()]
    return best_step(there, metric)


def best_verified(
    run_directory: Path, evaluations: Sequence[Mapping[str, Any]], metric: str, say: Callable[[str], None]
) -> int | None:
    """The best evaluated step whose checkpoint verifies; one that does not is set aside. For rank zero."""
    wanted, left = best_step(evaluations, metric), list(evaluations)
    while (best := best_on_disk(run_directory, left, metric)) is not None:
        path = path_of_step(run_directory, best)
        left = [record for record in left if record["step"] != best]
        try:
            verify(path)
        except UnreadableError as error:
            say(f"{error} The next best one is taken.")
            continue
        except CheckpointError as error:
            say(f"{error} It is set aside as {_set_aside(path).name}; the next best one is taken.")
            continue
        if wanted != best:
            say(f"Step {wanted} has the best held-out {metric}, but no checkpoint; {best} is the best that has one.")
        return best
    return None


def publish(
    target: Path, write_files: Callable[[Path], Mapping[str, Identity] | None], manifest: Mapping[str, Any]
) -> None:
    """Write a directory that appears whole: hidden, synced, manifest last, renamed, parent synced.

    `write_files` may return the identities of files that it has hashed and synced while it wrote them.
    """
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
        _sync(target.parent.parent)
    # Nobody else's name: a process that has lost the run directory, and does not know yet, writes under its own.
    temporary = target.parent / f"{SAVING}{target.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        known = write_files(temporary) or {}
        others = [path for path in temporary.iterdir() if path.name not in known]
        for path in others:
            give_usual_mode(path)
            _sync(path)
        files = {**known, **{path.name: identity_of_file(path) for path in others}}
        files = dict(sorted(files.items()))
        write_json(temporary / "manifest.json", {**manifest, "files": files})
        _sync(temporary)
        end_if_lost()
        if target.exists():
            unpublish(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def unpublish(path: Path) -> None:
    """Hide first, delete then: a half-deleted directory never has a name that somebody reads."""
    end_if_lost()
    hidden = path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what a reader holds open on NFS stays, until a later start removes it


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file's size and SHA-256 matched.

    Raises CheckpointError naming the file that is damaged or missing, UnreadableError for one that the file system does
    not give, which may be another matter the next time.
    """
    try:
        with _told_apart(path, "manifest.json"):
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read ({type(error).__name__}).") from None
    for name, identity in files.items():
        with _told_apart(path, name):
            found = identity_of_file(path / name)
        if found != identity:
            kind = "size" if found["bytes"] != identity["bytes"] else "SHA-256"
            raise CheckpointError(f"{path}: the {kind} of {name} is not the manifest's.")
    return dict(manifest)


@contextmanager
def _told_apart(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{path}: {name} is missing.") from None
    except OSError as error:
        raise UnreadableError(f"{path}: {name} cannot be read now ({error.strerror}).") from None


def find_resumable(run_directory: Path, say: Callable[[str], None]) -> Resumable | None:
    """The newest checkpoint that verifies; None when there is none yet. For rank zero, before any other rank reads.

    A checkpoint that fails is set aside as `*.corrupt` and the one before it is taken. Raises CheckpointError when
    there are checkpoints and none is good.
    """
    directory = checkpoints_directory(run_directory)
    if not directory.exists():
        return None
    candidates = published_checkpoints(run_directory)
    for _, path in reversed(candidates):
        try:
            manifest = verify(path)
        except UnreadableError as error:
            say(f"{error} It is left as it is; the one before it is tried.")
            continue
        except CheckpointError as error:
            say(f"{error} It is set aside as {_set_aside(path).name}; the one before it is tried.")
            continue
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest.get('format')}, and this version reads format {FORMAT}; resume it with "
                "the version that wrote it."
            )
        return Resumable.read(path)
    if candidates or any(directory.glob("*.corrupt")):
        raise CheckpointError(
            f"Every checkpoint in {directory} is bad or cannot be read; take .corrupt off the name of one that is "
            "whole, restore one from a backup, or give the run another run.name to start from the beginning."
        )
    return None


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def export_adapter(checkpoint: Path, target: Path) -> None:
    """Copy what PEFT and serving tools need of a checkpoint to `target`, which appears whole."""
    files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]

    def write_files(directory: Path) -> None:
        for name in files.keys() - {"optimizer.safetensors", "state.json"}:
            shutil.copy2(checkpoint / name, directory / name)

    publish(target, write_files, {})


def restore(checkpoint: Resumable, engine: engines.Engine) -> None:
    """Put weights, moments and loss scaler back; every rank maps the whole file and reads its part."""
    try:
        tensors = load_file(checkpoint.path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:  # somebody has written a manifest for it
        raise CheckpointError(f"{checkpoint.path}: optimizer.safetensors is none: {first_line(error)}.") from None
    training_state.restore(engine, tensors, int(checkpoint.state["adam_step"]))
    training_state.restore_scaler(engine, checkpoint.state["scaler"])


def identity_of_file(path: Path) -> Identity:
    """Its size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
