"""The page in a browser: a click moves the memory and the scores to those of the store."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time

import numpy as np
import pytest
import uvicorn

from rmjax import tasks
from rmjax.data.source import Description, Questions
from rmjax.serve import Model
from rmjax.serve.http import Service, make_app
from rmjax.tasks.answers import Answers
from rmjax.tasks.reasoning import Reasoning
from tests.runs import tiny
from tests.serve import served
from tests.serve.test_streams import TASK
from tests.shop import Shop, ShopSource
from tests.small import DIM, ITEMS, N, noise, rehearsal

sync_api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
SHAPES = dict(batches=(1,), segments=(1,), queries=(64,))


@contextlib.contextmanager
def serving(service: Service, token: str | None = None):
    """Serves an app from a thread; gives its address, and a function that ends it."""
    config = uvicorn.Config(make_app(service, token), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)

    def end():
        server.should_exit = server.force_exit = True
        thread.join()

    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", end
    finally:
        end()


def service_of(model: Model) -> Service:
    made = Service(model, model.streams(**SHAPES))
    made.compile()
    return made


@pytest.fixture(scope="module")
def clicks():
    return service_of(served.model())


@pytest.fixture(scope="module")
def ranked():
    config = tiny(**{"machine.kind": "gru", "data.segment_length": 4})
    description = ShopSource(Shop(users=6, items=60, shortest=4, longest=17)).describe()
    task = tasks.make_task(config, description)
    return service_of(Model(config, task, noise(task.init), description))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser):
    """Opens tabs of the page. At the end, no tab may have a fault that a test did not expect."""
    faults, tabs = [], []

    def opened(url, expected=None, **options):
        made = browser.new_page(**options)
        made.on("console", lambda message: faults.append(message.text))
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.on("request", lambda one: one.url.startswith(url) or faults.append(one.url))
        made.goto(url)
        tabs.append((made, expected))
        return made

    yield opened
    for made, expected in tabs:
        made.close()
        faults = [one for one in faults if expected is None or expected not in one]
    assert not faults


def open_user(page, user) -> None:
    page.fill("#user", str(user))
    page.set_checked("#integer", isinstance(user, int))
    page.click("#choose button")
    page.wait_for_selector(f"#who:has-text('{user}')")
    settled(page)


def settled(page) -> None:
    """Waits until all actions of the page have ended."""
    page.evaluate("last")


def click(page, item) -> None:
    page.click(f"#catalogue [data-item='{item}']")
    settled(page)


def numbers(page, selector) -> list[list[float]]:
    texts = page.locator(selector).all_inner_texts()
    return [[float(x) for x in re.findall(r"-?\d+\.\d+", text)] for text in texts]


def pixels(page, name) -> str:
    return page.evaluate(f"document.getElementById('{name}').toDataURL()")


def scores(service, user, shown) -> np.ndarray:
    """What the store says of the shown items of a user."""
    if shown == "#best":
        return service.streams.recommend([user], 10)[0][0]
    return service.streams.answer([user], [np.arange(served.ITEMS)])[0][:50]


@pytest.mark.parametrize("kind, user", [
    ("clicks", "ann/ä ?"), ("clicks", 2**63 - 1), ("clicks", -7), ("ranked", "7"),
])  # fmt: skip
def test_a_click_moves_the_memory_and_the_scores(request, tab, kind, user):
    service = request.getfixturevalue(kind)
    shown = "#best" if kind == "ranked" else "#catalogue"
    item = 7 if kind == "ranked" else '"SKU-14"'
    with serving(service) as (url, _):
        page = tab(url)
        open_user(page, user)
        assert user in service.streams and page.inner_text("#length") == "0"
        before, empty = scores(service, user, shown), pixels(page, "memory")
        assert not page.is_visible("#change")
        for length in (1, 2, 3):
            click(page, item)
            assert page.inner_text("#length") == f"{length - 1} → {length}"
            assert service.streams.info(user).length == length
            size = f"{service.streams.info(user).bytes:,}"
            assert page.inner_text("#bytes") == f"{size} → {size}"
            after, rows = scores(service, user, shown), numbers(page, f"{shown} .score")
            np.testing.assert_allclose([row[-1] for row in rows], after, atol=6e-4)
            if kind == "clicks":
                np.testing.assert_allclose([row[0] for row in rows], before, atol=6e-4)
                assert np.abs(after - before).max() > 1e-3
            before = after
        assert pixels(page, "memory") != empty and page.is_visible("#change")
        memory = service.streams.memory(user)
        largest = np.abs(memory.slots if kind == "clicks" else memory.hidden).max()
        assert f"to {float(f'{largest:.3g}'):g}," in page.get_attribute("#memory", "aria-label")


def test_a_model_that_is_asked_about_kinds_gets_no_items_as_questions(tab):
    """It shows the memory alone. Its ids are larger than numbers of JavaScript are exact."""
    ids = tuple(2**62 + k for k in range(ITEMS))
    questions = Questions(query="kind", answer="class", kinds=3, classes=2)
    task = Reasoning(TASK.machine, Answers(questions, DIM, DIM), rehearsal(), N)
    description = Description(
        num_items=ITEMS, max_items=20, num_queries=2, numbering=ids, questions=questions
    )
    service = service_of(Model(tiny(), task, noise(task.init), description))
    with serving(service) as (url, _):
        page = tab(url)
        open_user(page, "kim")
        click(page, ids[3])
        assert not page.is_visible("#error") and page.inner_text("#length") == "0 → 1"
        assert page.inner_text(f"#catalogue [data-item='{ids[3]}']") == str(ids[3])
        for user in (".", ".."):
            page.fill("#user", user)
            page.click("#choose button")
            settled(page)
            assert "cannot stand in an address" in page.inner_text("#error")


def test_a_search_and_the_end_of_a_user(tab, clicks):
    with serving(clicks) as (url, _):
        page = tab(url)
        open_user(page, "bob")
        page.fill("#search", "sku-1")
        sync_api.expect(page.locator("#catalogue li")).to_have_count(10)
        settled(page)
        click(page, '"SKU-14"')
        assert numbers(page, "#catalogue .score")[0] != []
        page.click("#forget")
        settled(page)
        assert "bob" not in clicks.streams and not page.is_visible("#length, #memory")


def test_the_keyboard_is_enough(tab, clicks):
    with serving(clicks) as (url, _):
        page = tab(url)
        page.wait_for_selector("#catalogue button")
        page.keyboard.press("Tab")
        page.keyboard.type("kim")
        page.keyboard.press("Enter")
        page.wait_for_selector("#length")
        for _ in range(6):  # integer, Open, Forget, Search, the first item, the second one
            page.keyboard.press("Tab")
        settled(page)
        for length in (1, 2):  # the focus stays on the item
            page.keyboard.press("Enter")
            sync_api.expect(page.locator("#length")).to_have_text(f"{length - 1} → {length}")
            settled(page)
        assert page.evaluate("document.activeElement.textContent").startswith("SKU-07")


def test_the_server_s_errors_are_shown_in_words(tab, clicks):
    with serving(clicks) as (url, end):
        page = tab(url, expected="Failed to load resource")
        page.wait_for_selector("#catalogue button")
        click(page, '"SKU-07"')
        assert page.inner_text("#error") == "Open a user first."
        open_user(page, "zoe")
        assert not page.is_visible("#error")
        clicks.streams.write(["zoe"], [[1, 2]])  # another client
        click(page, '"SKU-07"')
        assert "the stream has 2 items, and 0 were expected" in page.inner_text("#error")
        assert page.inner_text("#length") == "0 → 2"
        click(page, '"SKU-07"')
        assert not page.is_visible("#error") and page.inner_text("#length") == "2 → 3"
        for user, message in {"x": "is no integer", "9" * 30: "users[0]"}.items():
            page.fill("#user", user)
            page.check("#integer")
            page.click("#choose button")
            settled(page)
            assert message in page.inner_text("#error")
        open_user(page, "zoe")
        end()
        click(page, '"SKU-07"')
        assert "The server does not answer" in page.inner_text("#error")


def test_a_token_is_asked_for(tab, clicks):
    with serving(clicks, "s3cret") as (url, _):
        page = tab(url, expected="status of 401")
        for token, message in (("wrong", "asks for a token"), ("s3cret", "asks for another token")):
            page.wait_for_selector(f"#error:has-text('{message}')")
            page.fill("#token", token)
            page.press("#token", "Enter")
        page.wait_for_selector("#catalogue button")
        settled(page)
        assert not page.is_visible("#error, #token")
        open_user(page, "tim")
        click(page, '"SKU-14"')
        assert page.inner_text("#length") == "0 → 1"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(tab, clicks, width, scheme):
    with serving(clicks) as (url, _):
        page = tab(url, color_scheme=scheme, viewport=dict(width=width, height=900))
        open_user(page, "a-user-whose-name-is-as-long-as-that-of-a-device-" * 4)
        click(page, '"SKU-14"')
        assert page.evaluate("document.documentElement.scrollWidth") == width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", back))) < 300) == (scheme == "dark")
