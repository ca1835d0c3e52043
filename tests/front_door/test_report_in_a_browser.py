"""The report as a reader sees it, in headless Chromium: widths, colours, keys, paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from cotune.reporting.comparison import compare_runs
from cotune.reporting.page import render_comparison, render_report
from cotune.reporting.run_record import read_run
from written_run import write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, e.g. apt-get install chromium")

LONG = "x" * 400 + " <script>document.title = 'broken'</script> ein_Wort.ohne-Leerzeichen/" + "y" * 200

CONTRAST = """(() => {
  const luminance = color => {
    const linear = value => value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const part = color.match(/[\\d.]+/g).slice(0, 3).map(value => linear(value / 255));
    return .2126 * part[0] + .7152 * part[1] + .0722 * part[2];
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = [];
  for (const node of document.querySelectorAll('main *:not(svg):not(svg *)')) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) continue;
    const [a, b] = [luminance(getComputedStyle(node).color), luminance(behind(node))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push(ratio.toFixed(2) + ' ' + node.outerHTML.slice(0, 80));
  }
  return poor;
})()"""


TOO_WIDE = """[...document.querySelectorAll('main *:not(svg):not(svg *)')]
  .filter(node => node.clientWidth > 1 && node.scrollWidth > node.clientWidth + 1)
  .filter(node => getComputedStyle(node).overflowX === 'visible' && getComputedStyle(node).display !== 'inline')
  .map(node => node.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "one stage": write_run(folder / "one"),
        "long words": write_run(folder / "three", stages=3, text=LONG),
        "unfinished, bare": write_run(folder / "bare", scores=[[0, 1]], recorded=False, finished=False),
    }
    pages = {name: render_report(read_run(run)) for name, run in runs.items()}
    compared = compare_runs([read_run(runs["one stage"]), read_run(runs["long words"])])
    pages["compared"] = render_comparison(compared)
    found = {}
    for number, (name, text) in enumerate(pages.items()):
        found[name] = folder / f"{number}.html"
        found[name].write_text(text, encoding="utf-8")
    return found


NAMES = ("one stage", "long words", "unfinished, bare", "compared")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("width", "media"), [(360, "screen"), (720, "screen"), (1280, "screen"), (700, "print")])
def test_nothing_is_wider_than_the_page_even_with_all_unfolded(
    width: int, media: str, name: str, page: Page, files: dict[str, Path]
) -> None:
    page.open(files[name], width=width, media=media)
    page.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(TOO_WIDE) == []
    assert page.said == []
    assert page.requested == [files[name].resolve().as_uri()]
    assert page.run("document.title") != "broken"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["one stage", "compared"])
def test_all_text_stands_out_from_what_is_behind_it(name: str, dark: bool, page: Page, files: dict[str, Path]) -> None:
    page.open(files[name], width=900, dark=dark)
    page.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 23, 26)" if dark else "rgb(252, 251, 249)"
    )
    assert page.run(CONTRAST) == []


def test_a_link_to_an_example_unfolds_it(page: Page, files: dict[str, Path]) -> None:
    page.open(files["one stage"], width=900)
    example = "document.querySelector(document.querySelector('#changes ~ details a').hash).closest('details')"
    assert page.run(f"{example}.open") is False
    page.run("document.querySelector('#changes ~ details a').click()")
    assert page.run(f"{example}.open") is True


def test_keys_alone_reach_and_unfold_an_example(page: Page, files: dict[str, Path]) -> None:
    page.open(files["one stage"], width=900)
    for _ in range(120):
        page.press("Tab")
        if page.run("document.activeElement.parentElement.className") == "way":
            break
    page.press("Enter")
    assert page.run("document.activeElement.parentElement.open") is True


def test_a_phone_shows_the_narrow_charts_alone(page: Page, files: dict[str, Path]) -> None:
    shown = "[...document.querySelectorAll('svg')].filter(e => e.checkVisibility()).map(e => e.getAttribute('class'))"
    page.open(files["one stage"], width=360)
    assert set(page.run(shown)) == {"narrow"}
    page.open(files["one stage"], width=1280)
    assert set(page.run(shown)) == {"wide"}
