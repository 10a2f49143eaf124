"""What a run does not use is not imported: PEFT takes bitsandbytes wherever it is installed, and that torch's compiler.

Together they are a quarter of the seconds of a rank's imports, and 43 MiB of its memory.
"""

import sys
from collections.abc import Sequence

from launch.config import parse_command_line
from launch.errors import ConfigError


def leave_out_bitsandbytes(arguments: Sequence[str]) -> None:
    """For a recipe whose base is not in 4 bits; before anything else is imported.

    Where None stands in sys.modules an import fails as if there were no such package (the import system's own rule),
    which PEFT and transformers are prepared for.
    """
    try:
        is_used = parse_command_line(arguments).model.load_in_4bit
    except ConfigError:  # which the run will say
        is_used = False
    if not is_used:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
