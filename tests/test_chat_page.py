"""The chat page in a real browser, in front of a real engine."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import psutil
import pytest
from playwright.sync_api import Locator, Page, Request, expect

from servebook import launch
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import content_of, events_of
from servebook.launch.child import child_server
from servebook.processes import free_port, wait_until
from servebook.ways.metrics import metric

pytestmark = [pytest.mark.browser, pytest.mark.lane("one")]

JAPAN = "What is the capital of Japan?"
STORY = "Tell me a very long story about a fox."
KEY = "only-for-this-test"
HELD_SECONDS = 60
"""Longer than anything here is waited for."""


class HeldEngine:
    """The engine as a gateway sees it; it keeps all but an answer's first words back until `let_go`, or until who
    asked has left. However fast it is, an answer is still coming then."""

    def __init__(self, vllm: launch.Server) -> None:
        self.tap = Tap(vllm.url, self._hold)
        self.gateway = ""
        self._let_go = threading.Event()

    def _hold(self, chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        begun = False
        for event in events_of(chunks) if exchange.path.endswith("/completions") else chunks:
            if begun:
                wait_until(lambda: self._let_go.is_set() or exchange.client_gone(), HELD_SECONDS)
            yield event
            begun = begun or bool(content_of(event))

    def hold(self) -> None:
        """From the next answer on."""
        self._let_go.clear()
        self.tap.exchanges.clear()

    def let_go(self) -> None:
        """This answer and those to come."""
        self._let_go.set()

    def was_left(self) -> bool:
        """Whether the gateway hung up on the engine in the midst of the first answer."""
        answer = next(each for each in self.tap.exchanges if each.path.endswith("/completions"))
        return answer.done.wait(60) and answer.left is not None


@pytest.fixture(scope="module")
def holding(vllm: launch.Server) -> Iterator[HeldEngine]:
    held = HeldEngine(vllm)
    with (
        held.tap,
        child_server("servebook.ways.fastapi_gateway.server", "--upstream", held.tap.url) as held.gateway,
    ):
        yield held


@pytest.fixture
def held(holding: HeldEngine) -> Iterator[HeldEngine]:
    holding.hold()
    yield holding
    holding.let_go()


@pytest.fixture
def chat(page: Page, gateway: launch.Server) -> Iterator[Page]:
    with opened(page, gateway.url):
        yield page


@pytest.fixture
def held_chat(page: Page, held: HeldEngine) -> Iterator[Page]:
    with opened(page, held.gateway):
        yield page


@contextmanager
def opened(page: Page, gateway: str) -> Iterator[None]:
    """The page, open and ready; afterwards nothing was asked of another host, and the console is clean."""
    asked: list[str] = []
    said: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    page.on("request", note)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(gateway)
    yield
    assert all(url.startswith(gateway) for url in asked)
    assert said == []


def ask(page: Page, message: str, longest: int = 200) -> None:
    if not page.get_by_label("Longest answer").is_visible():
        page.get_by_text("Options").click()
    page.get_by_label("Longest answer").fill(str(longest))
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Message", exact=True).fill(message)
    page.keyboard.press("Enter")


def engine_idle(vllm: launch.Server) -> bool:
    return wait_until(lambda: not metric(vllm.url, "vllm:num_requests_running"), 60)


def test_an_answer_streams_in(held_chat: Page, held: HeldEngine) -> None:
    chat = held_chat
    ask(chat, STORY, longest=200)
    answer = chat.get_by_role("article", name="Model")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(answer.locator("p").first).not_to_be_empty()
    assert answer.get_attribute("aria-busy") == "true", "the first words came with the last"
    held.let_go()
    expect(chat.get_by_role("status")).to_have_text("Answer complete.")
    expect(answer).not_to_have_attribute("aria-busy", "true")
    expect(chat.locator("#ttft")).to_have_text(re.compile(r"^\d+ ms$"))
    expect(chat.locator("#rate")).to_have_text(re.compile(r"^\d+\.\d tokens/s$"))
    expect(chat.locator("#tokens")).to_have_text(re.compile(r"^200 out, \d+ in$"))
    expect(answer).to_contain_text("Cut at the longest answer.")


def test_the_conversation_goes_on(chat: Page) -> None:
    ask(chat, JAPAN)
    expect(chat.get_by_role("article", name="Model")).to_contain_text("Tokyo")
    expect(chat.get_by_role("status")).to_have_text("Answer complete.")
    before = int(re.findall(r"(\d+) in", chat.locator("#tokens").inner_text())[0])
    ask(chat, "And of Italy?", longest=5)
    expect(chat.locator("#tokens")).to_have_text(re.compile(r"^\d+ out, \d+ in$"))
    assert int(re.findall(r"(\d+) in", chat.locator("#tokens").inner_text())[0]) > before + 10, "no history was sent"
    chat.get_by_role("button", name="New chat").click()
    expect(chat.get_by_role("article")).to_have_count(0)


def test_a_long_conversation_goes_on_without_its_oldest_messages(page: Page, gateway: launch.Server) -> None:
    """Not in `chat`, whose console stays clean: the gateway's refusals are seen there."""
    page.goto(gateway.url)
    left_out = page.get_by_text("The oldest messages were left out")
    for number in range(1, 5):
        ask(page, f"{STORY} " * 70, longest=4)  # 700 tokens; of three the model's 2,048 are too few
        expect(page.locator("#tokens")).to_have_text(re.compile(r"^\d+ out, \d+ in$"))
        expect(page.get_by_role("status")).to_have_text("Answer complete.")
        expect(page.get_by_role("article", name="Model")).to_have_count(number)
        expect(left_out).to_have_count(max(0, number - 2))
    ask(page, f"{STORY} " * 230, longest=4)  # too long by itself
    expect(page.get_by_role("status")).to_contain_text("shorten the messages")
    ask(page, STORY, longest=4)
    expect(page.get_by_role("status")).to_have_text("Answer complete.")
    assert int(re.findall(r"(\d+) in", page.locator("#tokens").inner_text())[0]) > 1400, "the conversation is lost"


