"""The page at `/`, in a real browser: headless Chromium, driven by playwright. Skipped where one of them is missing."""

import asyncio
import functools
import inspect
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.rpc.sluice.v1 import scheduling_pb2
from tests.builders.router import run
from tests.builders.saying import saying
from tests.builders.tool_text import QWEN3

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

pytestmark = pytest.mark.cluster

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DONE = ".is-answer:not(.is-open)"


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    """The test, given the page of a cluster that is ready. Whatever the page writes to its console fails it.

    In a thread of its own: playwright keeps an event loop running in the one that it is used in.
    """

    def run(cluster: Any, **others: Any) -> None:
        if CHROMIUM is None:
            pytest.skip("no chromium here")
        url = f"http://{cluster().http('router')}/"
        with ThreadPoolExecutor(1) as thread:
            thread.submit(visit, url, lambda page: test(page, **others)).result()

    own = [parameter for name, parameter in inspect.signature(test).parameters.items() if name != "page"]
    functools.update_wrapper(run, test)
    asks = [inspect.Parameter("cluster", inspect.Parameter.KEYWORD_ONLY)]
    run.__signature__ = inspect.Signature(asks + [parameter.replace(kind=asks[0].kind) for parameter in own])
    return run


def visit(url: str, scenario: Callable[[Any], None]) -> None:
    with playwright.sync_playwright() as started:
        # The tests' user may be root, for whom Chromium has no sandbox; the page is our own.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        page.wait_for_function("() => document.getElementById('state').textContent.startsWith('ready')")
        scenario(page)
        browser.close()
    assert [line for line in said if "400 (Bad Request)" not in line] == []


def ask(page: Any, text: str) -> Any:
    """Types it as a person would, sends it, and waits for the answer's end."""
    number = page.locator(".is-answer").count()
    page.keyboard.type(text)  # the prompt has the focus, from the beginning and after each answer
    page.keyboard.press("Enter")
    page.locator(DONE).nth(number).wait_for(timeout=60_000)
    return page.locator(DONE).nth(number)


@in_a_browser
def test_an_answer_streams_and_tells_what_it_took(page: Any) -> None:
    answer = ask(page, "def add(a, b):")
    assert answer.locator(".text").inner_text().strip()
    account = answer.locator(".account")
    assert account.is_visible()
    phases = account.locator(".bar").get_attribute("aria-label")
    for phase in ("tokenize", "queue", "prefill", "decode"):
        assert f"{phase} " in phases
    assert account.locator(".bar span").count() == account.locator(".key").count() >= 5
    caption = account.locator("figcaption").inner_text()
    for fact in ("total ", "first token ", " cached), ", " out", " tokens/s"):
        assert fact in caption


@in_a_browser
def test_a_second_question_finds_the_first_in_the_cache(page: Any) -> None:
    page.fill("[name=seed]", "7")
    page.focus("#prompt")
    ask(page, "def parse_the_header_of_a_message(line):")
    caption = ask(page, "and one for its body").locator("figcaption").inner_text()
    assert int(caption.split(" in (")[1].split(" cached")[0]) > 0


@in_a_browser
def test_an_answer_can_be_stopped_and_the_cluster_is_idle_again(page: Any) -> None:
    page.fill("[name=max_tokens]", "1500")
    page.fill("[name=temperature]", "2")  # so hot that it hardly ever ends by itself
    page.select_option("[name=kind]", "completion")
    page.focus("#prompt")
    page.keyboard.type("def f(x):")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.is-open .text').textContent.length > 20", timeout=60_000)
    page.keyboard.press("Escape")
    assert "stopped after" in page.locator(DONE).locator(".problem").inner_text()
    page.wait_for_function("() => document.getElementById('state').textContent.startsWith('ready · 0 running')")


@in_a_browser
def test_a_new_conversation_knows_nothing_of_an_answer_that_was_cut_off(page: Any) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.post_data or ""))
    page.fill("[name=max_tokens]", "1500")
    page.fill("[name=temperature]", "2")
    page.focus("#prompt")
    page.keyboard.type("the old one")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.is-open .text').textContent.length > 20", timeout=60_000)
    page.click("#fresh")
    page.wait_for_function("() => !document.querySelector('#send').disabled")
    page.fill("[name=max_tokens]", "4")
    page.focus("#prompt")
    ask(page, "the new one")
    [last] = [json.loads(body)["messages"] for body in sent if "the new one" in body]
    assert last == [{"role": "user", "content": "the new one"}]


@in_a_browser
def test_a_refusal_is_shown_and_the_prompt_is_kept(page: Any) -> None:
    page.fill("[name=max_tokens]", "1000000")
    page.focus("#prompt")
    answer = ask(page, "too much")
    assert "max" in answer.locator(".problem").inner_text()
    assert page.input_value("#prompt") == "too much"
    page.fill("[name=max_tokens]", "8")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.locator(DONE).nth(1).locator(".account").wait_for()


@in_a_browser
def test_the_cluster_is_shown_as_it_is(page: Any) -> None:
    assert "worker-" in page.locator(".group").inner_text()
    assert "free of" in page.locator(".group .bar").get_attribute("aria-label")
    assert "bundled" in page.locator("#facts").inner_text()


@in_a_browser
def test_light_and_dark_follow_the_system_and_the_button(page: Any) -> None:
    def paper() -> int:
        """How bright the background is, red alone."""
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    assert paper() > 200
    page.emulate_media(color_scheme="dark")
    assert paper() < 60
    page.click("#theme")
    assert paper() > 200
    page.click("#theme")
    assert paper() < 60


@pytest.mark.parametrize("width", [1280, 390])
@in_a_browser
def test_the_prompt_is_in_sight_after_a_long_answer_and_nothing_overflows(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    for _ in range(2):
        ask(page, "a long one")
    box = page.locator("#send").bounding_box()
    seen = page.evaluate("[window.scrollY, window.innerHeight, document.documentElement.scrollWidth]")
    assert box["y"] + box["height"] < seen[1] + 1
    assert seen[2] <= width


@in_a_browser
def test_everything_is_reached_by_keyboard_in_order(page: Any) -> None:
    page.focus(".skip")
    reached = ["skip"]
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert reached[:5] == ["skip", "theme", "prompt", "send", "fresh"]
    assert reached[5:] == ["model", "kind", "system", "temperature", "max_tokens", "seed", "key"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_reasoning_stands_above_the_answer(tmp_path: Path) -> None:
    def scenario(page: Any) -> None:
        answer = ask(page, "the fox")
        assert answer.locator(".thoughts").text_content() == "Hm, 天気."
        assert answer.locator(".text").text_content() == "Yes"

    async def test() -> None:
        async with saying(tmp_path, QWEN3) as one:
            load = scheduling_pb2.LinkLoad(group="g", kv_blocks_total=9, kv_blocks_free=9)
            one.scheduler.send(scheduling_pb2.SchedulerFrame(loads=scheduling_pb2.LinkLoads(groups=[load])))
            one.says = "<think>\nHm, 天気.\n</think>\n\nYes"
            await asyncio.to_thread(visit, str(one.client.base_url), scenario)

    run(test())
