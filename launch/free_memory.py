"""How much memory this process may still take, and how much it may have at all."""

from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """What the machine has left, or what the tightest of the cgroups that this process is in leaves.

    Pages of files count as free: the kernel gives them back. A job of Slurm or a container has a cgroup, of either
    version, whose limit kills where the machine itself has plenty.
    """
    of_machine = _figures(proc / "meminfo")["MemAvailable:"] * 1024
    return max(min([of_machine, *(limit - used for limit, used in _limits(proc, cgroups))]), 0)


def limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """What the machine has, or the least limit of the cgroups that this process is in."""
    of_machine = _figures(proc / "meminfo")["MemTotal:"] * 1024
    return min([of_machine, *(limit for limit, _ in _limits(proc, cgroups))])


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is taken of it) of each cgroup with a limit that this process is in."""
    for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for root in (cgroups, cgroups / "unified"):
                yield from _of_path(root, path, *_V2)
        elif "memory" in controllers.split(","):
            yield from _of_path(cgroups / "memory", path, *_V1)


def _of_path(root: Path, path: str, limit: str, usage: str, of_files: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Of each cgroup from the root down that can be seen; a container sees its own at the root."""
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        try:
            most_bytes = int((place / limit).read_text(encoding="utf-8"))
            usage_bytes = int((place / usage).read_text(encoding="utf-8"))
            stat = _figures(place / "memory.stat")
        except (OSError, ValueError):  # not this place, or "max"
            continue
        yield most_bytes, usage_bytes - sum(stat[name] for name in of_files)


def _figures(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines}
