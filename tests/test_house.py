"""The rules of the house: who imports whom, what the README promises, what has no place in the tree."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent

# A module imports only from the rows above its own.
LAYERS = (
    "launch launch.errors launch.modes launch.table launch.slurm_options launch.batching metrics metrics.tokens",
    "launch.attention launch.weight_files",
    "launch.recipe launch.findings",
    "launch.same_run",
    "launch.config launch.lock launch.preemption launch.watchdog launch.deadline launch.samples",
    "launch.runs launch.imports launch.hub launch.remote_code launch.free_memory launch.shapes launch.layout_files",
    "launch.trackers launch.status launch.trained_shapes launch.hardware launch.memory launch.activations",
    "launch.status_lines launch.model_files",
    "launch.split launch.fingerprint launch.preflight launch.slurm launch.rows launch.templates launch.selftest",
    "launch.formats launch.tokens launch.token_findings launch.batch_step launch.speed",
    "launch.ledger launch.plan",
    "launch.data_report launch.plan_report launch.room",
    "launch.forecast",
    "launch.out_of_memory",
    "launch.data launch.data_page",
    "launch.head launch.sample_attention",
    "launch.meeting launch.tiny launch.quantisation launch.shards launch.adapter launch.engine launch.packing",
    "launch.machine launch.merge_rule launch.merge_output launch.training_state launch.collectives",
    "launch.machine_findings launch.merge_plan",
    "launch.job launch.outlook",
    "launch.report launch.overflow launch.movement launch.worst_case",
    "launch.factory",
    "launch.model",
    "launch.checkpoint launch.merge launch.vocabulary launch.starting_adapter",
    "launch.saved_embeddings launch.parity",
    "launch.saving launch.start launch.prepare launch.merge_from_disk",
    "launch.answering launch.check launch.finish",
    "launch.data_commands launch.generate launch.chat launch.submit",
    "train launch.__main__",
)
NUM_LIGHT_LAYERS = 14  # these start fast on a login node
LAYER = {module: number for number, row in enumerate(LAYERS) for module in row.split()}
WITHIN_A_LAYER = {
    ("launch.merge", "launch.checkpoint"),
}
HEAVY = ("torch", "transformers", "peft", "deepspeed", "accelerate")
EMPTY_NAMES = {"utils", "helpers", "misc", "common", "manager"}
BUILD_MACHINE_PATHS = ("/".join(("", "work", "")), "/".join(("", "tmp", "bash_jobs")))


# ---- the house as it stands ----


def files() -> list[str]:
    """What git tracks; in a copy without git (or before the first commit) what stands there, dotfiles apart."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, text=True, check=False).stdout
    if listing:
        return [name for name in listing.split("\0") if (HOUSE / name).is_file()]
    found = (path.relative_to(HOUSE) for path in HOUSE.rglob("*") if path.is_file())
    skipped = re.compile(r"\.|__pycache__$|runs$")
    return [str(path) for path in found if not any(skipped.match(part) for part in path.parts)]


SOURCES = sorted([HOUSE / "train.py", *HOUSE.glob("launch/**/*.py"), *HOUSE.glob("metrics/**/*.py")])
MODULES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_bytes())
    for path in SOURCES
}


def imports_of_ours(tree: ast.Module) -> Iterator[str]:
    """Every module of ours that is imported anywhere in the tree, functions and TYPE_CHECKING included."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in whole]
        yield from (name for name in names if name.partition(".")[0] in ("launch", "metrics", "train"))


# ---- who imports whom ----


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    """To a row above, or along one of the named pairs."""
    imported = set(imports_of_ours(MODULES[module]))
    unknown = {module, *imported} - LAYER.keys()
    assert not unknown, f"not in the table; add it to a row of LAYERS: {unknown}"
    wrong = {name for name in imported if LAYER[name] >= LAYER[module] and (module, name) not in WITHIN_A_LAYER}
    assert not wrong, f"{module} imports what stands beside or below it: {wrong}"


def test_login_node_modules_import_no_torch() -> None:
    """Neither themselves nor through what they import."""
    light = [name for name in MODULES if name.startswith("launch") and LAYER[name] < NUM_LIGHT_LAYERS]
    code = f"""if True:
        import importlib, sys
        for module in {light}:
            importlib.import_module(module)
            found = [name for name in {HEAVY} if name in sys.modules]
            if found:
                sys.exit(f"{{module}} imports {{', '.join(found)}}")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- how it is written ----


def test_no_module_with_an_empty_name() -> None:
    assert [name for name in files() if name.endswith(".py") and Path(name).stem in EMPTY_NAMES] == []


