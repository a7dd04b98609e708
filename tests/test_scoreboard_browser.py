"""The scoreboard in a browser: sorted, filtered, searched, and legible in light and dark. Needs Chromium and selenium."""

import shutil
from pathlib import Path

import pytest

from understudy.scoreboard import render_scoreboard

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
RESULTS = Path(__file__).parent.parent / "docs" / "claims"

# WCAG 2.1: (lighter + 0.05) / (darker + 0.05) of relative luminances, for every element that has text of its own.
LOWEST_CONTRAST = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
const page = light(getComputedStyle(document.body).backgroundColor);
const texts = [...document.body.querySelectorAll("*")].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.offsetParent);
return Math.min(...texts.map(e => light(getComputedStyle(e).color)).map(l => (Math.max(l, page) + 0.05) / (Math.min(l, page) + 0.05)));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1300,900",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(DRIVER))
    driver.get(render_scoreboard(RESULTS, tmp_path_factory.mktemp("board")).as_uri())
    yield driver
    errors = driver.get_log("browser")
    driver.quit()
    assert not errors


def cells(browser, column):
    """Text of a column of the rows that are shown, from top to bottom."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden).map(r => r.cells[arguments[0]].innerText)",
        column,
    )


def sort_by(browser, column):
    browser.execute_script("document.querySelectorAll('th button')[arguments[0]].click()", column)


def test_columns_sort_in_both_directions_with_what_is_missing_last(browser):
    assert [int(n) for n in cells(browser, 0)] == sorted(int(n) for n in cells(browser, 0))
    for column, number in ((7, int), (9, lambda text: float(text.split()[0]))):
        for reverse in (False, True):
            sort_by(browser, column)
            found = cells(browser, column)
            known = [number(text) for text in found if text]
            assert known == sorted(known, reverse=reverse) and len(set(known)) > 2
            assert not any(found[len(known) :])
    sort_by(browser, 1)
    assert cells(browser, 1) == sorted(cells(browser, 1))


def test_rows_are_filtered_and_searched(browser):
    select = pytest.importorskip("selenium.webdriver.support.select").Select
    verdict, search = browser.find_element("id", "verdict"), browser.find_element("id", "search")
    whole = len(cells(browser, 0))
    select(verdict).select_by_visible_text("supported")
    assert set(cells(browser, 4)) == {"supported"} and 0 < len(cells(browser, 0)) < whole
    search.send_keys("boot")
    assert cells(browser, 1) == ["boot"] and browser.find_element("id", "shown").text == f"1 of {whole} rows"
    search.clear()
    search.send_keys("nothing is called so")
    assert cells(browser, 1) == []
    search.clear()
    search.send_keys(" ")  # clear() alone tells the page nothing
    select(verdict).select_by_visible_text("all")
    assert len(cells(browser, 0)) == whole


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, mode):
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 24, 28)") == (mode == "dark")
    assert browser.execute_script(LOWEST_CONTRAST) >= 4.5


def test_a_narrow_window_scrolls_the_table_and_not_the_page(browser):
    browser.set_window_size(500, 900)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) <= 0


def test_the_pictures_of_ranks_are_found(browser):
    widths = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(widths) >= 6 and min(widths) > 0
