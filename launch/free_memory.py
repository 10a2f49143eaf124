"""How much memory this process may still take."""

from collections.abc import Iterator
from pathlib import Path

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the machine has left, or what the tightest of the cgroups that this process is in leaves.

    Pages of files count as free: the kernel gives them back. A job of Slurm or a container has a cgroup, of either
    version, whose limit kills where the machine itself has plenty.
    """
    meminfo = _figures(proc / "meminfo")
    left_bytes = [meminfo["MemAvailable:"] * 1024]
    for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left_bytes += [left for root in (cgroups, cgroups / "unified") for left in _left(root, path, *_V2)]
        elif "memory" in controllers.split(","):
            left_bytes += _left(cgroups / "memory", path, *_V1)
    return max(min(left_bytes), 0)


def _left(root: Path, path: str, limit: str, usage: str, of_files: tuple[str, ...]) -> Iterator[int]:
    """Of each cgroup from the root down that can be seen; a container sees its own at the root."""
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        try:
            limit_bytes = int((place / limit).read_text(encoding="utf-8"))
            usage_bytes = int((place / usage).read_text(encoding="utf-8"))
            stat = _figures(place / "memory.stat")
        except (OSError, ValueError):  # not this place, or "max"
            continue
        yield limit_bytes - usage_bytes + sum(stat[name] for name in of_files)


def _figures(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines}
