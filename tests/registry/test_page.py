"""The page in a real Chromium: every view, light and dark, wide and narrow, by mouse and by keyboard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from registry import Registry
from registry.server import Links
from tests.registry.browser import chromium, need_chromium
from tests.registry.exhibit import HOSTILE, STREAM, Exhibitor, exhibit
from tests.registry.serving import served

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PICTURES = Path(__file__).parents[2] / "docs" / "images"
VIEWS = {
    "tasks": "",
    "atlas": "#/atlas?stream=support",
    "overlaps": "#/overlaps?stream=support",
    "task": "#/task/ticket-urgency@1",
    "api": "api/docs",
}
WIDE, NARROW = {"width": 1200, "height": 800}, {"width": 375, "height": 740}
LINKS = Links(mlflow="http://127.0.0.1:5000", prefect="http://127.0.0.1:4200")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that shows the exhibit."""
    need_chromium()
    registry = Registry.open(tmp_path_factory.mktemp("exhibit"))
    exhibit(registry)
    with served(registry, links=LINKS) as url:
        yield url
    registry.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


class Visit:
    """A page that is visited, and what went wrong on it."""

    def __init__(self, browser: Browser, site: str, scheme: str = "light", size: dict[str, int] = WIDE):
        self._site = site
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def to(self, address: str) -> Page:
        """Go there, and wait until all of it is shown."""
        self.page.goto("about:blank")
        self.page.goto(f"{self._site}/{address}")
        self.settle()
        return self.page

    def settle(self) -> None:
        self.page.locator("main h1, main .problem").first.wait_for()
        self.page.locator("[aria-busy]").first.wait_for(state="detached")


@pytest.fixture
def visit(browser: Browser, site: str) -> Iterator[Visit]:
    """A wide, light page; what goes wrong on it fails the test."""
    found = Visit(browser, site)
    yield found
    found.context.close()
    assert found.wrong == []


def texts(found: Locator) -> list[str]:
    return [each.strip() for each in found.all_inner_texts()]


# Every view, as anyone may see it


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_shown(browser, site, scheme, size):
    visit = Visit(browser, site, scheme, size)
    backgrounds = set()
    for name, address in VIEWS.items():
        page = visit.to(address)
        assert page.locator("h1").count() == 1
        assert page.locator(".problem").count() == 0
        page_width = page.evaluate("document.documentElement.scrollWidth")
        assert page_width <= size["width"], f"{name} is {page_width} wide"
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        _keep_picture(page, name, scheme, size)
    visit.context.close()
    assert visit.wrong == []
    assert all(url.startswith((site, "about:")) for url in visit.asked)
    # oklch(LIGHTNESS ...): one theme for all views, and the one that was asked for.
    [background] = backgrounds
    lightness = float(background.removeprefix("oklch(").split()[0])
    assert lightness > 0.9 if scheme == "light" else lightness < 0.3


def _keep_picture(page: Page, name: str, scheme: str, size: dict[str, int]) -> None:
    """The pictures of the guide: each view once, so that both themes and both widths are seen."""
    wanted = {("tasks", "light", 1200), ("atlas", "light", 1200), ("overlaps", "dark", 1200), ("task", "dark", 1200)}
    wanted |= {("atlas", "dark", 375)}
    if os.environ.get("NEFT_WRITE_PICTURES") and (name, scheme, size["width"]) in wanted:
        kind = "" if size is WIDE else "-phone"
        page.mouse.move(0, 0)
        page.screenshot(path=PICTURES / f"registry-{name}{kind}.png", full_page=size is NARROW)


# Tasks and search


def test_search_finds_as_one_types(visit):
    page = visit.to("")
    rows = page.locator("tbody tr")
    status = page.get_by_role("status")
    assert rows.count() == 7 and status.inner_text() == "7 tasks"
    assert page.evaluate("document.activeElement.id") == "search"
    for typed, found in {
        "senti": ["film-sentiment", "tweet-sentiment"],  # a task
        "TUNED": ["ticket-urgency"],  # a stream
        "challenger": ["film-sentiment"],  # an alias
        "mail team": ["spam"],  # a tag
        "nothing like it": [],
    }.items():
        page.get_by_role("searchbox").fill("")
        page.get_by_role("searchbox").press_sequentially(typed)
        expect(page.locator("tbody th")).to_have_text(found)
        expect(status).to_have_text(f"{len(found)} of 7 tasks")
    assert page.get_by_text("Nothing is called that.").is_visible()


