"""The report in headless Chromium, as a person uses it: by mouse, by keyboard, and without a script."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspa.audit.report import write_report

from .test_report import make_audit

webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver (Debian's chromium-driver)", allow_module_level=True)


def open_browser(**preferences: int) -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,1000")
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write_report(make_audit(12), folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    browser = open_browser()
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    browser.get("about:blank")
    browser.get(url)
    yield browser
    # Nothing was refused by the page's own policy, loaded, or raised; and no text of the audit ran.
    assert browser.get_log("browser") == []


def all_of(browser: Any, selector: str) -> list[Any]:
    found: list[Any] = browser.find_elements(By.CSS_SELECTOR, selector)
    return found


def latents(browser: Any) -> list[int]:
    """The latents that the table shows, in its order."""
    rows = all_of(browser, "#latents tbody tr")
    return [int(row.find_element(By.TAG_NAME, "a").text) for row in rows if row.is_displayed()]


def column(browser: Any, name: str) -> Any:
    return next(button for button in all_of(browser, "#latents th button") if button.text.startswith(name))


def press(browser: Any, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def test_columns_sort(page: Any) -> None:
    """By numbers and not by their text; a second click turns the order, and what is missing stays last."""
    audit = make_audit(12)
    assert latents(page) == list(range(12))
    column(page, "latent").click()
    assert latents(page) == list(range(11, -1, -1))
    column(page, "group").click()
    assert latents(page) == [9, 5, 1, 8, 4, 0, 10, 6, 2, 11, 7, 3]
    sums = {record.latent: record.column_sum for record in audit.latents}
    column(page, "column sum").click()
    known = sorted((j for j in sums if sums[j] is not None), key=lambda j: -(sums[j] or 0.0))
    missing = [j for j in sums if sums[j] is None]
    assert latents(page)[: len(known)] == known and sorted(latents(page)[len(known) :]) == missing
    column(page, "column sum").click()
    assert latents(page)[: len(known)] == known[::-1] and sorted(latents(page)[len(known) :]) == missing
    headers = [header.get_attribute("aria-sort") for header in all_of(page, "#latents th")]
    assert [sort for sort in headers if sort] == ["ascending"]


def test_search_and_group_filter(page: Any) -> None:
    search = page.find_element(By.ID, "search")
    press(page, "/")
    assert page.switch_to.active_element == search
    search.send_keys("TOKEN7 edited")
    assert latents(page) == [7] and page.find_element(By.ID, "shown").text == "1 of 12 latents"
    search.clear()
    search.send_keys("no such latent")
    assert latents(page) == []
    search.clear()
    search.send_keys(" ")
    page.find_element(By.CSS_SELECTOR, "#group option:nth-child(3)").click()
    assert latents(page) == [1, 5, 9]


def test_a_latent_has_a_page(page: Any) -> None:
    all_of(page, "#latents tbody a")[4].click()
    (shown,) = [article for article in all_of(page, "article") if article.is_displayed()]
    assert shown.find_element(By.TAG_NAME, "h1").text == "Latent 4"
    assert not page.find_element(By.ID, "search").is_displayed()
    assert "<script>alert(1)</script>" in shown.text and "strong4" in shown.text
    # The arrows go through the table's order, and Escape back to the row.
    press(page, Keys.ARROW_RIGHT)
    press(page, Keys.ARROW_RIGHT)
    press(page, Keys.ARROW_LEFT)
    (shown,) = [article for article in all_of(page, "article") if article.is_displayed()]
    assert shown.find_element(By.TAG_NAME, "h1").text == "Latent 5"
    assert page.switch_to.active_element == shown.find_element(By.TAG_NAME, "h1")
    press(page, Keys.ESCAPE)
    assert page.find_element(By.ID, "search").is_displayed() and page.switch_to.active_element.text == "5"


def test_an_edited_token_names_its_latents(page: Any) -> None:
    (token,) = all_of(page, ".edit")
    tip = token.find_element(By.CSS_SELECTOR, ".tip")
    assert not tip.is_displayed()
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    webdriver.ActionChains(page).move_to_element(token).perform()
    assert tip.is_displayed() and "▼ 0 2 → 1" in tip.text and "▲ 77 1 → 1.5" in tip.text
    webdriver.ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    page.execute_script("arguments[0].focus()", token)
    assert tip.is_displayed()


def test_what_a_token_names_stays_on_the_page(page: Any) -> None:
    """Wherever in its line the token stands."""
    (token,) = all_of(page, ".edit")
    tip = token.find_element(By.CSS_SELECTOR, ".tip")
    width, places = page.execute_script("return document.documentElement.clientWidth"), set()
    for _ in range(20):
        page.execute_script("arguments[0].before('word '); arguments[0].focus()", token)
        places.add(token.rect["x"])
        assert tip.rect["x"] >= 0 and tip.rect["x"] + tip.rect["width"] <= width
        assert tip.rect["y"] > token.rect["y"]
    assert len(places) > 5


def test_no_text_of_the_audit_runs(page: Any, tmp_path: Path) -> None:
    assert page.title == f"Audit of {make_audit().title}"
    # An alert would be open, and refuse this.
    assert page.save_screenshot(str(tmp_path / "report.png")) and (tmp_path / "report.png").stat().st_size > 10_000
    loaded = page.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0


def test_pages_work_without_a_script(url: str) -> None:
    browser = open_browser(**{"profile.managed_default_content_settings.javascript": 2})
    try:
        browser.get(url)
        assert len(latents(browser)) == 12
        all_of(browser, "#latents tbody a")[2].click()
        assert [one.get_attribute("id") for one in all_of(browser, "article") if one.is_displayed()] == ["latent-2"]
        assert not browser.find_element(By.ID, "summary").is_displayed()
    finally:
        browser.quit()
