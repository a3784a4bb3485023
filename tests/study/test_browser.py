"""The report in a real headless Chromium: it searches, filters, turns dark, fits a phone, and asks the network for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise.study.report import build_report

from .synthetic import build_study
from .synthetic_credit import add_credit

pytestmark = pytest.mark.browser
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a made-up study of 300 prompts and ten arms."""
    return build_report(add_credit(build_study(tmp_path_factory.mktemp("study") / "starter", prompts_per_axis=100, extra_arms=2), 2))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium found: install Debian's package `chromium` to test the report in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """Opens the report; whatever the console says or the page requests beyond its own file fails the test."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, height: int = 800, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: request.url in (report.as_uri(), "data:,") or complaints.append(f"request: {request.url}"))
        page.goto(report.as_uri())
        return page

    yield open_page
    pwned = [page.evaluate("window.pwned") for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert complaints == []
    assert pwned == [None] * len(pwned)


def count(page: Any) -> int:
    """How many prompts the page says match."""
    return int(page.locator("#count").inner_text().split(" of ")[0])


def test_searches_prompts_and_replies(opened: Any) -> None:
    from playwright.sync_api import expect

    page = opened()
    assert count(page) == 300
    assert page.locator(".prompt-card").count() == 8
    page.fill("#search", "sourdough")
    expect(page.locator("#count")).to_contain_text("34 of 300")
    assert page.locator(".prompt-card mark").first.inner_text() == "sourdough"
    page.fill("#search", "<script>window")
    expect(page.locator("#count")).to_have_text("6 of 300 prompts")
    assert "<script>window.pwned = 1</script>" in page.locator("#reply-list").inner_text()
    page.fill("#search", "no such words anywhere")
    expect(page.locator("#count")).to_have_text("0 of 300 prompts")


def test_filters_by_axis_arm_validity_and_disagreement(opened: Any) -> None:
    page = opened()
    page.select_option("#axis", "benign")
    assert count(page) == 100
    assert set(page.locator(".prompt-card h3 b").all_inner_texts()) == {"benign"}
    page.select_option("#axis", "")
    page.locator("label:has(#invalid)").click()
    assert count(page) == 3  # the looping reply, once in each axis
    page.locator("#arm-chips .chip", has_text="empty").click()
    assert count(page) == 300
    page.locator("#arm-chips .chip", has_text="empty").click()
    page.locator("label:has(#invalid)").click()
    page.locator("label:has(#disagree)").click()
    differing = count(page)
    assert 0 < differing < 300
    for name in ("base", "sft", "dpo", "variant_0", "variant_1"):
        page.locator("#arm-chips .chip").filter(has=page.get_by_text(name, exact=True)).click()
    assert count(page) == 0  # a single arm cannot disagree with itself
    assert page.locator("#reply-list").inner_text() == ""


def test_orders_by_gap_pages_and_unfolds(opened: Any) -> None:
    page = opened()
    page.select_option("#order", "gap")
    rewards = [
        [float(word.replace("−", "-")) for word in card.locator("data").all_inner_texts() if word != "no reward"]
        for card in page.locator(".prompt-card").all()
    ]
    gaps = [max(row) - min(row) for row in rewards]
    assert gaps == sorted(gaps, reverse=True)
    page.select_option("#order", "given")
    page.locator(".more").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".more").first.get_attribute("aria-expanded") == "true"
    assert "the whole reply has 45,000 characters" in page.locator("#reply-list").inner_text()
    assert page.locator("[data-step='-1']").first.is_disabled()
    page.locator("[data-step='1']").first.click()
    assert "showing 9 to 16" in page.locator("#count").inner_text()


