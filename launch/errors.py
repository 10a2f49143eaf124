"""What can be refused: every error a user can mend is a `LaunchError` whose message is one sentence."""


class LaunchError(Exception):
    """One sentence: what is wrong, where, the value, the remedy, the valid choices."""

    def __init__(self, sentence: str) -> None:
        # It may quote somebody's row, and a terminal takes no lone surrogate.
        super().__init__(sentence.encode("utf-8", "backslashreplace").decode())


def first_line(error: BaseException) -> str:
    """What a library says, for the middle of a sentence of ours."""
    return str(error).strip().partition("\n")[0].rstrip(".")


class ConfigError(LaunchError):
    """The recipe or its overrides."""


class PreflightError(LaunchError):
    """The machine, the launch command or the run directory."""


class RunInUseError(PreflightError):
    """The run directory of a process that may be alive."""


class SlurmError(LaunchError):
    """What Slurm's own commands refuse, or a Slurm that does not answer."""


class DataError(LaunchError):
    """The rows."""


class TemplateError(LaunchError):
    """A chat template, or a row that does not fit it."""


class RefusedConversationError(TemplateError):
    """What a chat template says of one conversation, which is that row's fault."""


class ModelError(LaunchError):
    """The base model or its tokenizer."""


class AdapterError(LaunchError):
    """An adapter that a run cannot start from."""


class CheckpointError(LaunchError):
    """A checkpoint that cannot be written, trusted or resumed."""


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read now, and may be whole."""


class TrainingError(LaunchError):
    """Training that cannot go on."""


class OutOfMemoryError(TrainingError):
    """The memory of one rank, of which the others know nothing."""


class NoProgressError(LaunchError):
    """A run that starts again and again, and comes no further."""


class MergeError(LaunchError):
    """A merge that would give wrong weights."""
