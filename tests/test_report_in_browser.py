"""The report's page as a browser shows it: there, readable, quiet, on wide and narrow screens,
light, dark, on paper.

Needs Chromium and chromedriver (Debian: chromium, chromium-driver) and selenium. Where one is
missing the tests are skipped; with CI_BROWSER=1, as in .ci/run, that is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recorded_runs import curve, example, row, rows, write_run
from tools.report import __main__ as report_command

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
)
# Pixels of text and ground, blended down to an opaque one; WCAG 2's contrast of the two.
CONTRASTS = """
const numbers = color => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4)
const light = color => { const part = c => { c /= 255; return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4 }
  return .2126 * part(color[0]) + .7152 * part(color[1]) + .0722 * part(color[2]) }
const ground = element => { for (; element; element = element.parentElement) {
  const color = numbers(getComputedStyle(element).backgroundColor); if (color[3]) return color }
  return [255, 255, 255, 1] }
const texts = 'h1,h2,h3,h4,p,a,li,th,td,dt,dd,caption,figcaption,summary,.state,svg text'
return [...document.querySelectorAll(texts)].map(one => {
  const style = getComputedStyle(one), color = numbers(one.matches('svg text') ? style.fill : style.color)
  const [low, high] = [light(color), light(ground(one))].sort((a, b) => a - b)
  return [one.tagName + ': ' + one.textContent.slice(0, 30), (high + .05) / (low + .05)] })
"""


def missing() -> str:
    """What a browser test lacks here; empty if nothing."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        programs.append("selenium")
    return ", ".join(programs)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = example(tmp_path_factory.mktemp("runs"))
    write_run(
        root / "<script>alert(1)<",
        row("all"),
        curve(80, 4),
        mixup=0.3,
        told=["warning: <b>bold</b>"],
    )
    file = root / "report.html"
    file.write_text(report_command.make_report(str(root), rows())[0], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if lacking := missing():
        message = f"no browser to look at the report with: {lacking} missing (see requirements-dev.txt and .ci/run)"
        (pytest.fail if os.environ.get("CI_BROWSER") == "1" else pytest.skip)(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def show(
    browser: Any, page: Path, width: int = 1200, scheme: str = "light", media: str = "screen"
) -> None:
    """Loads the page on a screen `width` pixels wide."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


def every(browser: Any, selector: str, expression: str) -> list[Any]:
    """A JavaScript expression of `one`, for every element of a selector."""
    return list(
        browser.execute_script(
            f"return [...document.querySelectorAll({selector!r})].map(one => {expression})"
        )
    )


IS_SEEN = "one.checkVisibility({visibilityProperty: true, opacityProperty: true}) && one.getBoundingClientRect().height > 8"


def test_tables_figures_charts_and_pictures_are_there_and_seen(browser: Any, page: Path) -> None:
    show(browser, page)
    assert browser.title == "SMMix: a report of runs"
    seen = every(browser, "section:not(#runs) table", IS_SEEN)
    assert len(seen) == 5
    assert all(seen)
    text = browser.execute_script("return document.body.innerText")
    for figure in (
        "81.07 ± 0.21",
        "−0.03",
        "81.27 ± 0.21",
        "52.00 ± 1.00",
        "53.33 ± 1.04",
        "not run",
        "not finished",
        "unfinished: epoch 3 of 4",
        "<script>alert(1)<",
        "<b>bold</b>",
    ):
        assert figure in text
    drawn = every(
        browser,
        "svg.chart",
        "[one.getBoundingClientRect().width, one.querySelectorAll('polyline').length]",
    )
    assert len(drawn) == 3 + 14 * 4
    assert all(width > 250 and lines >= 1 for width, lines in drawn)
    inside = every(
        browser,
        "svg.chart polyline, svg.chart text",
        "((b, v) => b.x >= 0 && b.y >= 0 && b.x + b.width <= v.width && b.y + b.height <= v.height)"
        "(one.getBBox(), one.ownerSVGElement.viewBox.baseVal)",
    )
    assert inside
    assert all(inside)
    assert every(browser, "img", "one.complete && one.naturalWidth > 0") == [True] * 14
    links = every(browser, 'a[href^="#"]', "document.getElementById(one.hash.slice(1)) !== null")
    assert len(links) > 20
    assert all(links)


def test_it_runs_nothing_asks_for_nothing_and_complains_of_nothing(
    browser: Any, page: Path
) -> None:
    browser.get_log("browser"), browser.get_log("performance")
    show(browser, page)
    assert browser.execute_script("return document.scripts.length") == 0
    assert not browser.get_log("browser")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in asked
    assert [url for url in asked if url != page.as_uri() and not url.startswith("data:")] == []


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_the_page_never_scrolls_sideways(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wider = every(
        browser,
        "h1, h2, h3, p, dl, figure, img, summary, .scroll, .warnings",
        "one.getBoundingClientRect().right > innerWidth + 1 ? one.outerHTML.slice(0, 80) : ''",
    )
    assert not [one for one in wider if one]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, page: Path, scheme: str) -> None:
    show(browser, page, scheme=scheme)
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (color == "rgb(255, 255, 255)") == (scheme == "light")
    weak = {name: ratio for name, ratio in browser.execute_script(CONTRASTS) if ratio < 4.5}
    assert not weak
    strokes = every(browser, "svg.chart polyline", "getComputedStyle(one).stroke")
    assert "none" not in strokes


def test_the_keyboard_reaches_what_is_folded_and_what_scrolls(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page, 360)
    body = browser.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    assert (
        browser.execute_script("return document.activeElement.textContent") == "Skip to the tables"
    )
    assert all(
        every(browser, ".scroll", "one.tabIndex === 0 && one.getAttribute('aria-label') !== ''")
    )
    folded = browser.find_element("css selector", "details:not([open]) > summary")
    browser.execute_script("arguments[0].focus()", folded)
    folded.send_keys(Keys.ENTER)
    assert browser.execute_script("return arguments[0].parentElement.open", folded)


def test_paper_shows_what_is_folded_on_the_screen(browser: Any, page: Path) -> None:
    show(browser, page, scheme="dark", media="print")
    assert (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert all(every(browser, "details:not([open]) table", IS_SEEN))
    assert not any(every(browser, "nav", IS_SEEN))
    printed = browser.execute_cdp_cmd("Page.printToPDF", {})
    assert len(printed["data"]) > 50_000
