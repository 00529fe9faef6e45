"""The page at /ui in a real browser: chat, keyboard, screen reader names, colours, narrow screens, keys, live view."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_app import served_on_port
from live_server import LiveServer
from ui.browser import CHROMIUM, WHY_NOT, Browser, Page

from moonlang.config.server_args import ServerArgs
from moonlang.entrypoints.ui.site import FOLDER

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

CHECKS = (Path(__file__).parents[1] / "support" / "accessibility.js").read_text()
ANSWERED = "document.querySelectorAll('.assistant .receipt').length === {}"
TILE = "[...document.querySelectorAll('#tiles div')].find(tile => tile.firstChild.textContent === '{}').lastChild"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Page]:
    """The page, just opened, on a desktop; the server remembers something."""
    server.wait_idle()
    # What earlier tests asked may be heavier than this.
    server.http.post("/flush_cache", params={"timeout": 60}).raise_for_status()
    body = {"text": ["An old prompt", "An old friend"], "sampling_params": {"max_new_tokens": 32, "ignore_eos": True}}
    server.http.post("/generate", json=body).raise_for_status()
    with browser.page() as page:
        page.resize(1280, 800)
        page.open(f"{server.url}/ui")
        page.until("document.querySelector('#model').textContent")
        yield page


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element of this id or name has the focus."""
    for _ in range(40):
        page.press("Tab")
        if focused(page) == name:
            return
    raise AssertionError(f"Tab does not lead to {name}")


def ask(page: Page, text: str, answers: int = 1) -> str:
    """Say something, with the message field focused; the whole answer."""
    page.type(text)
    page.press("Enter")
    page.until(ANSWERED.format(answers))
    return page.evaluate("[...document.querySelectorAll('.assistant .text')].at(-1).textContent")


def test_a_chat_by_keyboard_alone(page: Page) -> None:
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"  # first of all: past the header
    tab_to(page, "temperature")
    page.type("0")
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "prompt")
    first = ask(page, "Write a short story about a fox.")
    assert len(first.split()) > 5
    page.type("line")
    page.press("Enter", shift=True)
    assert page.evaluate("document.querySelector('#prompt').value") == "line\n"  # a line end is not the end
    page.evaluate("document.querySelector('#prompt').value = ''")
    ask(page, "And another one.", 2)
    sent = page.evaluate("document.querySelectorAll('.message').length")
    assert sent == 4
    tab_to(page, "clear")
    page.press("Enter")
    page.until("document.querySelectorAll('.message').length === 0")
    assert page.problems == []


