"""Who may read what a run leaves: its user alone, or the group as well."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Until keep_private is called, nothing here changes anything.
_umask: int | None = None
_umask_at_start = 0


def keep_private(*, group_readable: bool) -> None:
    """From here on, what this process makes is 0600 and 0700, or 0640 and 0750."""
    global _umask, _umask_at_start
    umask = 0o027 if group_readable else 0o077
    found = os.umask(umask)
    if _umask is None:
        _umask_at_start = found
    _umask = umask


def give_usual_mode(path: Path) -> None:
    """What safetensors writes is 0600 whatever the process's umask is."""
    if _umask is not None:
        path.chmod(0o666 & ~_umask)


@contextmanager
def as_at_start() -> Iterator[None]:
    """For what is no run's own, such as the cache of the hub, which users may share."""
    if _umask is None:
        yield
        return
    os.umask(_umask_at_start)
    try:
        yield
    finally:
        os.umask(_umask)
