"""What is found before a weight is read: all of it at once, each finding one sentence with its remedy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from launch.errors import LaunchError, PreflightError


@dataclass(frozen=True)
class Finding:
    """What stops a run, or is only said."""

    sentence: str
    stops: bool = True  # the run would fail, or train something else than was meant
    error: type[LaunchError] = PreflightError


Check = Callable[[], Iterable[Finding]]


def collect(checks: Sequence[Check]) -> list[Finding]:
    """What all of them find. The LaunchError that one raises is a finding, too, and the others are made as well."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except LaunchError as error:
            findings.append(Finding(str(error), error=type(error)))
    return findings


def after(first: Check, others: Sequence[Check]) -> Check:
    """The others look at what the first says is there: they are made only when it finds nothing that stops."""

    def both() -> list[Finding]:
        found = collect([first])
        return found if any(finding.stops for finding in found) else [*found, *collect(others)]

    return both


def settle(findings: Sequence[Finding], say: Callable[[str], None]) -> None:
    """Say what does not stop the run, and raise what does: the one error, or a PreflightError that lists them all."""
    for finding in findings:
        if not finding.stops:
            say(f"Note: {finding.sentence}")
    stopping = [finding for finding in findings if finding.stops]
    if len(stopping) == 1:
        raise stopping[0].error(stopping[0].sentence)
    if stopping:
        listed = "".join(f"\n  {number}. {finding.sentence}" for number, finding in enumerate(stopping, start=1))
        raise PreflightError(f"{len(stopping)} things stand in the way.{listed}")
