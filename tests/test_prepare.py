"""launch prepare: what a job needs is there before it starts, and the job then needs no network."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from conftest import ROOT, World, run_ranks
from typer.testing import CliRunner

import train
from launch import preflight, runs
from launch.__main__ import app
from launch.config import load_recipe
from launch.findings import collect
from launch.preflight import commit_of_base
from launch.recipe import ModelBlock
from launch.room import find_room

COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
NAME = "owner/tiny"


def python_m_launch(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def cache(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the base as owner/tiny, and no network."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(world.base, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    offline(tmp_path / "hub", monkeypatch)
    return repository


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 and HF_HOME do in a process of their own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def without_network(recipe: str | Path) -> int:
    """train.py's main, where Python asks no other machine anything."""

    def hook(event: str, details: tuple[Any, ...]) -> None:
        is_local = event == "socket.connect" and details[1][0] in ("127.0.0.1", "::1")
        if event in ("socket.connect", "socket.getaddrinfo") and not is_local:
            raise AssertionError(f"{event} {details}")

    sys.addaudithook(hook)
    return train.main([str(recipe)])


def base_of(world: World, name: str) -> str:
    """What the last checkpoint says that the run was trained on."""
    (_, path) = runs.published_checkpoints(world.run_directory(name))[-1]
    return str(json.loads((path / "state.json").read_text(encoding="utf-8"))["identity"]["base"])


# ---- then the job ----


