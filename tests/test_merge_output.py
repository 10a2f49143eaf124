"""Where `python -m launch merge` may write: never into what it reads, and never over what no merge has written."""

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from conftest import run_ranks
from test_merge_from_disk import CASES, a_nan, change_config, make, model_files

from launch.errors import MergeError
from launch.merge_from_disk import find_source, merge_from_disk

NOBODY = 65534
READ_ONLY, REMOUNT, DETACH = 1, 32, 2  # MS_RDONLY, MS_REMOUNT, MNT_DETACH
COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A base and an adapter that every user can read; pytest's own directories are closed to others."""
    directory = Path(tempfile.mkdtemp())
    make(directory / "made", *CASES["lora"])
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755)
    yield directory / "made"
    shutil.rmtree(directory)


def merge(made: Path, output: Path, *, overwrite: bool = False) -> bool:
    return merge_from_disk(find_source(made / "adapter"), output, max_shard_size_bytes=20_000, overwrite=overwrite)


def refused(made: Path, output: Path, *, overwrite: bool = False) -> str:
    """The sentence; every file stays as it was, and there is none that was not."""
    before = everything(made) | everything(output.parent)
    with pytest.raises(MergeError) as error:
        merge(made, output, overwrite=overwrite)
    assert everything(made) | everything(output.parent) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def everything(directory: Path) -> dict[Path, int]:
    """What is in a directory, and when each file was changed."""
    return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in directory.rglob("*")}


@contextmanager
def mounted(where: Path) -> Iterator[Callable[[], None]]:
    """A file system of its own; what is given makes it read-only."""
    where.mkdir(exist_ok=True)
    if LIBC.mount(b"tmpfs", str(where).encode(), b"tmpfs", 0, None) != 0:
        pytest.skip(f"no mount here: {os.strerror(ctypes.get_errno())}")

    def close() -> None:
        assert LIBC.mount(b"tmpfs", str(where).encode(), b"tmpfs", REMOUNT | READ_ONLY, None) == 0

    try:
        yield close
    finally:
        LIBC.umount2(str(where).encode(), DETACH)


# ---- what is read ----


