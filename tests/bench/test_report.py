"""What ``bench`` writes for people: Markdown, one HTML page, pictures. The rows here are made up."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from iokernels.bench.cli import main
from iokernels.bench.report import Report, Section, html, markdown, plot
from iokernels.bench.report.rows import Need, Row, against
from iokernels.bench.timing import machine
from iokernels.bench.timing.compare import Comparison
from iokernels.bench.timing.machine import Machine
from iokernels.bench.timing.measure import Timing
from iokernels.ops.flash_attention.case import CASE
from iokernels.runtime.device import KNOWN, DeviceSpec
from iokernels.testing.case import Pass

PASSES: tuple[Pass, ...] = ("fwd", "bwd")
WRONG = "the error of <out> & lse is | 3 times `what` it may be"


def report(spec: DeviceSpec | None, swept: tuple[str, ...] = ()) -> Report:
    """Two implementations at two lengths and two passes, one of them wrong once, one missing, one compared."""
    here = Machine(torch.device("cpu"), "A <made up> machine", ("2 cores",), {"torch": "9.9"}, spec)
    sections = []
    for n in (1024, 2048):
        for which in PASSES:
            shape = CASE.vocabulary.shape(b=1, h=2, n=n, d=64)
            flops, nbytes = CASE.flops(shape, which), CASE.floor_bytes(shape, torch.bfloat16, which)
            need = Need(shape, torch.bfloat16, which, flops, nbytes, machine.floor(spec, flops, nbytes, torch.bfloat16))
            rows = [
                replace(timed(need, "torch", 2e-3), versus=Comparison("git:main", 0.05, 1.2, 1.1, 1.3, 21)),
                timed(need, "sdpa", 1e-3),
                Row(need, "triton", "backend", "wrong", reason=WRONG, error=3.0),
                Row(need, "flex", "peer", "missing", reason="not here"),
            ]
            sections.append(
                Section(against(rows, "sdpa"), "sdpa", f"iokernels bench op --shape {shape} --pass {which}")
            )
    return Report("flash_attention", here, 0, "sdpa", swept, sections)


def timed(need: Need, name: str, seconds: float) -> Row:
    timing = Timing(seconds * 0.9, seconds, seconds * 1.2, 9, "wall")
    return Row(need, name, "backend", "timed", timing=timing, error=0.5, checked=need.shape)


class Page(HTMLParser):
    """Reads a page and insists that every element is closed in its place."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


@pytest.mark.parametrize("spec", [None, KNOWN["h100-sxm"]], ids=["no-roof", "roof"])
def test_the_page_is_whole_and_needs_nothing_else(spec: DeviceSpec | None) -> None:
    text = html.document(report(spec))
    page = Page(text)
    assert page.texts["h1"] == ["flash_attention"]
    assert page.texts["th"].count("backend") == 4
    assert page.texts["td"].count("sdpa") == 4
    assert ("roof" in page.texts["th"]) == (spec is not None)
    assert any("A <made up> machine" in part for part in page.texts["p"])
    assert f"wrong: {WRONG}" in page.texts["span"]
    assert any("time +20.0% (+10.0% to +30.0%, 21 rounds): slower" in part for part in page.texts["li"])
    assert sum("--pass bwd" in part for part in page.texts["code"]) == 2, "the commands that repeat it"
    assert "script" not in page.texts
    assert "prefers-color-scheme: dark" in text

    loaded = [value for _, name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(loaded) == 4, "two figures, each light and dark"
    pictures = []
    for address in loaded:
        kind, _, data = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        pictures.append(base64.b64decode(data))
        assert ElementTree.fromstring(pictures[-1]).tag == "{http://www.w3.org/2000/svg}svg"
    assert len(set(pictures)) == 4
    light, dark = (plot.THEMES[theme]["page"].encode() for theme in ("light", "dark"))
    assert [dark in picture for picture in pictures] == [True, False, True, False]
    assert [light in picture for picture in pictures][1::2] == [True, True]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)