def test_a_prepared_run_starts_without_a_network(world: World, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("hub", model={"name_or_path": NAME}, train={"max_steps": 2})
    directory = world.run_directory("hub")
    code, out, err = python_m_launch("prepare", recipe, "train.learning_rate=0.01")
    assert (code, err) == (0, "")
    base, rows = (next(line for line in out.splitlines() if f"  {name}  " in line) for name in ("base", "rows"))
    assert base.startswith(f"  base   {NAME} at {COMMIT}:") and "there already" in " ".join(out.split())
    assert rows.startswith("  rows   50: 40 trained, 10 evaluated; prepared now (")
    assert "HF_HUB_OFFLINE=1 " in out.splitlines()[-1] and out.endswith(f" {recipe} train.learning_rate=0.01\n")
    assert {path.name for path in directory.iterdir()} == {
        *("base.json", "data", "data_report.json", "evaluation_rows.txt", "quarantine.jsonl")
    }, "no status, no environment, no lock: the first start is still to come"
    store = directory / "data" / "token_ids.int32"
    before = store.stat().st_mtime_ns
    assert "; as prepared before" in python_m_launch("prepare", recipe)[1]
    capfd.readouterr()
    assert run_ranks(1, without_network, recipe) == [0]
    said = capfd.readouterr().out
    assert "\n  attention     sdpa, as the recipe says (Qwen2Attention)\n" in said
    words = " ".join(said.split())  # where a line ends depends on how long the directory's name is
    assert f"run {directory}, from step 0" in words and "rows 50: 40 trained, 10 evaluated" in words
    assert store.stat().st_mtime_ns == before and base_of(world, "hub") == f"commit {COMMIT}"
    assert runs.read_status(directory)["restarts_in_vain"] == 0
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    assert (environment["earlier"], environment["after_step"], environment["lost_steps"]) == ([], 0, 0)


def test_a_later_commit_is_none_of_a_prepared_run(world: World, cache: Path) -> None:
    """Another run has fetched what it needed of it, which is not what this one needs."""
    recipe = world.recipe("later", model={"name_or_path": NAME}, train={"max_steps": 1})
    assert python_m_launch("prepare", recipe)[0] == 0
    (cache / "refs" / "main").write_text(LATER, encoding="utf-8")
    (cache / "snapshots" / LATER).mkdir()
    assert f"{NAME} at {COMMIT}" in python_m_launch("prepare", recipe)[1]
    assert python_m_launch("check", recipe)[2] == ""
    assert python_m_launch("submit", recipe, "--dry-run")[2] == ""
    assert run_ranks(1, without_network, recipe) == [0]
    assert base_of(world, "later") == f"commit {COMMIT}"
    adapter = world.run_directory("later") / "adapter" / "adapter_config.json"
    assert json.loads(adapter.read_text(encoding="utf-8"))["revision"] == COMMIT, "for who loads it"


def test_which_commit_a_run_has(cache: Path) -> None:
    def identity(base: str) -> dict[str, Any]:
        return {"recipe": {"model": {"name_or_path": NAME}}, "base": base}

    named, free = (ModelBlock(name_or_path=NAME, revision=revision) for revision in ("a" * 40, None))
    begun, pinned = identity("commit " + "b" * 40), {NAME: "c" * 40}
    assert commit_of_base(named, begun, pinned) == "a" * 40
    assert commit_of_base(free, begun, pinned) == "b" * 40
    assert commit_of_base(free, identity("sha256 1"), pinned) == "c" * 40
    assert commit_of_base(free, None, {"owner/other": "c" * 40}) == COMMIT


def test_a_run_that_has_begun_is_prepared_for_what_it_began_with(world: World, cache: Path) -> None:
    recipe = world.recipe("begun", model={"name_or_path": NAME})
    shutil.copytree(cache / "snapshots" / COMMIT, cache / "snapshots" / LATER)
    state = world.run_directory("begun") / "checkpoints" / "step-000001" / "state.json"
    state.parent.mkdir(parents=True)
    identity = {"recipe": {"model": {"name_or_path": NAME}}, "base": f"commit {LATER}"}
    state.write_text(json.dumps({"identity": identity}), encoding="utf-8")
    assert f"{NAME} at {LATER}" in python_m_launch("prepare", recipe)[1]


def test_a_later_commit_is_none_of_a_run_that_has_begun(world: World, cache: Path) -> None:
    """Nobody prepared it, its base is in the cache, and of the hub's next commit another run has fetched a little."""
    recipe = world.recipe("goes-on", model={"name_or_path": NAME}, train={"max_steps": 1})
    state = world.run_directory("goes-on") / "checkpoints" / "step-000001" / "state.json"
    state.parent.mkdir(parents=True)
    identity = {"recipe": {"model": {"name_or_path": NAME}}, "base": f"commit {COMMIT}"}
    state.write_text(json.dumps({"identity": identity}), encoding="utf-8")
    (cache / "refs" / "main").write_text(LATER, encoding="utf-8")
    (cache / "snapshots" / LATER).mkdir()
    shutil.copy(cache / "snapshots" / COMMIT / "config.json", cache / "snapshots" / LATER)
    checks = preflight.checks(load_recipe(recipe), [lambda: find_room(load_recipe(recipe))])
    assert collect(checks) == [], "as a start has them"
    assert python_m_launch("check", recipe)[::2] == (0, "")


def test_a_directory_as_modelscope_leaves_it(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the dots of its name as ___, a link under its own name, and files that are no model's."""
    offline(tmp_path / "no-cache", monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "modelscope" / "hub" / "models" / "Org"
    place = folder / "Tiny1___5-Chat"
    shutil.copytree(world.base, place)
    (folder / "Tiny1.5-Chat").symlink_to(place)
    for name in (".msc", ".mv", "configuration.json"):
        (place / name).write_text("{}", encoding="utf-8")
    for name, number in (("Tiny1___5-Chat", 1), ("Tiny1.5-Chat", 2)):
        model = {"name_or_path": f"~/.cache/modelscope/hub/models/Org/{name}"}
        recipe = world.recipe(f"scope-{number}", model=model, train={"max_steps": 1})
        code, out, err = python_m_launch("prepare", recipe)
        assert (code, err) == (0, "") and "HF_HUB_OFFLINE" not in out
        assert f"Org/{name}: " in out and "kB, where it is" in " ".join(out.split())
    assert run_ranks(1, without_network, recipe) == [0]
    assert not (tmp_path / "no-cache").exists()


def test_the_tiny_model_is_the_runs_own(world: World) -> None:
    recipe = world.recipe("own", model={"name_or_path": "tiny-qwen2"}, data={"template": "chatml"})
    code, out, _ = python_m_launch("prepare", recipe)
    assert code == 0 and "  base  tiny-qwen2, which the run builds itself" in out
    assert not (world.directory / "runs" / "base-models").exists()


# ---- what is refused ----


def test_a_run_at_work_is_left_alone(world: World, cache: Path) -> None:
    recipe = world.recipe("busy", model={"name_or_path": NAME})
    with runs.open_run(world.run_directory("busy")):
        code, _, err = python_m_launch("prepare", recipe)
        assert code == 2 and "Another process is running in" in err
        assert {path.name for path in world.run_directory("busy").iterdir()} == {".lock"}


def test_code_of_its_own_needs_leave(world: World, cache: Path) -> None:
    config = cache / "snapshots" / COMMIT / "config.json"
    facts = json.loads(config.read_text(encoding="utf-8"))
    code = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    config.write_text(json.dumps(facts | code), encoding="utf-8")
    recipe = world.recipe("code", model={"name_or_path": NAME})
    exit_code, _, err = python_m_launch("prepare", recipe)
    assert exit_code == 2 and f"config.json of {NAME} asks for code of its own (code.Config, code.Model)" in err
    exit_code, _, err = python_m_launch("prepare", recipe, "model.trust_remote_code=true")
    assert exit_code == 2 and "set model.revision to the commit whose code you have read" in err
    assert not world.run_directory("code").exists()


def test_a_second_call_needs_no_torch(world: World, cache: Path) -> None:
    recipe = world.recipe("light", model={"name_or_path": NAME})
    assert python_m_launch("prepare", recipe)[0] == 0
    code = f"""if True:
        import sys
        from launch.__main__ import app
        app(["prepare", {str(recipe)!r}], standalone_mode=False)
        print([name for name in ("torch", "transformers") if name in sys.modules])
    """
    environment = os.environ | {"HF_HUB_CACHE": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "; as prepared before" in done.stdout and done.stdout.splitlines()[-1] == "[]"


# ---- a hub ----


class Hub(ThreadingHTTPServer):
    """What huggingface_hub and datasets ask a hub, or its mirror, for."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.repositories = repositories  # models/owner/tiny, datasets/owner/rows
        self.sizes: dict[str, int] = {}  # that it tells, where they are not the real ones
        self.fetched: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        found = self.find(unquote(self.path).partition("?")[0], has_body=has_body)
        missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        body, headers = found if found is not None else (b"", missing)
        self.send_response(404 if found is None else 200)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body if has_body else b"")

    def find(self, path: str, *, has_body: bool) -> tuple[bytes, dict[str, str]] | None:
        """(body, headers) of the API's answer, or of a file."""
        for repository, files in self.server.repositories.items():
            name = repository.partition("/")[2]
            if path in (f"/api/{repository}", *(f"/api/{repository}/revision/{r}" for r in ("main", COMMIT))):
                return json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), {}
            if path == f"/api/{repository}/tree/{COMMIT}":
                sizes = {file: len(content) for file, content in files.items()} | self.server.sizes
                entries = [{"type": "file", "path": f, "size": size, "oid": f} for f, size in sizes.items()]
                return json.dumps(entries).encode(), {}
            file = path.removeprefix(f"/{repository.removeprefix('models/')}/resolve/{COMMIT}/")
            if file in files:
                self.server.fetched += [file] if has_body else []
                linked = {"X-Linked-Size": str(self.server.sizes[file])} if file in self.server.sizes else {}
                return files[file], {"ETag": f'"{file}"', "X-Repo-Commit": COMMIT, **linked}
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(world: World) -> Iterator[Hub]:
    """With the base, the same weights in two formats more, what no run needs, and the rows."""
    files = {path.name: path.read_bytes() for path in world.base.iterdir()}
    files |= {"consolidated.safetensors": b"x" * 1000, "pytorch_model.bin": b"x" * 1000, "figure.png": b"x"}
    with Hub({f"models/{NAME}": files, "datasets/owner/rows": {"train.jsonl": world.rows.read_bytes()}}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def in_its_own_process(*command: str | Path, **environment: str) -> tuple[int, str, str]:
    """One that reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE as it starts."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


START = """
import sys
from conftest import run_ranks
from test_prepare import without_network
assert run_ranks(1, without_network, sys.argv[1]) == [0]
"""


@pytest.mark.slow
def test_a_mirror_is_asked_once_and_the_job_never(world: World, hub: Hub, tmp_path: Path) -> None:
    recipe = world.recipe("mirror", model={"name_or_path": NAME}, data={"train": "owner/rows"}, train={"max_steps": 2})
    home = str(tmp_path / "home")
    code, out, err = in_its_own_process("-m", "launch", "prepare", recipe, HF_ENDPOINT=hub.address, HF_HOME=home)
    assert code == 0, err
    needed = set(hub.repositories[f"models/{NAME}"]) - {"consolidated.safetensors", "pytorch_model.bin", "figure.png"}
    assert sorted(hub.fetched) == sorted([*needed, "train.jsonl"]), "each once"
    assert f"  base   {NAME} at {COMMIT}" in out and " fetched now (" in " ".join(out.split())
    assert "  rows   50: 40 trained, 10 evaluated; prepared now (" in out
    assert f"  cache  {home}/hub," in out
    hub.fetched.clear()
    out = in_its_own_process("-m", "launch", "prepare", recipe, HF_ENDPOINT=hub.address, HF_HOME=home)[1]
    assert "there already" in " ".join(out.split()) and "; as prepared before" in out and hub.fetched == []
    hub.shutdown()
    store = world.run_directory("mirror") / "data" / "token_ids.int32"
    before = store.stat().st_mtime_ns
    code, out, err = in_its_own_process("-c", START, recipe, HF_HUB_OFFLINE="1", HF_HOME=home)
    assert code == 0, err
    assert f"run {world.run_directory('mirror')}, from step 0" in " ".join(out.split())
    assert store.stat().st_mtime_ns == before and base_of(world, "mirror") == f"commit {COMMIT}"


@pytest.mark.slow
def test_what_has_no_room_is_not_fetched(world: World, hub: Hub, tmp_path: Path) -> None:
    hub.sizes["model.safetensors"] = 10**18
    recipe = world.recipe("large", model={"name_or_path": NAME})
    home = str(tmp_path / "home")
    code, _, err = in_its_own_process("-m", "launch", "prepare", recipe, HF_ENDPOINT=hub.address, HF_HOME=home)
    assert code == 2 and f"Refused: model.name_or_path = {NAME} needs 1e+06 TB in {home}/hub, which has room" in err
    assert "model.safetensors" not in hub.fetched
