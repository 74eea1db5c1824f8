"""The web demo in a real browser: a visitor asks, and reads the answer as it is made."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from internlm_trainer.chat.messages import INTERPRETER
from internlm_trainer.commands import demo_page
from internlm_trainer.commands.demo_page import Block
from ports import free_port
from trainer.chat.conftest import command
from trainer.chat.trained import COUNT, I_AM, NUMBERS, RESULT, SUM, WHO

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MS = 120_000  # on a busy machine
# Remembers all that was to be read in the newest message.
WATCH = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        const all = document.querySelectorAll('[data-testid=stChatMessage]');
        if (all.length) window.seen.add(all[all.length - 1].innerText.trim());
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
WIDTH = "document.querySelector('.stMain').scrollWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=program, args=["--no-sandbox", "--disable-gpu"]
            )
        except Error as error:
            pytest.skip(
                f"no Chromium: neither {', '.join(BROWSERS)} nor Playwright's own: {error.message[:200]}"
            )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser: Browser, trained: str) -> Iterator[str]:  # noqa: ARG001 - not without a browser
    with command(
        r"URL: (http://\S+)", "demo", trained, "--tools", "calculator", "--port", str(free_port())
    ) as (_, url):
        yield url


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(MS)
    page.goto(address, timeout=MS)
    page.get_by_placeholder("Ask something").wait_for()
    yield page
    page.close()


def ask(page: Page, question: str) -> None:
    box = page.get_by_placeholder("Ask something")
    box.fill(question)
    box.press("Enter")


def keep(page: Page, name: str) -> None:
    """A picture of the page, where INTERNLM_SCREENSHOTS is a folder for it."""
    if folder := os.environ.get("INTERNLM_SCREENSHOTS"):
        page.wait_for_timeout(1000)  # until nothing moves
        page.screenshot(path=Path(folder) / f"{name}.png")


def messages(page: Page, *texts: str) -> None:
    """The messages are these, and the answer has ended."""
    shown = page.get_by_test_id("stChatMessage")
    expect(shown).to_have_text([re.compile(re.escape(one)) for one in texts], timeout=MS)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible(timeout=MS)


def test_an_answer_is_streamed_made_again_and_forgotten(page: Page) -> None:
    page.evaluate(WATCH)
    ask(page, COUNT)
    messages(page, COUNT, NUMBERS)
    seen = [one.rsplit("\n", 1)[-1] for one in page.evaluate("[...window.seen]")]  # below the picture's name
    parts = [one for one in seen if one.endswith("\u258c") and NUMBERS.startswith(one[:-1].rstrip() or "?")]
    assert len(parts) > 1, seen
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(0, timeout=MS)
    ask(page, WHO)
    messages(page, WHO, I_AM)
    page.get_by_role("button", name="Regenerate").click()
    messages(page, WHO, I_AM)


@pytest.mark.parametrize(("device", "width", "height"), [("phone", 390, 844), ("desktop", 1280, 800)])
def test_a_call_of_a_tool_and_the_settings_are_whole_on_a_phone_too(
    page: Page, device: str, width: int, height: int
) -> None:
    page.set_viewport_size({"width": width, "height": height})
    keep(page, f"{device}-begin")
    ask(page, SUM)
    messages(page, SUM, RESULT)
    call = page.get_by_test_id("stExpander")
    expect(call).to_contain_text("calculator \u2192 144")
    keep(page, f"{device}-answer")
    call.locator("summary").click()
    expect(call).to_contain_text('{"expression": "12 * 12"}', timeout=MS)
    keep(page, f"{device}-call")
    assert page.evaluate(WIDTH) <= width
    if device == "phone":
        page.get_by_test_id("stExpandSidebarButton").click()
    expect(page.get_by_placeholder("What the model is told first")).to_be_in_viewport(ratio=1, timeout=MS)
    expect(page.get_by_role("button", name="Reset")).to_be_in_viewport(ratio=1, timeout=MS)
    keep(page, f"{device}-settings")


def test_a_wide_table_scrolls_by_itself_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, "| " + "abcdefghijkl | " * 5 + "\n|" + "-|" * 5)
    table = page.get_by_test_id("stChatMessage").first.locator("table")
    expect(table).to_be_visible(timeout=MS)
    assert table.evaluate("one => one.scrollWidth > one.clientWidth")
    assert page.evaluate(WIDTH) <= 390


@pytest.mark.parametrize(
    ("call", "label", "shown"),
    [
        (Block("call", '{"x": 1}', "f"), "f \u2026", ('{"x": 1}', "json")),
        (Block("call", "{}", "f", "*a*\n$1$"), "f \u2192 \\*a\\* \\$1\\$", ("{}", "json")),
        (Block("call", "{}", "f", "a" * 61), f"f \u2192 {'a' * 45}\u2026", ("{}", "json")),
        (Block("call", '{"code": "1\\n2"}', INTERPRETER), "python\\_interpreter \u2026", ("1\n2", "python")),
        (Block("call", "1", INTERPRETER), "python\\_interpreter \u2026", ("1", "json")),
    ],
)
def test_a_call_is_a_line_of_plain_text_and_code_is_shown_as_code(
    call: Block, label: str, shown: tuple[str, str]
) -> None:
    assert demo_page.label(call) == label
    assert demo_page.called_with(call) == shown


def test_a_question_that_does_not_fit_is_told(page: Page) -> None:
    ask(page, "word " * 600)
    expect(page.get_by_role("alert")).to_contain_text("tokens, and the model reads 512", timeout=MS)
    ask(page, WHO)
    expect(page.get_by_test_id("stChatMessage").last).to_contain_text(I_AM, timeout=MS)


def test_a_model_that_has_gone_meanwhile_is_told_in_the_page(
    browser: Browser, trained: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(Path(trained).parent, tmp_path / "small")
    with command(r"URL: (http://\S+)", "demo", str(copy), "--port", str(free_port())) as (_, url):
        shutil.rmtree(copy)
        page = browser.new_page()
        page.goto(url, timeout=MS)
        expect(page.get_by_role("alert")).to_contain_text("The model does not open: SOURCE:", timeout=MS)
        expect(page.get_by_test_id("stException")).to_have_count(0)
        page.close()