def test_a_page_without_any_time() -> None:
    full = report(None)
    untimed = [replace(section, rows=section.untimed) for section in full.sections]
    page = Page(html.document(replace(full, sections=untimed)))
    assert "td" not in page.texts
    assert "img" not in {tag for tag, _, _ in page.attributes}


def test_markdown() -> None:
    text = markdown.document(report(KNOWN["h100-sxm"]))
    assert text.startswith("# flash_attention\n")
    assert "A \\<made up> machine (2 cores)" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        lines = table.splitlines()
        assert len(lines) == 4, "a head, a rule and two rows"
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        assert len({len(line) for line in cells}) == 1
        assert [line[0].strip() for line in cells] == ["backend", ":---", "torch", "sdpa"]
    assert "- triton: wrong: the error of \\<out> & lse is \\| 3 times \\`what\\` it may be" in text
    assert "- torch against git:main: time +20.0% (+10.0% to +30.0%, 21 rounds): slower by more than 5%" in text
    assert text.count("```sh\niokernels bench op --shape") == 4


def test_speed_over_length() -> None:
    figure = plot.speed(report(KNOWN["h100-sxm"], swept=("n",)))
    assert len(figure.axes) == 2, "forward and backward"
    for axis, which in zip(figure.axes, PASSES, strict=True):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert set(lines) == {"torch", "sdpa", "roofline"}
        assert list(lines["sdpa"].get_xdata()) == [1024, 2048]
        flops = [CASE.flops(CASE.vocabulary.shape(b=1, h=2, n=n, d=64), which) for n in (1024, 2048)]
        assert list(lines["sdpa"].get_ydata()) == pytest.approx([count / 1e-3 / 1e12 for count in flops])
        assert axis.get_title(loc="left") == f"{which} bf16 b=1,h=2,d=64"
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1k", "2k"]


def test_bars_without_a_sweep() -> None:
    figure = plot.speed(report(None))
    assert len(figure.axes) == 4
    assert [len(axis.patches) for axis in figure.axes] == [2, 2, 2, 2]


def test_every_row_is_on_the_roofline_plot() -> None:
    spec = KNOWN["h100-sxm"]
    made = report(spec)
    (axis,) = plot.roofline(made).axes
    places = [tuple(map(float, place)) for mark in axis.collections for place in mark.get_offsets()]
    rows = [row for row in made.rows if row.timing is not None]
    expected = [(row.need.flops / row.need.nbytes, row.tflops) for row in rows]
    assert len(rows) == 8
    assert places == [pytest.approx(place) for place in expected]
    (roof,) = axis.get_lines()
    assert roof.get_label() == "roof, bf16"
    peak = spec.matmul_peak[torch.bfloat16]
    left, ridge, right = roof.get_xdata()
    assert ridge == pytest.approx(peak / spec.dram_bandwidth)
    assert left < ridge < right
    assert list(roof.get_ydata()) == pytest.approx([left * spec.dram_bandwidth / 1e12, peak / 1e12, peak / 1e12])
    assert len(plot.roofline(report(None)).axes[0].get_lines()) == 0, "no roof where no peak is known"


def test_the_command_writes_them(tmp_path: Path) -> None:
    targets = {"md": "r.md", "html": "r.html", "plot": "speed.png", "roofline": "roof.png"}
    arguments = [word for option, name in targets.items() for word in (f"--{option}", str(tmp_path / name))]
    shape = ["--shape", "b=1,h=2,d=16", "--sweep", "n=32:64:x2", "--pass", "fwd,bwd"]
    command = ["bench", "flash_attention", "--device", "cpu", "--backend", "torch", "--seconds", "0.02"]
    assert main([*command, *shape, *arguments]) == 0
    assert (tmp_path / "r.md").read_text().count("```sh") == 4
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts["td"].count("torch") == 4
    for name in ("speed.png", "roof.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["plot", "roofline", "html"])
def test_no_picture_without_matplotlib(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert main(["bench", "flash_attention", "--device", "cpu", f"--{option}", "x"]) == 2
    assert f"--{option} needs matplotlib: pip install 'iokernels[bench]'" in capsys.readouterr().err
