"""The ledger and some samples as one HTML page, which needs nothing but itself: no script, no font, no network."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from launch.data_report import SPLITS

MAX_CHARACTERS = 4000  # of a sample; what is longer is cut in the middle
_TEMPLATE = Path(__file__).with_name("data_page.html.j2")

# What a reader would not see, or what HTML would not keep: each gets a sign. The joiners U+200C and U+200D are left
# alone, since emoji and whole scripts are written with them.
_SIGNS = re.compile(
    r"(?P<newline>\n)|(?P<tab>\t)"
    r"|(?P<space>(?m:^ +| +$)|  +|[\xa0\u1680\u2000-\u200a\u202f\u205f]+)|(?P<wide>\u3000+)"
    r"|(?P<code>[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e]"
    r"|[\u2060-\u206f\u3164\ud800-\udfff\ue000-\uf8ff\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
    r"|[\U000f0000-\U0010ffff])"
)

# The chart in pixels from its top. Across, everything is a share of its width, so that its words stay readable when
# it is narrow.
_PLOT_TOP, _PLOT_BOTTOM = 40, 160
_BAR_WIDTH = 0.92  # of its bin


@dataclass(frozen=True)
class ShownSample:
    """One sample as the model sees it."""

    row_id: str
    split: Literal["train", "evaluation"]
    num_tokens: int
    num_trained: int
    stretches: Sequence[tuple[str, bool]]  # (text, trained)
    why: str = ""  # what it is an example of: longest, shortest


@dataclass(frozen=True)
class _Bar:
    left: float  # percent of the width
    width: float
    top: float  # pixels
    height: float
    label: str  # the lengths that it stands for
    count: int


@dataclass(frozen=True)
class _Chart:
    """The lengths of one split; places across are percentages, places down are pixels."""

    split: str
    bars: list[_Bar]
    across: list[tuple[float, int]]  # (place, tokens)
    down: list[tuple[float, int]]  # (place, samples)
    marks: list[tuple[float, str]]  # (place, what stands there)


def data_page(name: str, report: Mapping[str, Any], shown: Sequence[ShownSample]) -> str:
    """The page of the run called `name`. `report` is data_report.json."""
    splits = [split for split in SPLITS if report[split]["samples"]]
    return _template().render(
        name=name,
        report=report,
        splits=splits,
        charts=[_chart(split, report) for split in splits],
        plot_bottom=_PLOT_BOTTOM,
        shown=[(sample, list(_cut(sample.stretches))) for sample in shown],
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": "{:,}".format, "percent": _percent, "short": _short, "pieces": _pieces}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _percent(share: float) -> str:
    """One decimal; neither a few nor all but a few are rounded to none or all."""
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}"


def _short(number: int) -> str:
    """A round number for an axis, on which there is no room for millions in full."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= max(size, 10_000):
            return f"{number / size:,g}{unit}"
    return f"{number:,}"


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text): plain text has no kind; a code is a character that is shown by its number."""
    position = 0
    for match in _SIGNS.finditer(text):
        if match.start() > position:
            yield "", text[position : match.start()]
        kind = str(match.lastgroup)
        yield kind, f"U+{ord(match[0]):04X}" if kind == "code" else match[0]
        position = match.end()
    if position < len(text):
        yield "", text[position:]


def _cut(stretches: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
    """(text, trained, 0) of every stretch; what is left out of a long sample is ("", False, its characters)."""
    total = sum(len(text) for text, _ in stretches)
    first, last = (MAX_CHARACTERS // 2, total - MAX_CHARACTERS // 2) if total > MAX_CHARACTERS else (total, total)
    position = 0
    is_cut = False
    for text, is_trained in stretches:
        head, tail = text[: max(0, first - position)], text[max(0, last - position) :]
        if head:
            yield head, is_trained, 0
        if not is_cut and position + len(text) > first:
            is_cut = True
            yield "", False, last - first
        if tail and last > first:
            yield tail, is_trained, 0
        position += len(text)


def _chart(split: str, report: Mapping[str, Any]) -> _Chart:
    edges, counts = report["length_histogram"]["edges"], report["length_histogram"][split]
    highest = max(counts)
    height = _PLOT_BOTTOM - _PLOT_TOP
    bars = []
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        size = max(1.5, height * count / highest) if count else 0.0  # one sample among thousands is still seen
        label = f"{start:,}–{end - 1:,}" if end - 1 > start else f"{start:,}"
        left, right = 100 * start / edges[-1], 100 * end / edges[-1]
        bars.append(
            _Bar(
                round(left, 3),
                round(_BAR_WIDTH * (right - left), 3),
                round(_PLOT_BOTTOM - size, 1),
                round(size, 1),
                label,
                count,
            )
        )
    return _Chart(
        split,
        bars,
        [(round(100 * tick / edges[-1], 3), tick) for tick in _ticks(edges[-1], 5)],
        [(round(_PLOT_BOTTOM - height * tick / highest, 1), tick) for tick in _ticks(highest, 3)],
        [
            (
                round(100 * report[split][f"tokens_{which}"] / edges[-1], 3),
                f"{which} {report[split][f'tokens_{which}']:,}",
            )
            for which in ("p50", "p95")
        ],
    )


def _ticks(highest: int, most: int) -> list[int]:
    """0 and at most `most` round numbers up to `highest`, evenly spaced."""
    steps = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    step = next(step for step in steps if highest // step <= most)
    return list(range(0, highest + 1, step))