def a_link_to_the_base(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(made / "base")
    return tmp_path / "link"


def where_the_files_of_the_base_are(made: Path, tmp_path: Path) -> Path:
    """The base is links to files of another directory, as a snapshot of the hub is."""
    (tmp_path / "snapshot").mkdir()
    for path in (made / "base").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    change_config(tmp_path, base_model_name_or_path=str(tmp_path / "snapshot"))
    return made / "base"


PLACES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "the base": (lambda made, _: made / "base", "base has the base in it"),
    "in the base": (lambda made, _: made / "base" / "merged", "merged is in the base, which is only read; give an"),
    "above the base": (lambda made, _: made, "has the base in it"),
    "a link to the base": (a_link_to_the_base, "link has the base in it"),
    "the adapter": (lambda made, _: made / "adapter", "adapter has the adapter in it"),
    "the base's blobs": (where_the_files_of_the_base_are, "base has the base in it"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_is_never_written(made: Path, tmp_path: Path, place: str) -> None:
    find, sentence = PLACES[place]
    output = find(made, tmp_path)
    source = tmp_path if (tmp_path / "adapter").exists() else made
    for overwrite in (False, True):
        assert sentence in refused(source, output, overwrite=overwrite)


def test_a_base_in_the_cache_of_the_hub_that_cannot_be_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read where it is: links to blobs, on a disk that is mounted read-only."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with mounted(tmp_path / "cache") as close:
        repository = tmp_path / "cache" / "models--owner--tiny"
        for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
            (repository / part).mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        for number, path in enumerate((made / "base").iterdir()):
            shutil.copy(path, repository / "blobs" / str(number))
            (repository / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
        close()
        shutil.copytree(made / "adapter", tmp_path / "adapter")
        change_config(tmp_path, base_model_name_or_path="owner/tiny")
        assert merge(tmp_path, tmp_path / "merged")
        assert merge(made, tmp_path / "of-directory")
    ours, theirs = model_files(tmp_path / "merged"), model_files(tmp_path / "of-directory")
    told = {"merge_report.json", "manifest.json"}
    assert {name for name in ours if ours[name] != theirs[name]} == told
    assert json.loads(ours["merge_report.json"])["base_fingerprint"] == f"commit {COMMIT}"


def test_the_base_has_the_commit_that_the_adapter_names(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the hub's main is by now."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--tiny"
    shutil.copytree(made / "base", repository / "snapshots" / COMMIT)
    (repository / "snapshots" / LATER).mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(LATER, encoding="utf-8")
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    change_config(tmp_path, base_model_name_or_path="owner/tiny", revision=COMMIT)
    assert merge(tmp_path, tmp_path / "merged")


# ---- where it goes ----


def a_file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("purged"))


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_directory_of_mine(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine", encoding="utf-8")


@pytest.mark.parametrize(
    ("put", "sentence"),
    [
        (a_file, "out is a file, and the merged model a directory; give another --output."),
        (a_link_to_nowhere, "out is a link to nowhere; remove it, or give another --output."),
        (a_loop, "out is a link to nowhere; remove it, or give another --output."),
        (a_directory_of_mine, "out is there and is no merge, so that it is not replaced; move it elsewhere, or merge"),
    ],
)
def test_what_is_no_merge_is_not_replaced(
    made: Path, tmp_path: Path, put: Callable[[Path], None], sentence: str
) -> None:
    put(tmp_path / "out")
    for overwrite in (False, True):
        assert sentence in refused(made, tmp_path / "out", overwrite=overwrite)


def test_what_stands_beside_a_merge_is_not_deleted_with_it(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert merge(made, output)
    whole = model_files(output)
    (output / "mine.gguf").write_text("mine", encoding="utf-8")
    assert not merge(made, output), "it is whole, and needs no other"
    (output / "config.json").write_text("{}", encoding="utf-8")
    sentence = "out is not replaced, since mine.gguf (1 such) was not written by the merge that is there; move that els"
    for overwrite in (False, True):
        assert sentence in refused(made, output, overwrite=overwrite)
    (output / "mine.gguf").unlink()
    assert "out is there and is a merge whose files have changed; give another --outp" in refused(made, output)
    assert merge(made, output, overwrite=True) and model_files(output) == whole


def test_what_is_being_merged_into_a_place_of_nearly_the_same_name_is_left_alone(made: Path, tmp_path: Path) -> None:
    left, other = tmp_path / ".saving-model-0123abcd", tmp_path / ".saving-model-2-0123abcd"
    left.mkdir()
    other.mkdir()
    merge(made, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "model"]


def test_an_empty_directory_and_a_link_to_one_on_another_disk(made: Path, tmp_path: Path) -> None:
    """The link stays one."""
    (tmp_path / "empty").mkdir()
    assert merge(made, tmp_path / "empty")
    with mounted(tmp_path / "disk"):
        (tmp_path / "disk" / "there").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "there")
        assert merge(made, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and not merge(made, tmp_path / "disk" / "there")
        assert model_files(tmp_path / "link") == model_files(tmp_path / "empty")
        assert "disk is where a file system is mounted, which no finished directory" in refused(made, tmp_path / "disk")


def test_a_place_that_cannot_be(made: Path, tmp_path: Path) -> None:
    a_file(tmp_path / "file")
    a_loop(tmp_path / "loop")
    assert "file is a file, and the merged model a directory; give" in refused(made, tmp_path / "file" / "out")
    assert "out cannot be looked at: its links have no end; give" in refused(made, tmp_path / "loop" / "out")
    assert ": File name too long; " in refused(made, tmp_path / ("long" * 100))


def test_a_missing_parent_is_made_and_goes_when_the_merge_fails(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    a_nan(tmp_path)
    assert "is not finite in float16" in refused(tmp_path, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()
    assert merge(made, tmp_path / "a" / "b" / "out")


def test_a_disk_that_is_read_only(made: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as close:
        close()
        for output in (tmp_path / "disk" / "out", tmp_path / "disk" / "a" / "out"):
            assert f"{output} could not be written: Read-only file system; nothing was kept" in refused(made, output)


def as_nobody(made: Path, output: Path) -> str:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with pytest.raises(MergeError) as error:
        merge(made, output)
    return str(error.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize(("mode", "sentence"), [(0o755, "could not be written"), (0o700, "cannot be looked at")])
def test_a_directory_of_another_user(made: Path, mode: int, sentence: str) -> None:
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(mode)
        assert f"out {sentence}: Permission denied" in run_ranks(1, as_nobody, made, directory / "out")[0]
        assert not list(directory.iterdir())
    finally:
        shutil.rmtree(directory)