def test_a_wrong_option_is_shown(chat: Page) -> None:
    """In closed options it would keep the form from being sent without a word."""
    options, longest = chat.get_by_text("Options"), chat.get_by_label("Longest answer")
    options.click()
    longest.fill("")
    options.click()
    expect(longest).to_be_hidden()
    chat.get_by_label("Message", exact=True).fill(JAPAN)
    chat.keyboard.press("Enter")
    expect(longest).to_be_focused()
    expect(chat.get_by_role("article")).to_have_count(0)


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_stops_the_engine(held_chat: Page, held: HeldEngine, vllm: launch.Server, how: str) -> None:
    chat = held_chat
    ask(chat, STORY, longest=1500)
    expect(chat.get_by_role("article", name="Model").locator("p").first).not_to_be_empty()
    if how == "button":
        chat.get_by_role("button", name="Stop").click()
    else:
        chat.keyboard.press("Escape")
    expect(chat.get_by_role("article", name="Model")).to_contain_text("Stopped.")
    assert held.was_left()
    assert engine_idle(vllm)
    held.let_go()
    ask(chat, JAPAN)
    expect(chat.get_by_role("status")).to_have_text("Answer complete.")


def test_a_reload_in_mid_stream_stops_the_engine_too(held_chat: Page, held: HeldEngine, vllm: launch.Server) -> None:
    chat = held_chat
    ask(chat, STORY, longest=1500)
    expect(chat.get_by_role("article", name="Model").locator("p").first).not_to_be_empty()
    chat.reload()
    assert held.was_left()
    assert engine_idle(vllm)
    held.let_go()
    expect(chat.get_by_role("article")).to_have_count(0)
    ask(chat, JAPAN)
    expect(chat.get_by_role("article", name="Model")).to_contain_text("Tokyo")


def test_what_people_write_is_text(held_chat: Page) -> None:
    chat = held_chat
    words = "안녕하세요 🦊👩‍👩‍👧 <img src=x onerror=\"document.title='broken'\">\nשלום"
    chat.get_by_label("Message", exact=True).fill(words)
    chat.get_by_role("button", name="Send").click()
    assert chat.get_by_role("article", name="You").inner_text() == words
    assert chat.title() == "Chat · servebook gateway"
    chat.get_by_role("button", name="Stop").click()


