"""The page in a real Chromium, what it is guarded by, and what may be done by hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from scheduler import PythonModel, Scheduler
from scheduler.http import create_app
from scheduler.testing import FakeMachine
from tests.http.conftest import Serve, Served, eventually
from tests.support.running import running
from tests.support.tiny_models import write_tiny_model

# the driver of the browser has an event loop of its own in the thread of the tests
pytestmark = pytest.mark.filterwarnings("ignore:.*blocks the event loop:RuntimeWarning")

KEY = "the-key-of-the-page"
HOSTILE = "<img src=x onerror=alert(1)><b>bold"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITH_KEY = {"authorization": f"Bearer {KEY}"}
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}

# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_browsers_get_the_page_and_programs_ollamas_word(serve: Serve) -> None:
    """The same place answers both, with a policy that lets nothing in but the page's own files."""
    served = serve(api_key=KEY)
    page = served.get("/", **BROWSER)
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert page.headers["vary"] == "accept" and page.headers["x-content-type-options"] == "nosniff"
    for accept in ("*/*", "application/json", "text/htmlx"):
        word = served.get("/", accept=accept)
        assert (word.status_code, word.text) == (200, "Ollama is running")
    head = httpx2.head(f"{served.url}/", trust_env=False)
    assert (head.status_code, head.content) == (200, b"")


def test_the_page_names_no_other_host_and_has_no_code_in_its_text(serve: Serve) -> None:
    """What the page is made of comes from this server, in files of its own; nothing else is in their folder's reach."""
    served = serve()
    page = served.get("/", **BROWSER).text
    files = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sorted(files) == ["page/icon.svg", "page/page.css", "page/page.js"]
    for name in files:
        answer = served.get(f"/{name}")
        assert answer.status_code == 200 and answer.headers["content-security-policy"]
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
    assert not re.search(r"<script(?![^>]*src=)|style=|\son\w+=", page)
    for name in ("index.html", "../page.py", "%2e%2e/page.py", "none.js"):
        assert served.get(f"/page/{name}").status_code == 404


def test_without_the_setting_there_is_no_page(serve: Serve) -> None:
    """A server that is to have no page answers everybody with Ollama's word."""
    served = serve(dashboard=False)
    assert served.get("/", **BROWSER).text == "Ollama is running"
    assert served.get("/page/page.js").status_code == 404