def test_probabilities_and_the_receipt(page: Page, server: LiveServer) -> None:
    tab_to(page, "temperature")
    page.type("0")
    tab_to(page, "logprobs")
    page.press(" ")
    page.evaluate("document.querySelector('#prompt').focus()")
    question = "Write a short story about a receipt."
    ask(page, question)
    entries = page.evaluate("[...document.querySelectorAll('.tokens [role=option]')].map(one => one.textContent)")
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 256, "temperature": 0, "logprobs": True}
    whole = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert entries == [entry["token"] for entry in whole]
    page.evaluate("document.querySelector('.tokens').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert page.evaluate("document.querySelector('.tokens [aria-selected=true]').dataset.at") == "2"
    assert page.evaluate("document.querySelectorAll('.alternatives tbody tr').length") == 5
    page.evaluate("document.querySelector('.receipt').open = true")
    rows = page.evaluate("[...document.querySelectorAll('.receipt tbody tr')].map(row => row.innerText)")
    assert [row.split("\t")[0] for row in rows][:3] == ["Waiting", "Reading the prompt", "Writing the answer"]
    assert any(row.startswith("Computed now") for row in rows)
    assert page.problems == []


def test_an_answer_can_be_stopped_and_errors_are_said(page: Page, server: LiveServer) -> None:
    page.evaluate("document.querySelector('[name=max_tokens]').value = '30000'")
    page.evaluate("document.querySelector('#prompt').focus()")
    page.type("Hello")
    page.press("Enter")
    page.until("document.querySelector('.assistant .summary').textContent")
    assert "30000" in page.until("document.querySelector('#notice').textContent")  # more than the context holds
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    page.evaluate("document.querySelector('[name=stop]').value = 'zzz'")
    page.type("Count for ever")
    page.press("Enter")
    page.until("document.querySelectorAll('.assistant').length === 2")
    page.evaluate("document.querySelector('#stop').click()")
    page.until("document.querySelector('#send').disabled === false")
    server.wait_idle()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_colours_and_structure(page: Page, scheme: str) -> None:
    page.set_scheme(scheme)
    page.evaluate("document.querySelector('[name=logprobs]').click()")
    page.evaluate("document.querySelector('#prompt').focus()")
    ask(page, "Write a short story about a bear.")
    page.evaluate("document.querySelector('.receipt').open = true")
    for view in ("chat", "watch"):
        page.evaluate(f"document.querySelector('#tab-{view}').click()")
        if view == "watch":
            page.until("document.querySelectorAll('#tree [role=treeitem]').length > 1")
        nameless = [role for role, name in page.controls() if not name.strip() and role not in ("main", "RootWebArea")]
        assert nameless == []
        assert page.evaluate(CHECKS) == []
    assert page.problems == []


@pytest.mark.parametrize("width", [320, 700])
def test_narrow_screens_scroll_one_way_only(page: Page, width: int) -> None:
    page.resize(width, 640)
    for view in ("chat", "watch"):
        page.evaluate(f"document.querySelector('#tab-{view}').click()")
        if view == "watch":
            page.until("document.querySelectorAll('#tree [role=treeitem]').length > 1")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_live_view_follows_the_server(page: Page, server: LiveServer) -> None:
    tab_to(page, "tab-chat")
    page.press("ArrowRight")  # between tabs, as in any list of them
    assert focused(page) == "tab-watch"
    page.until("document.querySelectorAll('#tree [role=treeitem]').length > 1")
    assert page.evaluate(TILE.format("Instances up") + ".textContent") == "1 of 1"
    page.evaluate("document.querySelector('#tree [tabindex=\"0\"]').focus()")
    page.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
    page.press("ArrowRight", "ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-level')") == "2"
    with server.http.stream("POST", "/generate", json={"text": "Once", "stream": True}) as response:
        response.read()
    page.until("document.querySelector('#ttft .quantiles').textContent.startsWith('Half within')")
    page.until("document.querySelector('#tree').textContent.includes('An old')")
    assert page.problems == []


def give_key(page: Page, key: str) -> None:
    page.until("document.querySelector('#key-dialog').open")
    page.type(key)
    page.press("Enter")
    page.until("!document.querySelector('#key-dialog').open")


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Browser) -> None:
    args = ServerArgs(api_key="secret", admin_api_key="admin")
    with served_on_port(args) as url, browser.page() as page:
        page.open(f"{url}/ui")
        give_key(page, "wrong")
        page.until("document.querySelector('#notice').textContent.includes('missing or wrong')")
        page.evaluate("document.querySelector('#key-button').click()")
        give_key(page, "secret")
        page.until("document.querySelector('#model').textContent")
        page.open(f"{url}/ui#watch")
        page.until("document.querySelector('#tree-summary').textContent.includes('admin key')")
        page.evaluate("document.querySelector('#key-button').click()")
        give_key(page, "admin")
        page.until("document.querySelectorAll('#tree [role=treeitem]').length === 2")
        page.evaluate("document.querySelector('#tab-chat').click()")
        page.evaluate("document.querySelector('[name=max_tokens]').value = 20")
        page.evaluate("document.querySelector('#prompt').focus()")
        assert ask(page, "abc").startswith(":a;cba:")  # the fake engine says it backwards


def test_it_is_painted_and_small(page: Page) -> None:
    paints = page.until("performance.getEntriesByType('paint').map(entry => entry.startTime)")
    assert paints
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 150_000