def test_the_keyboard_is_enough(held_chat: Page) -> None:
    chat = held_chat
    expect(chat.get_by_label("Message", exact=True)).to_be_focused()
    chat.keyboard.type("One line")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("and another")
    expect(chat.get_by_label("Message", exact=True)).to_have_value("One line\nand another")
    # While an input method composes a syllable, Enter belongs to it.
    chat.get_by_label("Message", exact=True).dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(chat.get_by_role("article")).to_have_count(0)
    chat.keyboard.press("Tab")
    expect(chat.get_by_role("button", name="Send")).to_be_focused()
    chat.keyboard.press("Space")
    expect(chat.get_by_role("article", name="You")).to_have_count(1)
    expect(chat.get_by_label("Message", exact=True)).to_be_focused()
    chat.keyboard.press("Tab")
    expect(chat.get_by_role("button", name="Stop")).to_be_focused()
    chat.keyboard.press("Space")
    expect(chat.get_by_role("article", name="Model")).to_contain_text("Stopped.")


def test_what_a_screen_reader_finds(chat: Page) -> None:
    expect(chat.get_by_role("log", name="Conversation")).to_be_visible()
    expect(chat.get_by_role("heading", name="Chat")).to_be_visible()
    expect(chat.get_by_role("status")).to_have_count(1)
    for field in chat.locator("input, textarea, button").all():
        name = field.evaluate("field => field.labels?.[0]?.textContent.trim() || field.textContent.trim()")
        assert name, field.evaluate("field => field.outerHTML")


def test_it_fits_a_phone(chat: Page) -> None:
    """Asked where there is least room; then turned, moved to a screen, and darkened."""
    send = chat.get_by_role("button", name="Send")
    chat.set_viewport_size({"width": 320, "height": 640})
    ask(chat, "x" * 200, longest=3)
    expect(chat.get_by_role("status")).to_have_text("Answer complete.")
    for width, dark in product((320, 375, 1280), (False, True)):
        chat.set_viewport_size({"width": width, "height": 640})
        chat.emulate_media(color_scheme="dark" if dark else "light")
        assert chat.evaluate("document.documentElement.scrollWidth") <= width
        box = send.bounding_box()
        assert box
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 640
        assert contrast(chat.locator("body")) >= 7, (width, dark)
        assert contrast(send) >= 4.5, (width, dark)


def contrast(element: Locator) -> float:
    """The contrast of an element's text by WCAG 2.2's formula, from 1 to 21; AA asks for 4.5, AAA for 7."""
    colours = element.evaluate("e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_no_engine_is_said_and_the_message_kept(page: Page) -> None:
    with child_server("servebook.ways.fastapi_gateway.server", "--upstream", f"http://127.0.0.1:{free_port()}") as url:
        page.goto(url)
        ask(page, JAPAN)
        expect(page.get_by_role("status")).to_have_text("The engine cannot be reached.")
        expect(page.get_by_label("Message", exact=True)).to_have_value(JAPAN)


def test_a_key_is_asked_for(page: Page, vllm: launch.Server) -> None:
    with child_server("servebook.ways.fastapi_gateway.server", "--upstream", vllm.url, SERVEBOOK_API_KEY=KEY) as url:
        page.goto(url)
        ask(page, JAPAN)
        expect(page.get_by_label("Key")).to_be_focused()
        page.get_by_label("Key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_role("article", name="Model").last).to_contain_text("Tokyo")


def test_a_gateway_that_dies_in_mid_stream(page: Page, held: HeldEngine, vllm: launch.Server) -> None:
    port = free_port()
    with child_server("servebook.ways.fastapi_gateway.server", "--upstream", held.tap.url, port=port) as url:
        page.goto(url)
        ask(page, STORY, longest=1500)
        expect(page.get_by_role("article", name="Model").locator("p").first).not_to_be_empty()
        next(child for child in psutil.Process().children() if str(port) in child.cmdline()).kill()
        expect(page.get_by_role("status")).to_have_text("The gateway cannot be reached.")
        expect(page.get_by_role("article", name="Model").locator("p").first).not_to_be_empty()
    assert engine_idle(vllm)
