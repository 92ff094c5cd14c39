"""The page in headless Chromium, at two widths and in both themes: it draws every plot, every link works, and it
fetches nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distrec.config import RunConfig, decode
from distrec.methods.registry import resolve
from distrec.tuning.report import report
from tests.browser import CHROMIUM, Page, browser
from tests.tuning.planted_sweeps import NINE, TWO, plant, plant_data

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]

PLOTS = """Array.from(document.querySelectorAll(".plot"), plot => {
  const wanted = plot.data.filter(trace => trace.visible !== false).length;
  const traces = Array.from(plot.querySelectorAll(".trace"));
  const drawn = traces.filter(trace => Array.from(trace.querySelectorAll("path")).some(path => {
    const box = path.getBBox();
    return path.getAttribute("d") && path.getAttribute("d").length > 4 && box.width + box.height > 0;
  })).length;
  const box = plot.querySelector(".main-svg").getBoundingClientRect();
  return {name: plot.id, wanted, drawn, left: box.left, right: box.right, height: box.height};
})"""
CUT = """Array.from(document.querySelectorAll(".plot"), plot => {
  const frame = plot.getBoundingClientRect();
  return Array.from(plot.querySelectorAll("text")).filter(text => {
    const box = text.getBoundingClientRect();
    return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1);
  }).map(text => plot.id + ": " + text.textContent);
}).flat()"""
LINKS = "Array.from(document.querySelectorAll('a'), link => link.getAttribute('href'))"
LOADED = "performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:'))"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a rich sweep, of a sweep with one trial for each method, and of one that still searches."""
    root = tmp_path_factory.mktemp("sweeps")
    data = plant_data(str(root / "data"))
    plant(str(root / "rich"), data, NINE)
    plant(str(root / "sparse"), data, NINE, trials=1, seeds=1)
    plant(str(root / "searching"), data, TWO, state="searching")
    for name in ("rich", "sparse", "searching"):
        report(str(root / name))
    return root


def all_is_drawn(page: Page, width: int) -> list[str]:
    """Check what must hold for a page however it was opened, and return the names of the plots."""
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("data:", "file:"))] == []
    assert page.run(LOADED) == []
    assert page.run("innerWidth") == width
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "scrolls sideways"
    found = page.run(PLOTS)
    for plot in found:
        assert plot["wanted"] > 0, plot
        assert plot["drawn"] == plot["wanted"], plot
        assert plot["left"] >= 0, plot
        assert plot["right"] <= width, plot
    assert page.run(CUT) == []
    return [plot["name"] for plot in found]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["rich", "sparse", "searching"])
def test_everything_is_drawn_at_every_width(page: Page, sweeps: Path, name: str, width: int) -> None:
    page.open(sweeps / name / "report.html", width)
    plots = all_is_drawn(page, width)
    assert len(plots) == len(set(plots))
    assert "plot-curves" in plots
    assert "plot-best-so-far" in plots
    assert ("plot-leaderboard" in plots) == (name != "searching")
    assert ("plot-parallel-odmt" in plots) == (name != "sparse")
    assert ("plot-importance-odmt" in plots) == (name != "sparse")


def test_every_link_leads_somewhere_and_every_config_can_be_run(page: Page, sweeps: Path) -> None:
    page.open(sweeps / "rich" / "report.html", 1280)
    links = page.run(LINKS)
    anchors = [link for link in links if link.startswith("#")]
    assert len(anchors) >= 10
    assert page.run(
        "Array.from(document.querySelectorAll('[id]'), one => one.id).length === "
        "new Set(Array.from(document.querySelectorAll('[id]'), one => one.id)).size"
    )
    for anchor in anchors:
        assert page.run(f"document.getElementById('{anchor[1:]}') !== null"), anchor
    configs = [link for link in links if not link.startswith("#")]
    assert len(configs) == len(NINE) + 1  # the config of the choice is linked twice
    methods = set()
    for link in configs:
        head, _, content = link.partition(",")
        assert head == "data:text/yaml;base64"
        config = decode(RunConfig, yaml.safe_load(base64.b64decode(content)))
        assert resolve(config) == config
        methods.add(config.method["name"])
    assert methods == {one.method for one in NINE}


def test_pictures_are_there_and_titles_are_text(page: Page, sweeps: Path) -> None:
    page.open(sweeps / "rich" / "report.html", 390)
    sizes = page.run("""Promise.all(Array.from(document.querySelectorAll(".pic:not(.none)"), async picture => {
      const image = new Image();
      image.src = getComputedStyle(picture).backgroundImage.slice(5, -2);
      await image.decode();
      return image.naturalHeight;
    }))""")
    assert len(sizes) > 100
    assert set(sizes) == {112}
    assert page.run("document.querySelectorAll('.name b').length") == 0
    assert page.run("document.querySelector('.name').textContent.includes('<b>&')")


def test_plots_follow_the_theme_while_the_page_is_open(page: Page, sweeps: Path) -> None:
    ink = "getComputedStyle(document.querySelector('#plot-curves .xtitle')).fill"
    line = "document.querySelector('#plot-curves .js-line').style.stroke"
    paper = "getComputedStyle(document.body).backgroundColor"
    page.open(sweeps / "rich" / "report.html", 390)
    light = [page.run(value) for value in (ink, line, paper)]
    page.theme(dark=True)
    dark = [page.run(value) for value in (ink, line, paper)]
    assert all(before != after for before, after in zip(light, dark))
    all_is_drawn(page, 390)
    page.theme(dark=False)
    assert [page.run(value) for value in (ink, line, paper)] == light
    page.open(sweeps / "rich" / "report.html", 390, dark=True)
    assert [page.run(value) for value in (ink, line, paper)] == dark


def test_a_legend_hides_and_shows_a_line(page: Page, sweeps: Path) -> None:
    page.open(sweeps / "rich" / "report.html", 1280)
    button = "document.querySelector('.legend button[data-plot=plot-curves]')"
    shown = "document.querySelectorAll('#plot-curves .js-line').length"
    before = page.run(shown)
    page.run(f"{button}.click()")
    assert page.run(shown) == before - 1
    assert page.run(f"{button}.getAttribute('aria-pressed')") == "false"
    page.run(f"{button}.click()")
    assert page.run(shown) == before
    assert page.problems == []
