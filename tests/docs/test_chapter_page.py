"""The interactive page in a real browser, from files, without a server or a network.

It is in the site: `python -m sphinx -W docs docs/_build/html`, or where FCCONV_SITE is.
"""

import os
import random
import shutil
from pathlib import Path

import chapter_data
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.geometry.convolution import resolve_geometry

selenium = pytest.importorskip("selenium", reason="needs: pip install -e '.[docs]'")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

SITE = Path(
    os.environ.get("FCCONV_SITE")
    or Path(__file__).parents[2] / "docs" / "_build" / "html"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SITE / "chapter.html").exists(), reason=f"no site in {SITE}: build it"
    ),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium and no Chrome here"),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    # Whatever asks for the network gets none.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = shutil.which("chromedriver")
    service = webdriver.ChromeService(driver) if driver else None
    browser = webdriver.Chrome(options, service)  # pyright: ignore
    yield browser
    browser.quit()


@pytest.fixture
def page(browser):
    browser.set_window_size(1280, 1000)
    browser.get("about:blank")
    browser.get((SITE / "chapter.html").as_uri())
    yield browser
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []


def text_of(page):
    return page.find_element(By.ID, "chapter-text").text


def choose(page, rank, key):
    page.execute_script("fcconvChapter.choose(arguments[0], arguments[1])", rank, key)


def test_it_opens_without_a_console_error(browser):
    browser.get((SITE / "chapter.html").as_uri())
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.parametrize("preset", chapter_data.PRESETS, ids=lambda p: p[0])
def test_each_preset_shows_what_explain_prints(page, preset):
    name, rank, size, kernel, stride, padding, dilation, groups = preset
    (button,) = (
        b
        for b in page.find_elements(By.CSS_SELECTOR, "#chapter-presets button")
        if b.text == name
    )
    button.click()
    shape, window = (tuple(map(int, text.split(","))) for text in (size, kernel))
    found = fc.classify(shape, window, stride, padding, 1, dilation, groups)
    assert text_of(page) == fc.explain(found)
    verdict = page.find_element(By.ID, "chapter-verdict")
    assert verdict.get_attribute("data-answer") == (
        "yes" if found.same_parameters else "no"
    )
    assert len(shape) == rank


def test_the_exercises_are_answered(page):
    names = [p[0] for p in chapter_data.PRESETS]
    for words, answer in (
        ("exercise 12-1", "change nothing"),
        ("exercise 12-2", "position (1, 1) of it is the Dense's value"),
        ("both at once", "the Dense's value is lost"),
    ):
        (name,) = (n for n in names if n.startswith(words))
        page.find_element(By.XPATH, f"//button[text()='{name}']").click()
        assert answer in text_of(page)


@pytest.mark.parametrize("rank", [1, 2])
def test_any_geometry_shows_what_explain_prints(page, rank):
    keys = random.Random(3).sample(list(chapter_data.keys(rank)), 200)
    for key in keys:
        choose(page, rank, key)
        shown = page.execute_script("return fcconvChapter.explanation()")
        assert shown == chapter_data.text_of(rank, key), key
    assert text_of(page) == chapter_data.text_of(rank, keys[-1])


@pytest.mark.parametrize("rank", [1, 2])
def test_the_matrix_is_that_of_unroll_conv(page, rank):
    checked = 0
    for key in random.Random(5).sample(list(chapter_data.keys(rank)), 120):
        size, kernel = key[:rank], key[rank : 2 * rank]
        stride, padding, dilation, groups = key[2 * rank :]
        try:
            resolve_geometry(size, kernel, stride, padding, 1, dilation, groups)
        except ValueError:
            continue
        taps = int(np.prod(kernel))
        # One channel a group: entry number tap + taps * group, counted from one.
        entries = 1 + np.arange(taps)[:, None] + taps * np.arange(groups)
        matrix = fc.unroll_conv(
            entries.reshape(*kernel, 1, groups),
            size,
            strides=stride,
            padding=padding,
            kernel_dilation=dilation,
            groups=groups,
        )
        choose(page, rank, key)
        shown = page.execute_script("return fcconvChapter.matrix()")
        np.testing.assert_array_equal(np.array(shown) + 1, matrix)
        checked += 1
    assert checked > 30


def test_it_works_with_the_keyboard(page):
    page.find_element(By.XPATH, "//button[text()='exercise 12-2: padding']").click()
    slider = page.find_element(By.ID, "chapter-padding")
    slider.send_keys(Keys.ARROW_LEFT)
    assert text_of(page) == fc.explain(fc.classify((2, 2), (2, 2)))
    slider.send_keys(Keys.ARROW_RIGHT)
    first = page.find_element(By.CSS_SELECTOR, "#chapter-output button")
    first.send_keys(Keys.ARROW_RIGHT)
    active = page.switch_to.active_element
    assert active.text == "1"
    assert active.get_attribute("aria-pressed") == "true"
    reads = page.find_element(By.ID, "chapter-reads").text
    assert reads == "Output 1 reads input 0, 1 and 2 of the padding."


def test_a_link_opens_the_geometry_it_was_taken_from(page):
    choose(page, 1, (6, 3, 1, 2, 1, 1))
    link = page.current_url
    page.get("about:blank")
    page.get(link)
    assert text_of(page) == fc.explain(fc.classify(6, 3, 1, 2))


def test_a_phone_shows_every_page_without_scrolling_sideways(browser):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    pages = [
        p for p in SITE.rglob("*.html") if not {"_modules", "_static"} & {*p.parts}
    ]
    assert len(pages) > 50
    addresses = [page.as_uri() for page in pages if page.stem != "genindex"]
    addresses.append(f"{(SITE / 'chapter.html').as_uri()}#2d=7,7,3,3,1,3,1,2")
    too_wide = {}
    try:
        for address in addresses:
            browser.get("about:blank")
            browser.get(address)
            width = "return document.documentElement.scrollWidth"
            if (shown := browser.execute_script(width)) > 390:
                too_wide[address] = shown
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert too_wide == {}


@pytest.mark.parametrize("name", ["index", "chapter", "gallery/zoo", "api/index"])
def test_pages_ask_for_no_network_and_log_no_error(browser, name):
    browser.get_log("browser")
    browser.get((SITE / f"{name}.html").as_uri())
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