def test_a_filter_is_taken_as_one(browser, site):
    visit = Visit(browser, site)
    page = visit.to("")
    page.get_by_role("searchbox").press_sequentially("version > 1 AND stream LIKE 'support%'")
    page.get_by_role("status").get_by_text("1 entry").wait_for()
    assert texts(page.locator("tbody th")) == ["ticket-urgency@2"]

    page.get_by_role("searchbox").fill("versio > 1")
    said = page.get_by_role("alert")
    said.wait_for()
    lines = said.inner_text().splitlines()
    assert "did you mean 'version'?" in lines[0]
    assert lines[1].index("versio") == lines[2].index("^")

    # The address keeps the search, so that it can be handed on.
    page.get_by_role("searchbox").fill("alias = 'champion'")
    page.get_by_role("status").get_by_text("2 entries").wait_for()
    page.reload()
    page.get_by_role("status").get_by_text("2 entries").wait_for()
    visit.context.close()
    assert all("422" in each for each in visit.wrong)  # the filter that was wrong, which the browser notes


def test_a_task_leads_to_its_page(visit):
    page = visit.to("")
    page.get_by_role("link", name="bbc-topic").click()
    page.get_by_role("heading", name="bbc-topic@1", level=1).wait_for()
    visit.settle()
    assert page.title() == "bbc-topic@1 - neft registry"
    page.go_back()
    page.get_by_role("heading", name="Tasks", level=1).wait_for()


# The atlas


def test_the_atlas_shows_each_site_and_who_owns_it(visit):
    page = visit.to("#/atlas?stream=support")
    assert page.get_by_role("row").count() == 13  # 12 layers and the head
    cells = page.get_by_role("gridcell")
    assert cells.count() == 24
    assert texts(page.locator(".legend a")) == [f"{task}@1" for task in STREAM]
    # A bar is as wide as its neurons, and its parts as those of each task.
    cell = cells.nth(9)
    parts = {int(each.get_attribute("data-place")): each for each in cell.locator("[data-place]").all()}
    said = cell.get_attribute("aria-label")
    widths = {place: each.bounding_box()["width"] for place, each in parts.items()}
    whole = cell.locator(".bar").bounding_box()["width"]
    size = int(said.split(" of ")[1].split()[0])
    assert len(parts) >= 3
    for place, width in widths.items():
        owned = int(said.split(f"{STREAM[place]}@1 ")[1].split(",")[0].split(";")[0])
        assert width / whole == pytest.approx(owned / size, abs=0.04)
    looks = [
        each.evaluate("e => [getComputedStyle(e).backgroundColor, e.innerText.trim()].join()")
        for each in parts.values()
    ]
    assert len(set(looks)) == len(looks)


def test_a_site_tells_its_neurons_to_the_mouse_and_to_the_keyboard(visit):
    page = visit.to("#/atlas?stream=support")
    tip = page.locator(".tip")
    assert not tip.is_visible()
    page.get_by_role("gridcell").nth(3).hover()
    assert "model.layers.1." in tip.inner_text() and "free" in tip.inner_text()
    page.mouse.move(0, 0)
    assert not tip.is_visible()

    page.locator(".legend a").last.focus()
    page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("layer 2, ")
    assert "model.layers.2." in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= WIDE["width"]


def test_another_stream_is_chosen(visit):
    page = visit.to("#/atlas?stream=support")
    page.get_by_label("Stream").select_option("reviews")
    page.locator(".legend a", has_text="product-reviews@1").wait_for()
    assert texts(page.locator(".legend a")) == ["product-reviews@1", "film-sentiment@2"]


# Overlaps


def test_the_overlaps_show_what_two_tasks_share(visit):
    page = visit.to("#/overlaps?stream=support")
    cells = page.locator(".heat button")
    assert cells.count() == 30 and page.locator(".heat .own").count() == 6
    cell = page.get_by_role("button", name="film-sentiment@1 and bbc-topic@1")
    iou, shared = texts(cell.locator("b, small"))
    said, exactly = cell.get_attribute("title").split(", IoU ")
    assert said == f"film-sentiment@1 and bbc-topic@1 share {shared} neurons" and iou == f"{float(exactly):.2f}"
    cell.focus()
    page.keyboard.press("Enter")
    detail = page.locator(".detail table")
    detail.wait_for()
    assert sum(int(each) for each in texts(detail.locator("td.number"))) == int(shared)