@pytest.mark.parametrize("action", ["load", "expire", "pin", "unpin"])
def test_actions_need_the_key_or_the_setting(serve: Serve, action: str) -> None:
    """Without a key they are refused unless the setting allows them; with one they ask for it."""
    body, path = {"model": "m"}, f"/loadmaster/{action}"
    refused = serve().post(path, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "actions_not_allowed")
    assert serve(dashboard_actions=True).post(path, body).status_code == 200
    keyed = serve(api_key=KEY)
    assert keyed.post(path, body).status_code == 401
    assert keyed.post(path, body, **WITH_KEY).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_pages_of_other_origins_cannot_act(serve: Serve, origin: str) -> None:
    """A page that a browser shows elsewhere changes nothing, whatever it calls its text."""
    served = serve(dashboard_actions=True)
    for headers in ({"origin": origin, "content-type": "text/plain"}, {"sec-fetch-site": "cross-site"}):
        answer = served.post("/loadmaster/load", {"model": "m"}, **headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert not served.scheduler.status().runners
    assert served.get("/loadmaster/load").status_code == 405


@pytest.mark.parametrize(("client", "status"), [("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 403), (None, 200)])
def test_without_a_key_only_this_machine_acts(client: str | None, status: int) -> None:
    """The setting opens the actions for clients on this machine, and for no others."""
    with FakeMachine() as fake:
        fake.model("a", size="1GiB")
        app: Any = create_app(fake.scheduler, dashboard_actions=True)

        async def called(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "client": (client, 1) if client else None}, receive, send)

        with running(called) as url:
            answer = httpx2.post(f"{url}/loadmaster/pin", json={"model": "a"}, trust_env=False)
            assert answer.status_code == status


def test_actions_do_what_they_say(serve: Serve) -> None:
    """A model is loaded, pinned, unpinned and expired, by its name or by its runner; strange bodies are refused."""
    served = serve({"keep_alive": "1h"}, dashboard_actions=True)

    def state() -> list[tuple[str, bool]]:
        return [(runner.state, runner.pinned) for runner in served.scheduler.status().runners]

    assert served.post("/loadmaster/load", {"model": "m"}).json()["status"] in ("loading", "loaded")
    eventually(lambda: state() == [("idle", False)])
    assert served.post("/loadmaster/load", {"model": "m"}).json() == {"status": "loaded"}
    (runner,) = served.scheduler.status().runners
    assert served.post("/loadmaster/pin", {"runner": runner.id}).json() == {"status": "pinned"}
    assert state() == [("idle", True)]
    served.post("/loadmaster/unpin", {"model": "m.gguf"})
    assert state() == [("idle", False)]
    for body in ({"runner": 99}, {"runner": True}, {"runner": "1"}, {"model": "none"}, {"model": "../m"}, [], {}):
        assert served.post("/loadmaster/expire", body).status_code in (400, 404)
    assert state() == [("idle", False)]
    served.post("/loadmaster/expire", {"runner": runner.id})
    eventually(lambda: state() == [])


def test_runners_of_models_without_a_name_can_be_expired(serve: Serve) -> None:
    """An embedder beside its chat model, and an object of the program, are meant by their runners."""
    served = serve({"keep_alive": "1h"}, dashboard_actions=True)
    served.scheduler.acquire(PythonModel("object", load=object)).release()
    served.scheduler.acquire("m").release()
    served.scheduler.acquire("m", embedding=True).release()
    *_, embedder = served.scheduler.status().runners
    served.post("/loadmaster/expire", {"runner": embedder.id})
    eventually(lambda: [runner.model for runner in served.scheduler.status().runners] == ["object", "m"])
    served.post("/loadmaster/expire", {"runner": served.scheduler.status().runners[0].id})
    eventually(lambda: [runner.model for runner in served.scheduler.status().runners] == ["m"])


def test_a_load_that_cannot_be_is_refused_at_once(serve: Serve) -> None:
    """What is known at once has the status and the figures that it has everywhere."""
    served = serve({"memory_limit": "1MiB"}, dashboard_actions=True)
    answer = served.post("/loadmaster/load", {"model": "m"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "does_not_fit")


# -- in a browser ------------------------------------------------------------------------------------------------------

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        # no sandbox: it does not work for root in a container, and only this page is shown
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Browser) -> Iterator[Open]:
    """Return a function that opens a page; the test fails where the page's console has had an error in it."""
    errors: list[str] = []
    contexts: list[Any] = []

    def opened(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    # the browser logs each answer that is an error, and each request without a network; the page shows them
    assert [error for error in errors if not re.search("401 .Unauthorized|ERR_INTERNET_DISCONNECTED", error)] == []


def test_the_page_is_live(serve: Serve, show: Open) -> None:
    """Devices, runners, timeline and decisions are there, and a load is shown without any doing."""
    served = serve({"keep_alive": "1h"})
    page = show(served.url)
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#devices p")).to_contain_text("cpu")
    expect(page.locator("#runners tr")).to_have_count(0)
    with served.scheduler.acquire("m"):
        row = page.locator("#runners tr")
        expect(row).to_contain_text("not while it has leases")
        expect(row.locator("td").nth(2)).to_have_text("1")
    expect(row).to_contain_text(re.compile(r"its keep-alive, in 5\d min"))
    expect(page.locator("#devices .bar .idle")).to_have_attribute("title", "m")
    expect(page.locator("#devices li.idle")).to_contain_text("m: ")
    expect(page.locator("#timeline rect.loading")).to_have_count(1)
    expect(page.locator("#timeline rect.idle")).to_have_count(1)
    placed = page.locator("#decisions li", has_text="for m is placed:")
    placed.locator("summary").click()
    expect(placed.locator("td").first).to_have_text("cpu")
    expect(page.get_by_role("button", name="Expire m")).to_be_disabled()
    expect(page.locator("#actions-note")).to_contain_text("no actions without a key")


def test_the_queue_says_what_each_request_waits_for(serve: Serve, show: Open) -> None:
    """A request that waits is shown with the reason, and goes from the page when it has gone."""
    served = serve({"memory_limit": "64MiB", "max_wait": "1h"})
    page = show(served.url)
    lease = served.scheduler.submit("m").result(20)  # of another caller: one of its own is waited for otherwise
    waiting = served.scheduler.submit("other", timeout="30m")
    row = page.locator("#queue tr")
    expect(row).to_contain_text("m to become idle")
    expect(row.locator("td").last).to_contain_text(re.compile(r"2\d min"))
    page.locator("#decisions li", has_text="waits for m to become idle").locator("summary").click()
    expect(page.locator("#decisions details[open]")).to_contain_text("it is to be evicted in")
    waiting.cancel()
    expect(row).to_have_count(0)
    lease.release()


def test_names_are_text(show: Open, tmp_path: Path) -> None:
    """A file whose name is HTML is shown by that name, wherever its name is shown."""
    write_tiny_model(tmp_path / f"{HOSTILE}.gguf")
    scheduler = Scheduler(gpus=False, models=tmp_path, keep_alive="1h")
    with scheduler, running(create_app(scheduler, dashboard_actions=True)) as url:
        page = show(url)
        expect(page.locator("#model option")).to_have_text(HOSTILE)
        page.get_by_role("button", name="Load").click()
        expect(page.locator("#runners td").first).to_have_text(HOSTILE)
        expect(page.locator("#message")).to_contain_text(HOSTILE)
        expect(page.locator("#devices li.idle")).to_contain_text(HOSTILE)
        expect(page.locator("#decisions")).to_contain_text(f"for {HOSTILE} is placed")
        expect(page.locator("#timeline rect title").first).to_contain_text(HOSTILE)
        assert page.locator("img, b").count() == 0
        page.close()


def test_with_the_key_buttons_work_and_without_it_nothing_is_shown(serve: Serve, show: Open) -> None:
    """The key is typed in, kept for the tab alone, and sent as a header, never in an address."""
    served = serve({"keep_alive": "1h"}, api_key=KEY)
    page = show(served.url)
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    expect(page.locator("#connection")).to_have_text("the server asks for a key")
    expect(page.locator("#devices")).to_be_empty()
    page.keyboard.type("wrong")  # the field has the focus
    page.keyboard.press("Enter")
    expect(page.get_by_label("Key")).to_have_value("")
    page.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#connection")).to_have_text("live")
    page.get_by_label("Model").select_option("other")
    page.get_by_role("button", name="Load").click()
    expect(page.locator("#runners tr")).to_contain_text("idle")
    page.get_by_role("button", name="Pin other", exact=True).click()
    expect(page.locator("#runners tr")).to_contain_text("it is pinned")
    page.get_by_role("button", name="Unpin other").click()
    expect(page.locator("#runners tr")).to_contain_text("its keep-alive")
    page.reload()
    expect(page.locator("#connection")).to_have_text("live")
    page.get_by_role("button", name="Expire other").click()
    expect(page.locator("#runners tr")).to_have_count(0)
    assert addresses and not [address for address in addresses if KEY in address]
    assert page.evaluate("[Object.keys(localStorage).length, document.cookie]") == [0, ""]
    expect(show(served.url).locator("#connection")).to_have_text("the server asks for a key")  # in another tab


def test_the_keyboard_reaches_everything_and_keeps_its_place(serve: Serve, show: Open) -> None:
    """Buttons are reached by the tab key, and an update takes the focus from none of them."""
    served = serve({"keep_alive": "1h"}, dashboard_actions=True)
    served.scheduler.acquire("m").release()
    page = show(served.url)
    pin = page.get_by_role("button", name="Pin m", exact=True)
    expect(pin).to_be_enabled()
    for _ in range(12):
        page.keyboard.press("Tab")
        if pin.evaluate("button => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#runners tr")).to_contain_text("it is pinned")
    served.scheduler.acquire("other").release()
    expect(page.locator("#runners tr")).to_have_count(2)
    expect(page.get_by_role("button", name="Unpin m")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_at_twice_its_size_light_and_dark(serve: Serve, show: Open, scheme: Any) -> None:
    """On a window of half the width nothing is cut off, and text stands out from its ground."""
    served = serve({"keep_alive": "1h"})
    served.scheduler.acquire("deep/er").release()
    page = show(served.url, viewport={"width": 640, "height": 480}, device_scale_factor=2, color_scheme=scheme)
    expect(page.locator("#runners tr")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # the ratio of WCAG for normal text, of each text with the ground behind it
    least = page.evaluate(
        """() => {
            const light = (colour) => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map((one) => one / 255)
                    .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ground = (one) => {
                for (; one; one = one.parentElement) {
                    const colour = getComputedStyle(one).backgroundColor;
                    if (!colour.endsWith(", 0)")) return colour;
                }
            };
            const texts = [...document.querySelectorAll("h1, h2, p, th, td, li, time, .bar div, label")];
            return Math.min(...texts.filter((one) => one.textContent.trim()).map((one) => {
                const [low, high] = [light(getComputedStyle(one).color), light(ground(one))].sort((a, b) => a - b);
                return (high + 0.05) / (low + 0.05);
            }));
        }"""
    )
    assert least >= 4.5


def test_the_page_comes_back_after_the_server(show: Open) -> None:
    """A connection that is lost is said to be, and is made again by itself."""
    with FakeMachine(keep_alive=-1) as fake, running(create_app(fake.scheduler)) as url:
        fake.model("a", size="1GiB")
        page = show(url)
        expect(page.locator("#connection")).to_have_text("live")
        page.context.set_offline(True)
        page.evaluate("window.stop()")
        expect(page.locator("#connection")).to_have_text("the connection is lost")
        page.context.set_offline(False)
        expect(page.locator("#connection")).to_have_text("live", timeout=15_000)
        fake.scheduler.acquire("a").release()
        expect(page.locator("#runners tr")).to_contain_text("only memory that others need")
        page.close()


def test_the_page_works_under_a_prefix(served: Served, show: Open) -> None:
    """Mounted below another application, the page finds its files and its events."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    outer = Starlette(routes=[Mount("/models", create_app(served.scheduler))])
    with running(outer) as url:
        page = show(f"{url}/models/")
        expect(page.locator("#connection")).to_have_text("live")
        page.close()