def test_functions_are_annotated_and_public_names_documented() -> None:
    """Names that start with _, what is in them, and functions inside functions need no docstring."""
    faults = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = node.args
                parameters = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
                bare = [p.arg for p in parameters if p and not p.annotation and p.arg not in ("self", "cls")]
                bare += [] if node.returns else ["return"]
                faults += [f"{module}:{node.lineno} {node.name}: {name} has no annotation" for name in bare]
            if isinstance(node, ast.Module) or (isinstance(node, ast.ClassDef) and not node.name.startswith("_")):
                inner = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
                bare = [n.name for n in inner if not n.name.startswith("_") and not ast.get_docstring(n)]
                faults += [f"{module}: {name} has no docstring" for name in bare]
    assert not faults, "\n".join(faults)


def test_no_path_of_a_build_machine() -> None:
    texts = {name: (HOUSE / name).read_text(encoding="utf-8", errors="ignore") for name in files()}
    assert [name for name, text in texts.items() if any(path in text for path in BUILD_MACHINE_PATHS)] == []


# ---- what the README promises ----


def readme() -> str:
    return (HOUSE / "README.md").read_text(encoding="utf-8")


def fenced_blocks() -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE)


def readme_commands() -> list[list[str]]:
    """The words of every command of ours in the fenced blocks, without `$ ` and VARIABLE=value before it."""
    lines = "\n".join(fenced_blocks()).replace("\\\n", " ").splitlines()
    ours = re.compile(r"\s*(?:\$ )?(?:[A-Z_]+=\S* )*((?:accelerate launch|python -m launch|make)(?: .*)?)$")
    found = [ours.match(piece) for line in lines for piece in re.split(r"&&|[;|]", line)]
    return [shlex.split(command[1], comments=True) for command in found if command]


def missing_files(words: list[str]) -> list[str]:
    """Named files that do not exist, apart from placeholders in capitals, `block.key=value` and a run's own files."""
    paths = [word.rpartition("=")[2] for word in words if not re.match(r"[a-z]+\.[a-z_]+=", word)]
    paths = [path for path in paths if re.search(r"\.(yaml|json|jsonl|jinja|py)$", path)]
    return [path for path in paths if not re.search(r"\b[A-Z]{2,}|^runs/", path) and not (HOUSE / path).exists()]


def printed_by(*command: str) -> str:
    """Standard output of a command that must succeed, plain and wide."""
    env = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}
    env.pop("MAKEFLAGS", None)  # these tests are themselves started by make
    done = subprocess.run(command, cwd=HOUSE, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    return done.stdout


def test_readme_is_short() -> None:
    assert len(readme().splitlines()) <= 200


def test_readme_links_exist() -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", readme())
    assert [link for link in links if not (HOUSE / link).exists()] == []


def test_the_tests_that_the_fault_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (HOUSE / "docs" / "faults.md").read_text(encoding="utf-8")))
    there = {
        node.name
        for path in (HOUSE / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 30 and named <= there, named - there


def test_readme_tree_is_the_tree() -> None:
    """Every path drawn exists, and every top-level entry is drawn. Names end where two spaces or a # begin."""
    (tree,) = (block for block in fenced_blocks() if block.startswith("cairn/"))
    drawn, parents = [], [(-1, "")]  # (column, folder)
    for line in tree.splitlines()[1:]:
        column = len(line) - len(line.lstrip("│├└─ "))
        names = re.split(r"\s{2,}|\s#", line[column:].strip())[0].replace(",", " ").split()
        while parents[-1][0] >= column:
            parents.pop()
        drawn += [parents[-1][1] + name for name in names]
        if names and names[0].endswith("/"):
            parents.append((column, drawn[-len(names)]))
    assert [path for path in drawn if not any(HOUSE.glob(path.rstrip("/")))] == []
    top = {Path(name).parts[0] for name in files() if not name.startswith(".")}
    assert top - {Path(path).parts[0] for path in drawn} == set()


def test_readme_commands_parse() -> None:
    """The files, subcommands and make targets that commands name exist."""
    commands = readme_commands()
    assert {"accelerate", "python", "make"} == {words[0] for words in commands}
    assert [path for words in commands for path in missing_files(words)] == []
    subcommands = {words[3] for words in commands if words[0] == "python"} - {"--help"}
    listing = printed_by(sys.executable, "-m", "launch", "--help")
    assert [name for name in subcommands if not re.search(rf"^[\s│|]+{name}\s", listing, re.MULTILINE)] == []
    for target in {word for words in commands for word in words[1:] if words[0] == "make" and "=" not in word}:
        printed_by("make", "-n", target)
