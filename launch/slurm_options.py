"""The `slurm` block: sbatch's own long options as sbatch spells them, and how they stand in a job's text."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

OptionValue = str | int | bool

# Of sbatch 22.05 to 25.05; whether the Slurm that is there has it, sbatch itself says.
WITH_VALUE = frozenset(
    """
    account acctg-freq batch bb bbf begin cluster-constraint clusters comment constraint container container-id
    core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution
    exclude export export-file extra-node-info gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
    gpus-per-task gres gres-flags hint job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem
    mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes partition power prefer priority
    profile qos reservation segment sockets-per-node switches thread-spec threads-per-core time time-min tmp
    tres-bind tres-per-task wait-all-nodes wckey
    """.split()
)
AS_FLAG = frozenset("contiguous hold oversubscribe overcommit reboot spread-job stepmgr use-min-nodes".split())
AS_EITHER = frozenset("exclusive get-user-env nice oom-kill-step propagate".split())
VALID = sorted(WITH_VALUE | AS_FLAG | AS_EITHER)
_ONE_TASK = "every node has one task, which starts a rank for each of its GPUs; give nodes and gpus-per-node"
_LOG = "what the job prints goes to logs/job.log in the run directory"
# What the job's own text depends on.
OURS = {
    "array": "a job has one run; launch/array.sbatch is an example of many",
    "chdir": "the job works in the checkout that it was submitted from",
    "error": _LOG,
    "no-kill": "a run needs all of its nodes",
    "no-requeue": "run.max_requeues: 0 is how a run is not continued",
    "ntasks": _ONE_TASK,
    "ntasks-per-core": _ONE_TASK,
    "ntasks-per-gpu": _ONE_TASK,
    "ntasks-per-node": _ONE_TASK,
    "ntasks-per-socket": _ONE_TASK,
    "open-mode": "the log goes on over all starts of the job",
    "output": _LOG,
    "parsable": "submit reads what sbatch prints",
    "requeue": "a job that is preempted always continues; run.max_requeues says how often",
    "signal": "the ranks are asked to stop before the time limit, as early as their steps and saves need",
    "test-only": "--dry-run is what shows a job without submitting it",
    "wait": "submit returns when the job is in the queue",
    "wrap": "the job is the run",
}
# Environment variables of sbatch that go before what a job's text says, where they are not just the option's name.
_VARIABLES = {
    "array": "ARRAY_INX",
    "bb": "BURST_BUFFER",
    "cpu-freq": "CPU_FREQ_REQ",
    "mem": "MEM_PER_NODE",
    "switches": "REQ_SWITCH",
    "time": "TIMELIMIT",
}


def _checked(value: object) -> object:
    """`{gpus-per-node: 4}` as pairs, which a frozen recipe can hold."""
    options = value if isinstance(value, Mapping) else dict(value) if isinstance(value, tuple) else None
    assert options is not None, "load_recipe has seen to it that a block is a mapping"
    return tuple((str(name), _checked_value(str(name), options[name])) for name in options)


def _checked_value(name: str, value: object) -> OptionValue:
    if name in OURS:
        raise ValueError(f"{name} is not for a recipe to set: {OURS[name]}")
    if name not in VALID:
        near = difflib.get_close_matches(name.replace("_", "-"), VALID, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name} is not an option of sbatch; {hint}The valid ones here are {', '.join(VALID)}")
    if isinstance(value, bool):
        if name in WITH_VALUE:
            raise ValueError(f"{name} takes a value, but this is {str(value).lower()}; if it is meant, quote it")
        return value
    if not isinstance(value, str | int):
        raise ValueError(f"{name} = {value!r} is neither text nor a whole number; write it in quotes")
    if name in AS_FLAG:
        raise ValueError(f"{name} is on or off, but this is {value!r}; write true, or leave it out")
    if value == "" or (isinstance(value, str) and not _can_be_written(value)):
        raise ValueError(
            f"{name} = {value!r} cannot stand in a line of sbatch; give it without line breaks, and not empty"
        )
    return value


SlurmOptions = Annotated[tuple[tuple[str, OptionValue], ...], BeforeValidator(_checked), PlainSerializer(dict)]


def directive(name: str, value: OptionValue) -> str:
    """The `#SBATCH` line of an option; sbatch knows double quotes, and a backslash before what they would end at."""
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    is_plain = text.replace("-", "").replace("_", "").replace(":", "").replace("@", "").isalnum() and text.isascii()
    return f"#SBATCH --{name}={text}" if is_plain else f'#SBATCH --{name}="{text}"'


def literal_path(path: str) -> str:
    """What sbatch's --output makes this very path of; it would replace %j by the job's number, and take backslashes."""
    return path.replace("\\", "\\\\") if "\\" in path else path.replace("%", "%%")


def overriding_variables(names: Sequence[str]) -> set[str]:
    """The variables with which a user's environment would change these options, whatever the job's text says."""
    return {"SBATCH_" + _VARIABLES.get(name, name.upper().replace("-", "_")) for name in names}


def seconds_of(limit: OptionValue) -> float | None:
    """sbatch's --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; else None."""
    days, dash, rest = str(limit).partition("-") if "-" in str(limit) else ("0", "", str(limit))
    parts = rest.split(":")
    if not all(part.isdecimal() for part in (days, *parts)) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return float(((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds)


def num_gpus_of(options: Mapping[str, OptionValue]) -> int | None:
    """Of a node: gpus-per-node or gres, such as 4, a100:4 or gpu:a100:4; None where neither says a number."""
    for name in ("gpus-per-node", "gres"):
        words = str(options.get(name, "")).partition(",")[0].partition("(")[0].split(":")
        if words[-1].isdecimal() and (name == "gpus-per-node" or words[0] == "gpu"):
            return int(words[-1])
    return None


def num_nodes_of(options: Mapping[str, OptionValue]) -> int:
    """The least of sbatch's --nodes, such as 2 or 2-4; without it, one."""
    least = str(options.get("nodes", 1)).partition("-")[0]
    return int(least) if least.isdecimal() and int(least) else 1


def memory_bytes_of(options: Mapping[str, OptionValue]) -> int | None:
    """Of a node by sbatch's --mem: megabytes, or with K, M, G or T, all by 1024; None for all of a node (0) or none."""
    text = str(options.get("mem", 0)).upper().removesuffix("B")
    number, unit = (text[:-1], text[-1]) if text[-1:] in tuple("KMGT") else (text, "M")
    return int(number) * 1024 ** (1 + "KMGT".index(unit)) or None if number.isdecimal() else None


def _can_be_written(text: str) -> bool:
    return not any(character in text for character in "\n\r\0") and text.isprintable()