# A task


def test_a_task_shows_all_that_is_known_of_it(visit):
    page = visit.to("#/task/film-sentiment@1")
    assert texts(page.locator(".title .pill")) == ["champion", "stage=production"]
    sections = {each.locator("h2").inner_text(): each for each in page.locator("section").all()}
    assert list(sections) == [
        *("R curve", "Versions", "Capacity", "Lineage"),
        *("Most important neurons", "Nearest entries", "Metrics", "How it was learnt"),
    ]
    assert texts(sections["Versions"].locator("tbody th")) == ["@2", "@1"]
    assert sections["R curve"].locator("circle").count() == 7
    assert "after film-sentiment" in sections["R curve"].locator("svg").get_attribute("aria-label")
    assert texts(sections["Lineage"].locator("[aria-current]")) == ["film-sentiment@1"]
    assert {f"{task}@1" for task in STREAM} | {"product-reviews@1", "ticket-urgency@2"} <= set(
        texts(sections["Lineage"].locator("a"))
    )
    assert sections["Most important neurons"].locator("tbody tr").count() == 12
    assert sections["Nearest entries"].locator("tbody tr").count() == 8
    assert page.locator(".facts a", has_text="0000").first.get_attribute("href") == (
        f"http://127.0.0.1:5000/#/experiments/7/runs/{1:032x}"
    )
    assert (
        page.locator(".facts a", has_text="4000-8000")
        .get_attribute("href")
        .startswith("http://127.0.0.1:4200/runs/flow-run/")
    )


def test_what_cannot_be_shown_is_said(browser, site):
    visit = Visit(browser, site)
    page = visit.to("#/task/nope@1")
    assert "no task 'nope'" in page.get_by_role("alert").inner_text()
    page = visit.to("#/nonsense")
    assert "there is no view nonsense" in page.get_by_role("alert").inner_text()
    visit.context.close()
    assert all("404" in each for each in visit.wrong)


def test_a_name_that_is_markup_stays_a_name(browser, folder):
    registry = Registry.open(folder)
    Exhibitor(registry, HOSTILE, layers=2).learn([HOSTILE])
    registry.set_tag(f"{HOSTILE}@1", HOSTILE, HOSTILE)
    with served(registry) as url:
        visit = Visit(browser, url)
        for address in ("", f"#/task/{HOSTILE}@1", f"#/atlas?stream={HOSTILE}", f"#/overlaps?stream={HOSTILE}"):
            page = visit.to(address)
            assert page.get_by_text(HOSTILE).count() > 0
            assert page.locator("img").count() == 0
            assert page.title() != "owned"
        visit.context.close()
        assert visit.wrong == []
    registry.close()


# By keyboard alone, and with nothing recorded


def test_the_keyboard_alone_is_enough(visit):
    page = visit.to("#/atlas")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.url.endswith("#/atlas")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("spam")
    expect(page.get_by_role("status")).to_have_text("1 of 7 tasks")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="spam@1", level=1).wait_for()


def test_an_empty_registry_says_what_to_do(browser, folder):
    with served(Registry.open(folder)) as url:
        visit = Visit(browser, url)
        assert visit.to("").get_by_text("Nothing has been recorded yet").is_visible()
        for address in ("#/atlas", "#/overlaps"):
            assert visit.to(address).get_by_text("Nothing has been recorded yet").is_visible()
        visit.context.close()
        assert visit.wrong == []


def test_eighty_layers_are_one_calm_table(browser, tmp_path):
    registry = Registry.open(tmp_path / "registry")
    Exhibitor(registry, "deep", layers=80).record("film-sentiment")
    with served(registry) as url:
        for size in (WIDE, NARROW):
            visit = Visit(browser, url, size=size)
            page = visit.to("#/atlas?stream=deep")
            assert page.get_by_role("row").count() == 81
            assert page.get_by_role("grid").bounding_box()["height"] < 1600
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            visit.context.close()
            assert visit.wrong == []
    registry.close()