def test_turns_dark_by_the_system_and_by_the_button_and_remembers(opened: Any) -> None:
    def paper(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = opened(scheme="light")
    dark = opened(scheme="dark")
    assert paper(light) == "rgb(255, 255, 255)"
    assert paper(dark) == "rgb(21, 23, 26)"
    light.click("#theme")
    assert paper(light) == paper(dark)
    line = light.locator("#figure-helpful_vs_harmless .wide .whisker.s1").first
    assert line.evaluate("node => getComputedStyle(node).stroke") == "rgb(92, 179, 234)"
    light.reload()
    assert paper(light) == paper(dark)


def test_token_credit_tells_its_numbers_on_hover_and_by_keyboard(opened: Any) -> None:
    from playwright.sync_api import expect

    page = opened()
    reply, tip = page.locator("#credit .pieces").first, page.locator("#credit-tip")
    piece = reply.locator(".c").nth(2)
    expect(tip).to_be_hidden()
    piece.hover()
    expect(tip).to_be_visible()
    told = dict(line.split("\t") for line in piece.get_attribute("data-told").split("\n"))
    assert tip.locator("q").inner_text() == piece.inner_text()
    assert tip.locator("dd").all_inner_texts()[:3] == [told["credit"], told["trained"], told["reference"]]
    page.mouse.move(2, 2)
    expect(tip).to_be_hidden()
    # One stop of the Tab key a reply; arrows go on inside it.
    first = reply.locator(".c").first
    first.focus()
    expect(tip).to_be_visible()
    assert first.get_attribute("aria-describedby") == tip.get_attribute("id")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert tip.locator("q").inner_text() == piece.inner_text()
    assert reply.locator(".c[tabindex='0']").count() == 1
    page.keyboard.press("End")
    assert tip.locator("q").inner_text() == "</s>"
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.pieces') !== document.querySelector('.pieces')")
    # Blame is told apart without colour, and the numbers stay on the screen.
    line = "node => getComputedStyle(node).textDecorationLine"
    assert page.locator("#credit .pieces .n2").first.evaluate(line) == "underline"
    assert page.locator("#credit .pieces .p2").first.evaluate(line) == "none"
    phone = opened(width=320, height=640)
    for edge in (phone.locator("#credit .pieces .c").nth(number) for number in range(6)):
        edge.hover()
        box = phone.locator("#credit-tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 320
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 640


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(opened: Any, width: int) -> None:
    page = opened(width=width, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for summary in page.locator("details > summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width < 768:
        table = page.locator(".scroller").first
        assert table.evaluate("node => node.scrollWidth > node.clientWidth")
    visible = page.locator("#figure-threshold_sweep .narrow" if width < 768 else "#figure-threshold_sweep .wide")
    assert visible.is_visible()


def test_text_stands_out_from_its_ground(opened: Any) -> None:
    """WCAG 2.1 contrast, 4.5:1, of every piece of text, in figures too, against what is painted behind it, light and dark."""
    script = """() => {
      const parse = (text) => text.match(/[\\d.]+/g).map(Number);
      const linear = (value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
      const hidden = (node) => !node.checkVisibility() || node.closest("title, desc, option") || node.disabled;
      const poor = new Set();
      const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || hidden(node)) continue;
        let ground = node, colour = [0, 0, 0, 0];
        while (ground && colour[3] === 0) {
          colour = parse(getComputedStyle(ground).backgroundColor);
          ground = ground.parentElement;
        }
        const style = getComputedStyle(node);
        const one = light(parse(node.closest("svg") ? style.fill : style.color)), two = light(colour);
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        if (ratio < 4.5) poor.add(`${node.tagName}.${node.getAttribute("class")}: ${ratio.toFixed(2)}`);
      }
      return [...poor];
    }"""
    assert opened(scheme="light").evaluate(script) == []
    assert opened(scheme="dark").evaluate(script) == []


def test_everything_is_named_and_within_reach_of_the_keyboard(opened: Any) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, svg[role=img], .scroller, table")].filter((node) => {
          const title = node.querySelector(":scope > title, :scope > caption");
          return !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels && node.labels.length || title);
        }).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    assert page.evaluate("[...document.querySelectorAll('.scroller')].every((node) => node.tabIndex === 0)")


def test_takes_screenshots(opened: Any, tmp_path: Path) -> None:
    for name, width, height, scheme in (("laptop", 1280, 800, "light"), ("phone", 390, 844, "dark")):
        page = opened(width=width, height=height, scheme=scheme)
        path = tmp_path / f"{name}-{scheme}.png"
        page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 50_000
