"""The page: it needs nothing but itself, says all that the report says, and shows rows as text whatever they hold."""

import errno
import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from typer.testing import CliRunner

from launch import runs
from launch.__main__ import app
from launch.data_commands import FIRST_OF_EVALUATION, FIRST_OF_TRAIN
from launch.data_page import MAX_CHARACTERS, ShownSample, data_page

REPORT: dict[str, Any] = {
    "rows": 123_456_790,
    "outcomes": {"trained": 123_000_101, "evaluated": 456_650, "left out": 27, "too long": 11, "malformed": 1},
    "files": {"/data/" + "a-long-directory-name/" * 8 + "rows.jsonl": 123_456_701, "second.jsonl": 89},
    "template": "chatml",
    "train": {
        "samples": 123_000_101,
        "tokens": 9_876_543_210,
        "trained_tokens": 1_234_567_891,
        "trained_share": 0.125,
        "tokens_p50": 612,
        "tokens_p95": 2718,
        "tokens_max": 3999,
    },
    "evaluation": {
        "samples": 456_650,
        "tokens": 8_765_432,
        "trained_tokens": 7_654_321,
        "trained_share": 0.87321,
        "tokens_p50": 613,
        "tokens_p95": 2719,
        "tokens_max": 3998,
    },
    "answers": {"trained": 123_456_751, "stop_token_share": 0.99999, "stop_tokens": {"<|im_end|>": 123_456_742}},
    "shortened": 43,
    "tokenised_in_pieces": {"special-token text": 17, "token across an edge": 1_234_567},
    "length_histogram": {
        "edges": [0, 1000, 2000, 3000, 4000],
        "train": [122_000_000, 1_000_090, 0, 11],
        "evaluation": [0, 400_000, 56_649, 1],
    },
    "examples": {
        "too long": [{"row_id": f"second.jsonl:{n}", "detail": f"{n} tokens, and it ends"} for n in (4711, 4712, 4713)],
        "malformed": [{"row_id": "second.jsonl:12", "detail": "<script>alert(1)</script> \u202e" + "x" * 900}],
    },
}
CODE = "<|im_start|>assistant\ndef f():\n\treturn '  石头'  \n\n<|im_end|>"
SAMPLES = [
    ShownSample(
        "second.jsonl:1",
        "train",
        31,
        21,
        [("<|im_start|>user\n写一个函数。\u3000好吗<|im_end|>\n", False), (CODE, True)],
    ),
    ShownSample("second.jsonl:2", "train", 3999, 1999, [("石" * 1500, False), ("a" * 1500, True)], "the longest"),
    ShownSample(
        "/data/" + "long-name/" * 20 + "b.jsonl:3", "evaluation", 9, 4, [("<b>&amp;</b>\n", False), ("好", True)]
    ),
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """The elements of a page: what is open, and the text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []  # of every sample, and what is marked in it
        self.marked: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "meta":
            return
        self._open.append(tag)
        if ("class", "text") in attrs:
            self.texts.append("")
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.words += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data
        if "article" in self._open and "div" in self._open[self._open.index("article") :]:
            self.texts[-1] += data
            if "mark" in self._open:
                self.marked[-1] += data


def page_of(*stretches: tuple[str, bool]) -> str:
    return data_page("run", REPORT, [ShownSample("a:1", "train", 8, 4, list(stretches))])


def counts_in(value: object) -> Iterator[int]:
    if isinstance(value, dict):
        for part in value.values():
            yield from counts_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from counts_in(part)
    elif isinstance(value, int):
        yield value


# ---- what it says ----


def test_every_count_of_the_report_is_on_the_page() -> None:
    words = Reader(data_page("run", REPORT, [])).words
    report = {
        **REPORT,
        "length_histogram": {name: REPORT["length_histogram"][name] for name in ("train", "evaluation")},
    }
    missing = [count for count in counts_in(report) if not re.search(rf"(?<![\d,]){count:,}(?![\d,])", words)]
    assert missing == []
    assert {"12.5%", "87.3%", "<0.1%", ">99.9%"} <= set(words.split())  # what is not quite all is not all
    assert "and 8 more, in quarantine.jsonl" in words  # 11 too long, 3 of them shown
    for examples in REPORT["examples"].values():
        assert all(example["row_id"] in words for example in examples)


def test_the_bars_are_the_histogram() -> None:
    page = data_page("run", REPORT, [])
    bars = re.findall(r'<rect class="(\w+)" [^>]*height="([\d.]+)"><title>(\S+) tokens: ([\d,]+) samples', page)
    for split in ("train", "evaluation"):
        counts = [int(count.replace(",", "")) for name, _, _, count in bars if name == split]
        assert counts == REPORT["length_histogram"][split]
        assert sum(counts) == REPORT[split]["samples"]
        heights = [float(height) for name, height, _, _ in bars if name == split]
        highest = max(zip(counts, heights, strict=True))
        for count, height in zip(counts, heights, strict=True):
            share = highest[1] * count / highest[0]
            assert abs(height - share) < 0.1 or (0 < share < height < 2), "few samples are seen, none are not"
    assert [label for name, _, label, _ in bars if name == "train"] == [
        "0–999",
        "1,000–1,999",
        "2,000–2,999",
        "3,000–3,999",
    ]
    table = page[page.index('<table id="histogram">') :].partition("</table>")[0]
    cells = [int(cell.replace(",", "")) for cell in re.findall(r"<td>([\d,]+)</td>", table)]
    assert cells[::2] == REPORT["length_histogram"]["train"] and cells[1::2] == REPORT["length_histogram"]["evaluation"]


def test_without_evaluation_there_is_no_second_chart() -> None:
    histogram = {"edges": [0, 1], "train": [1], "evaluation": [0]}
    page = data_page("run", {**REPORT, "evaluation": {"samples": 0}, "length_histogram": histogram}, SAMPLES[:1])
    assert page.count("<svg") == 1 and "None" not in page


# ---- samples ----


def test_samples_are_shown_as_they_are() -> None:
    reader = Reader(data_page("run", REPORT, SAMPLES))
    assert reader.texts == ["".join(text for text, _ in sample.stretches) for sample in SAMPLES]
    assert reader.marked == ["".join(text for text, trained in sample.stretches if trained) for sample in SAMPLES]
    for sample in SAMPLES:
        assert sample.row_id in reader.words
        assert f"{sample.num_tokens:,} tokens,\n{sample.num_trained:,} trained" in reader.words
    assert "train, the longest: 3,999 tokens" in reader.words


def test_text_of_rows_is_never_markup() -> None:
    evil = "</div></article><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    plain = Reader(data_page("run", REPORT, SAMPLES[:1])).tags
    report = json.loads(json.dumps(REPORT))
    report["examples"]["malformed"][0] = {"row_id": evil, "detail": evil}
    report["files"] = {evil: 1, "b": 2}
    report["answers"]["stop_tokens"] = {evil: 123}
    report["template"] = evil
    page = data_page(evil, report, [ShownSample(evil, "train", 31, 21, [(evil, False), (evil, True)], evil)])
    reader = Reader(page)
    assert reader.texts == [evil + evil]
    assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in plain} | {"i"}
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on") or name == "src"]
    assert page.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize("code", [0x0, 0x8, 0xD, 0x7F, 0x85, 0xAD, 0x200B, 0x202E, 0x2066, 0xFEFF, 0xD800, 0xE0041])
def test_what_nobody_would_see_is_shown_by_its_number(code: int) -> None:
    page = page_of((f"a{chr(code)}b", True))
    assert Reader(page).marked == [f"aU+{code:04X}b"]
    page.encode()


def test_spaces_and_newlines_have_signs_that_are_not_copied() -> None:
    text = " a b  c\t\u3000\u3000d \n  e👩\u200d👧"
    page = page_of((text, False))
    assert Reader(page).texts == [text]
    body = page.partition('<div class="text" lang="">')[2].partition("</div>")[0]
    assert re.findall(r'<i class="(\w+)">', body) == "space space tab wide space newline space".split()


def test_a_long_sample_is_cut_in_the_middle() -> None:
    page = page_of(("a" * 3000, False), ("b" * 40_000, True), ("c" * 100, False), ("d" * 1900, True))
    (text,) = Reader(page).texts
    half = MAX_CHARACTERS // 2
    assert text == "a" * half + "41,000 characters are left out here" + "c" * 100 + "d" * 1900
    assert len(page) < len(data_page("run", REPORT, [])) + 6000
    (text,) = Reader(page_of(("a" * (MAX_CHARACTERS + 1), True))).texts
    assert text == "a" * half + "1 characters are left out here" + "a" * half
    assert Reader(page_of(("a" * MAX_CHARACTERS, True))).texts == ["a" * MAX_CHARACTERS]


# ---- the file ----


def test_it_needs_nothing_but_itself() -> None:
    page = data_page("run", REPORT, SAMPLES)
    assert [word for word in ("http", "src=", "href=", "@import", "url(", "<link", "<script>") if word in page] == []
    assert data_page("run", REPORT, SAMPLES) == page
    tags = Reader(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    named = [name for _, attributes in tags for name in (attributes.get("aria-labelledby") or "").split()]
    assert len(ids) == len(set(ids)) and set(named) <= set(ids)


def colours(page: str) -> list[dict[str, str]]:
    """The variables of the light scheme, of the dark one and of print."""
    return [
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    ]


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_enough_in_every_scheme() -> None:
    """WCAG AA: 4.5 for text, 3 for bars."""
    schemes = colours(data_page("run", REPORT, []))
    assert len(schemes) == 3
    pairs = [("ink", "page", 4.5), ("ink", "card", 4.5), ("muted", "page", 4.5), ("muted", "card", 4.5)]
    pairs += [("trained", "trained-card", 4.5), ("train", "page", 3.0), ("evaluation", "page", 3.0)]
    for scheme in schemes:
        for one, other, least in pairs:
            dark, light = sorted((luminance(scheme[one]), luminance(scheme[other])))
            assert (light + 0.05) / (dark + 0.05) >= least, (one, other, scheme)


# ---- the command ----


def data_command(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["data", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_data_writes_the_page(world: World) -> None:
    """Twice: from rows, and from what the first time has left; the run directory is a place for it."""
    recipe = world.recipe("page")
    pages = []
    for place in (world.directory / "page.html", world.run_directory("page") / "page.html"):
        code, out, err = data_command(recipe, "--html", place)
        assert (code, err) == (0, "") and out.splitlines()[-1].startswith(f"{place}: ")
        pages.append(place.read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert not list(world.directory.glob(".page.html*"))
    page = Reader(pages[0])
    rows = [json.loads(line) for line in world.rows.read_text(encoding="utf-8").splitlines()]
    row_ids = re.findall(r'<h3><span class="exact">rows\.jsonl:(\d+)</span>', pages[0])
    assert len(row_ids) == len(set(row_ids)) == len(page.texts)
    for row_id, text, trained in zip(row_ids, page.texts, page.marked, strict=True):
        row = rows[int(row_id) - 1]
        assert f"user\n{row['input']}<|im_end|>" in text and trained == f"{row['output']}<|im_end|>"
    held_out = (world.run_directory("page") / "evaluation_rows.txt").read_text(encoding="utf-8").split()
    of_train, of_evaluation = row_ids[:-FIRST_OF_EVALUATION], row_ids[-FIRST_OF_EVALUATION:]
    assert [f"rows.jsonl:{number}" for number in of_evaluation] == held_out[:FIRST_OF_EVALUATION]
    trained_rows = [n for n in range(1, 51) if f"rows.jsonl:{n}" not in held_out]
    assert list(map(int, of_train[:FIRST_OF_TRAIN])) == trained_rows[:FIRST_OF_TRAIN]
    assert "the longest" in page.words and "the shortest" in page.words
    lengths = [int(length) for length in re.findall(r"the (?:longest|shortest): (\d+) tokens", page.words)]
    report = json.loads((world.run_directory("page") / "data_report.json").read_text(encoding="utf-8"))
    assert max(lengths) == report["train"]["tokens_max"]


def test_samples_that_count_more_than_once_are_shown_once(world: World) -> None:
    recipe = world.recipe("heavy", data={"train": [{"path": str(world.rows), "weight": 3}], "test_size": 47})
    code, _, _ = data_command(recipe, "--html", world.directory / "heavy.html")
    assert code == 0
    page = (world.directory / "heavy.html").read_text(encoding="utf-8")
    row_ids = re.findall(r"<h3>.*?rows\.jsonl:(\d+)<", page)
    assert len(row_ids) == len(set(row_ids)) == 3 + FIRST_OF_EVALUATION


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("nowhere/page.html", "there is no directory"),
        ("a_directory", "is a directory"),
        ("rows.jsonl/a.html", "there is no"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_rows_are_read(world: World, place: str, sentence: str) -> None:
    (world.directory / "a_directory").mkdir(exist_ok=True)
    code, out, err = data_command(world.recipe("refused"), "--html", world.directory / place)
    assert (code, out) == (2, "")
    assert err.startswith("Refused: --html: ") and sentence in err and err.count("\n") == 1
    assert not (world.run_directory("refused") / "data").exists()


def test_a_disk_that_is_full_in_the_end_is_a_refusal_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = runs.write_text

    def fill(path: Path, text: str) -> None:
        if path.suffix == ".html":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(runs, "write_text", fill)
    code, out, err = data_command(world.recipe("full"), "--html", world.directory / "full.html")
    assert code == 2 and "now prepared" in out
    assert err == f"Refused: --html: {world.directory / 'full.html'} cannot be written: No space left on device.\n"


# ---- in a browser ----


def chromium(page: Path, profile: Path) -> str:
    """The page as Chromium leaves it."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout if done.returncode == 0 else ""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_no_browser_scrolls_it_sideways(tmp_path: Path) -> None:
    """In frames as wide as phones and screens; media queries in a frame are about the frame."""
    empty = tmp_path / "empty.html"
    empty.write_text("<p>here</p>", encoding="utf-8")
    if "here" not in chromium(empty, tmp_path / "profile"):
        pytest.skip(f"{CHROMIUM} is installed and does not run here")
    page = data_page("a-name-without-an-end-" * 6, REPORT, SAMPLES)
    page = page.replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert "写一个函数" in chromium(tmp_path / "page.html", tmp_path / "profile")
    widths = (320, 375, 768, 1280)
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>' for width in widths)
    measure = """<script>onload = () => {
      const found = [...document.querySelectorAll("iframe")].map(frame => {
        const inside = frame.contentDocument;
        const edges = [...inside.querySelectorAll("body *")].map(element => element.getBoundingClientRect().right);
        return [frame.contentWindow.innerWidth, inside.documentElement.scrollWidth, Math.ceil(Math.max(...edges))];
      });
      document.body.innerHTML = `<output>${JSON.stringify(found)}</output>`;
    }</script>"""
    probe = tmp_path / "probe.html"
    probe.write_text(f"<!doctype html><body>{frames}{measure}</body>", encoding="utf-8")
    output = re.search(r"<output>(.*?)</output>", chromium(probe, tmp_path / "profile"))
    assert output is not None
    found = json.loads(output[1])
    assert [visible for visible, _, _ in found] == list(widths)
    for visible, scrolled, edge in found:
        assert scrolled <= visible and edge <= visible, found
