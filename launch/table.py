"""Figures for people: byte counts, and names and texts in two aligned columns."""

import textwrap
from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Decimal units, three digits: 1234567 -> 1.23 MB."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if count < 999.5:
            break
        count, unit = count / 1000, larger
    return f"{count:.3g} {unit}"


def format_table(rows: Sequence[tuple[str, str]], columns: int = 80) -> str:
    """Names and texts in two aligned columns; long texts continue under themselves."""
    width = max(len(name) for name, _ in rows) + 4
    return "\n".join(
        textwrap.fill(
            text,
            columns,
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows
    )
