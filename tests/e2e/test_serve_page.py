"""The page at ``/`` in a real browser, over the real HTTP application and an engine without a model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest

from serve.http.settings import ServerSettings
from tests.page_visit import LAYOUT_SHIFT, LOW_CONTRAST, serving, visiting
from tests.yard_engine import ENDLESS, HOSTILE, SPLIT, TEXT, YardEngine, answer_pieces

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("the page's tests need a browser: apt-get install chromium, or put google-chrome on the PATH")
    with api.sync_playwright() as playwright:
        # Containers run as root and have a small /dev/shm.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@dataclass(frozen=True)
class Yard:
    engine: YardEngine
    url: str


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    """A server for the tests that leave it as it was."""
    engine = YardEngine()
    with serving(engine) as url:
        yield Yard(engine, url)


def test_the_policy_allows_the_file_itself_and_nothing_else(yard: Yard) -> None:
    answer = httpx.get(yard.url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind]), policy[kind]
    assert not re.search(r"(?i)(src|href)=[\"']?(https?:)?//", answer.text)


def test_the_page_asks_only_its_own_server_and_nothing_moves_while_it_loads(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.page.wait_for_selector("#live.on")
        visit.until(lambda: visit.requests.count(f"{yard.url}experts/load?model=yard") > 2)
        asked = {url.removeprefix(yard.url) for url in visit.requests if not url.startswith("data:")}
        assert asked == {"", "v1/models", "experts/load", "experts/load?model=yard"}
        assert visit.page.title() == "yard · moeyard"
        assert visit.page.text_content("#facts") == "8 experts in 4 layers, gate topk"
        assert visit.page.evaluate(LAYOUT_SHIFT) < 0.01


def test_the_policy_stops_what_a_hole_in_the_page_would_let_in(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url, clean=False) as visit:
        attacks = [
            "document.body.innerHTML += '<p>'",
            "document.createElement('script').text = 'document.title = 1'",
            "$('input').setAttribute('onfocus', 'document.title = 1')",
        ]
        for attack in attacks:
            assert visit.page.evaluate(f"() => {{ try {{ {attack}; return ''; }} catch (e) {{ return e.name; }} }}"), (
                attack
            )
        refused = visit.page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => '', (error) => error.name)")
        assert refused == "TypeError"
        assert "violates the following Content Security Policy directive" in " ".join(visit.complaints)


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_an_answer_streams_and_each_token_wears_its_experts_colour(browser: Browser, yard: Yard, mode: str) -> None:
    with visiting(browser, yard.url) as visit:
        visit.page.locator(".pick label", has_text=mode.capitalize()).click()
        visit.ask("Once")
        assert visit.shown() == ("Once" if mode == "completion" else "") + TEXT
        pieces = [piece.decode() for piece in answer_pieces("Once")]
        assert visit.tokens("t.textContent") == pieces
        colours = []
        for layer in (0, 2):
            visit.page.locator("#layer").fill(str(layer))
            assert visit.page.text_content("#layer-name") == f"{layer + 1} of 4, block {2 * layer + 1}"
            assert visit.tokens("Number(t.dataset.expert)") == [yard.engine.strongest(p, layer) for p in pieces]
            visit.page.wait_for_timeout(400)  # of fading
            colours.append(visit.tokens("getComputedStyle(t).backgroundColor"))
            by_expert = dict(zip(visit.tokens("t.dataset.expert"), colours[-1], strict=True))
            assert len(by_expert) > 4
            assert len(set(by_expert.values())) == len(by_expert)
        assert colours[0] != colours[1]
        meta = visit.page.text_content(".meta") or ""
        assert f"{len(pieces)} tokens" in meta
        assert re.search(r"\d\.\d tokens/s", meta)
        assert re.search(r"\d m?s to the first token", meta)
    asked = yard.engine.seen[-1]
    assert asked.return_routing
    assert (asked.sampling.max_tokens, asked.sampling.logprobs, asked.sampling.seed) == (256, 0, None)


def test_pointing_at_a_token_or_walking_to_it_shows_its_experts_in_every_layer(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.ask("hello")
        visit.page.locator(".text .t").nth(2).hover()
        pieces = answer_pieces("hello")

        def expected(piece: bytes) -> list[str]:
            routing = yard.engine.route(piece)
            rows = [zip(*pair, strict=True) for pair in zip(routing.experts, routing.weights, strict=True)]
            shares = [
                "".join(f"{e}{w:.2f}".replace("0.", ".") if w < 1 else f"{e}{w:.2f}" for e, w in row) for row in rows
            ]
            return [f"L{number}{row}" for number, row in enumerate(shares, 1)]

        assert visit.page.locator("#tip .row").all_text_contents() == expected(pieces[2])
        assert "p 0.61" in (visit.page.text_content("#tip .head") or "")
        visit.page.mouse.move(5, 300)
        assert not visit.page.is_visible("#tip")
        visit.page.focus(".text")
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            visit.page.keyboard.press(key)
        assert visit.page.locator("#tip .row").all_text_contents() == expected(pieces[2])
        visit.page.keyboard.press("End")
        assert visit.page.locator("#tip .row").all_text_contents() == expected(pieces[-1])
        visit.page.keyboard.press("Escape")
        assert not visit.page.is_visible("#tip")


def test_bars_count_the_answer_and_follow_the_server(browser: Browser) -> None:
    engine = YardEngine(pause_s=0)
    with serving(engine) as url, visiting(browser, url) as visit:
        assert visit.page.text_content("#load .figure b") == "–"
        visit.ask("hello")
        visit.page.locator("#layer").fill("3")
        for chart in ("own", "load"):
            row_E = list(engine.load_LE[3])
            label = f"Expert 2: {row_E[2]} tokens, {row_E[2] / sum(row_E):.0%}".replace("%", " %")
            visit.until(f"document.querySelectorAll('#{chart} .bar')[2].ariaLabel === '{label}'")
            assert visit.page.text_content(f"#{chart} .figure b") == f"{max(row_E) * 8 / sum(row_E):.2f}"
        visit.page.wait_for_timeout(600)  # of growing
        heights = visit.page.eval_on_selector_all("#own .bar i", "(all) => all.map((bar) => bar.offsetHeight)")
        assert heights.index(max(heights)) == row_E.index(max(row_E))
        assert max(heights) > 2 * min(heights)
        gauges = visit.page.eval_on_selector_all(".gauges dd", "(all) => all.map((node) => node.textContent)")
        assert gauges == ["3", "5", "13 %", str(engine.generated)]
        # The answer counts for itself; the conversation and the server have both.
        visit.ask("split this")
        first, both = sum(row_E), sum(engine.load_LE[3])
        assert visit.page.evaluate("own.total") == both - first
        visit.page.locator(".pick label", has_text="Conversation").click()
        assert visit.page.evaluate("own.total") == both
        visit.until(f"load.total === {both}")
        visit.page.locator(".pick label", has_text="Last 10 s").click()
        assert visit.page.evaluate("load.total") == both
        visit.page.evaluate("snapshots.splice(0, snapshots.length - 1)")  # as when they are older than that
        visit.until("load.total === 0")


def test_pointing_at_an_expert_shows_its_tokens_alone_and_a_click_keeps_them(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.ask("hello")
        mine = [yard.engine.strongest(piece.decode(), 0) == 3 for piece in answer_pieces("hello")]
        bare = "getComputedStyle(t).backgroundColor !== 'rgba(0, 0, 0, 0)'"
        visit.page.locator("#own .bar").nth(3).click()
        visit.page.mouse.move(5, 300)
        visit.page.wait_for_timeout(400)
        assert visit.tokens(bare) == mine
        assert visit.page.get_attribute("#load .bar:nth-child(4)", "aria-pressed") == "true"
        visit.page.keyboard.press("ArrowRight")
        assert "Expert 4:" in (visit.page.text_content("#own .caption") or "")
        visit.page.keyboard.press("Escape")
        visit.page.focus("#input")
        visit.page.wait_for_timeout(400)
        assert all(visit.tokens(bare))


def test_polling_rests_while_nobody_looks(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        show = """(hidden) => { Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange")); }"""
        visit.page.evaluate(show, True)
        visit.page.wait_for_timeout(200)  # for one that is under way
        before = len(visit.requests)
        visit.page.wait_for_timeout(2200)
        assert len(visit.requests) == before
        visit.page.evaluate(show, False)
        visit.until(lambda: len(visit.requests) > before, 2)


def test_stop_ends_the_request_in_the_engine_and_the_page_goes_on(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.page.evaluate("$('max_tokens').value = 100000")
        visit.ask("endless please", wait=False)
        visit.until("turns[0].numTokens > 20")
        running = yard.engine.seen[-1].request_id
        assert running not in yard.engine.closed
        visit.page.click("#stop")
        visit.until(lambda: running in yard.engine.closed)
        visit.page.wait_for_selector("#send:visible")
        assert "stopped by you" in (visit.page.text_content(".meta") or "")
        partial = visit.shown()
        assert ENDLESS.startswith(partial)
        visit.page.evaluate("$('max_tokens').value = 7")
        visit.ask("hello")
        assert visit.shown() == "".join(piece.decode() for piece in answer_pieces("hello")[:7])
        assert "stopped at max tokens" in (visit.page.locator(".meta").last.text_content() or "")
        # What was said before is part of the conversation, a stopped answer too.
        assert str(yard.engine.seen[-1].prompts[0]).startswith(f"User: endless please\nAssistant: {partial}")
        visit.page.click("#new")
        assert visit.page.locator(".turn").count() == 0
        visit.ask("hello")
        assert str(yard.engine.seen[-1].prompts[0]).startswith("User: hello\n")


def test_new_chat_ends_the_running_answer(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.ask("endless please", wait=False)
        visit.until("turns[0].numTokens > 5")
        running = yard.engine.seen[-1].request_id
        visit.page.click("#new")
        visit.until(lambda: running in yard.engine.closed)
        visit.page.wait_for_selector("#send:visible")
        assert visit.page.is_visible("#hero")


def test_characters_of_several_tokens_and_tokens_without_text(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        for mode in ("Chat", "Completion"):
            visit.page.locator(".pick label", has_text=mode).click()
            visit.page.click("#new")
            visit.ask("split this")
            assert visit.shown().removeprefix("split this" if mode == "Completion" else "") == SPLIT
            assert visit.tokens("t.textContent") == list(SPLIT)
            assert visit.tokens("t.token.parts") == [len(char.encode()) for char in SPLIT]
            visit.page.locator(".text .t", has_text="😀").hover()
            assert "last of 4 tokens" in (visit.page.text_content("#tip .head") or "")
            assert f"{len(SPLIT.encode())} tokens" in (visit.page.text_content(".meta") or "")
            visit.ask("special token")
            assert visit.shown().removeprefix("special token" if mode == "Completion" else "") == TEXT


def test_what_a_model_says_is_text_and_never_markup(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.ask(f"hostile {HOSTILE}")
        assert visit.shown() == HOSTILE
        assert visit.page.text_content(".user") == f"hostile {HOSTILE}"
        assert visit.page.locator("main img, main script").count() == 0
        visit.page.locator(".text .t").first.hover()
        assert visit.page.title() == "yard · moeyard"


def test_an_error_in_mid_answer_is_said_in_words_and_can_be_tried_again(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.ask("break now")
        words = "The server broke off the answer. The engine failed (OSError) and must be restarted."
        assert visit.page.text_content(".note span") == words
        assert TEXT.startswith(visit.shown())
        visit.page.click(".note button")
        visit.page.wait_for_selector("#send:visible")
        assert visit.page.locator(".note:not(#key-note)").count() == 1
        visit.ask("hello")
        assert visit.shown() == TEXT


def test_a_busy_server_says_when_to_come_back(browser: Browser) -> None:
    engine = YardEngine(full=True)
    with serving(engine) as url, visiting(browser, url, clean=False) as visit:
        visit.ask("hello")
        said = visit.page.text_content(".turn .note span") or ""
        assert said.startswith("The server is busy. Try again in 7 seconds. ")
        assert "64 requests are already waiting" in said
        engine.full = False
        visit.page.click(".turn .note button")
        visit.until(f"turns[0].text.length === {len(TEXT)}")
        assert visit.page.locator(".turn .note").count() == 0


def test_a_missing_or_wrong_key_is_asked_for_and_kept_in_the_tab_only(browser: Browser) -> None:
    settings = ServerSettings(api_keys=("sesame",))
    with serving(YardEngine(), settings) as url, visiting(browser, url, clean=False) as visit:

        def enter(key: str) -> None:
            visit.until("$('settings').open && document.activeElement.id === 'key'")
            visit.page.fill("#key", key)
            visit.page.keyboard.press("Enter")

        # Who has none is let go, and asked again when it matters.
        enter("")
        assert not visit.page.is_visible("#settings")
        visit.ask("hello")
        assert visit.page.text_content(".turn .note span") == "The server asks for an API key."
        enter("wrong")
        visit.until("$('key-note').textContent === 'The server does not accept this API key.'")
        enter("sesame")
        visit.page.wait_for_selector("#live.on")
        visit.page.click(".turn .note button")
        visit.until(f"turns[0].text.length === {len(TEXT)}")
        assert visit.page.evaluate("sessionStorage.getItem('moeyard.key')") == "sesame"
        assert "sesame" not in visit.page.evaluate("JSON.stringify(localStorage)")


def test_a_network_that_fails_is_said_in_words(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url, clean=False) as visit:
        route = f"{yard.url}v1/chat/completions"
        visit.page.route(route, lambda route: route.abort())
        visit.ask("hello")
        assert "The server cannot be reached" in (visit.page.locator(".turn .note").last.text_content() or "")
        visit.page.unroute(route)
        cut = 'data: {"choices": [{"index": 0, "delta": {"content": "So far"}, "logprobs": null}]}\n\n'
        visit.page.route(route, lambda route: route.fulfill(content_type="text/event-stream", body=cut))
        visit.ask("hello")
        assert visit.shown() == "So far"
        assert "The answer was cut off" in (visit.page.locator(".turn .note").last.text_content() or "")


def test_the_stream_parser_takes_any_split_and_any_line_ending(browser: Browser, yard: Yard) -> None:
    read = """async ([stream, size]) => {
      const bytes = new TextEncoder().encode(stream), got = [];
      let at = 0;
      const pull = (out) => (at < bytes.length ? out.enqueue(bytes.slice(at, at += size)) : out.close());
      const body = new ReadableStream({ pull });
      try { for await (const event of events(body)) got.push(event); } catch (error) { got.push(error.message); }
      return got;
    }"""
    stream = (
        ': comment\nevent: x\ndata: {"a":\ndata: "é😀"}\n\n\n: ping\n\ndata:{"b":1}\n\ndata: [DONE]\n\ndata: {}\n\n'
    )
    with visiting(browser, yard.url) as visit:
        for ending in ("\n", "\r\n", "\r"):
            for size in (1, 2, 3, 1000):
                got = visit.page.evaluate(read, [stream.replace("\n", ending), size])
                assert got == [{"a": "é😀"}, {"b": 1}], (ending, size, got)
        (words,) = visit.page.evaluate(read, ['data: {"a": 1}\n', 4])
        assert "cut off" in words


def test_settings_reach_the_engine_and_stay_for_the_next_visit(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        visit.page.click("#open-settings")
        values = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "12", "seed": "9007199254740991"}
        for name, value in {**values, "system": "Be brief."}.items():
            visit.page.fill(f"#{name}", value)
        visit.page.click("dialog .solid")
        visit.ask("hello")
        asked = yard.engine.seen[-1]
        assert str(asked.prompts[0]).startswith("System: Be brief.\nUser: hello")
        options = asked.sampling
        got = (options.temperature, options.top_p, options.max_tokens, options.seed)
        assert got == (0.5, 0.9, 12, 9007199254740991)
        visit.page.reload()
        visit.until("experts > 0")
        assert visit.page.input_value("#system") == "Be brief."
        # Shift with Enter breaks the line, and Enter sends both lines.
        visit.page.fill("#input", "one")
        visit.page.press("#input", "Shift+Enter")
        visit.page.keyboard.type("two")
        visit.page.press("#input", "Enter")
        visit.page.wait_for_selector("#send:visible")
        assert "User: one\ntwo\n" in str(yard.engine.seen[-1].prompts[0])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(browser: Browser, scheme: str) -> None:
    """Tokens of 128 experts, the tip, the errors, and every other text."""
    with (
        serving(YardEngine(layers=3, experts=128, chosen=4, pause_s=0)) as url,
        visiting(browser, url, color_scheme="light") as visit,
    ):
        visit.page.emulate_media(color_scheme=scheme)
        visit.page.wait_for_timeout(400)  # of fading
        first = visit.page.evaluate(LOW_CONTRAST, "body")
        visit.ask("hello")
        visit.ask("break now")
        visit.page.evaluate("askForKey('The server asks for an API key.')")
        dialog = visit.page.evaluate(LOW_CONTRAST, "dialog")
        visit.page.keyboard.press("Escape")
        visit.page.evaluate("""() => {
          for (let expert = 0; expert < 128; expert++) {
            const span = turns[0].spans[0].cloneNode(true);
            span.style.setProperty("--c", colours(expert).soft);
            turns[0].body.append(span);
          }
        }""")
        visit.page.wait_for_timeout(400)
        assert len(set(visit.tokens("getComputedStyle(t).backgroundColor"))) > 120
        visit.page.evaluate("showTip(turns[0].spans[1])")
        second = visit.page.evaluate(LOW_CONTRAST, "body")
        assert first["low"] + dialog["low"] + second["low"] == []
        assert (first["seen"], dialog["seen"], second["seen"]) > (140, 5, 300)
        page = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page == ("rgb(246, 247, 249)" if scheme == "light" else "rgb(18, 21, 26)")
        # The button turns it round, and the choice outlives the visit.
        visit.page.click("#theme")
        visit.page.reload()
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") != page


@pytest.mark.parametrize(("experts", "layers", "chosen"), [(4, 1, 1), (8, 4, 2), (128, 24, 8)])
def test_narrow_screens_need_no_sideways_scrolling(browser: Browser, experts: int, layers: int, chosen: int) -> None:
    phone = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}
    boxes = "document.querySelectorAll('body, main, #log, #experts, .box, header')"
    wide = f"[...{boxes}].some((box) => box.scrollWidth > box.clientWidth)"
    fits = """() => { const box = $("tip").getBoundingClientRect();
      return box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight; }"""
    engine = YardEngine(layers, experts, chosen, pause_s=0)
    with serving(engine) as url, visiting(browser, url, **phone) as visit:
        assert not visit.page.evaluate(wide)
        visit.ask("hello")
        visit.ask("endless" + "word" * 100)
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
        assert not visit.page.evaluate(wide)
        visit.page.locator(".text .t").first.tap()
        assert visit.page.locator("#tip .row").count() == layers
        assert visit.page.evaluate(fits)
        assert not visit.page.is_visible("#experts")
        visit.page.tap("#show-experts")
        visit.page.wait_for_timeout(400)
        assert visit.page.is_visible("#load .bar >> nth=-1")
        assert visit.page.locator("#own .bar").count() == experts
        assert not visit.page.evaluate(wide)
        visit.page.tap("#close-experts")


def test_long_answers_are_appended_to_and_never_drawn_again(browser: Browser) -> None:
    with serving(YardEngine(pause_s=0)) as url, visiting(browser, url) as visit:
        visit.page.evaluate("$('max_tokens').value = 100000")
        visit.ask("hello")
        visit.page.evaluate("""() => { window.removed = 0; new MutationObserver((all) => all.forEach((m) => {
          if (!$("say").contains(m.target) && m.target.closest?.(".text")) removed += m.removedNodes.length;
        })).observe($("log"), { childList: true, subtree: true }); }""")
        visit.page.fill("#input", "long please")
        visit.page.press("#input", "Enter")
        visit.page.wait_for_selector("#send:visible", timeout=120_000)
        assert visit.shown() == ENDLESS[:60_000]
        assert visit.page.evaluate("removed") == 0
        # Each block's layout is bounded, and the reader is still at the end of the text.
        longest = "Math.max(...[...turns[1].body.children].map((block) => block.childElementCount))"
        assert visit.page.evaluate(longest) < 700
        assert visit.page.evaluate("$('log').scrollHeight - $('log').scrollTop - $('log').clientHeight") < 60


def test_sentences_are_said_to_screen_readers_whole(browser: Browser, yard: Yard) -> None:
    with visiting(browser, yard.url) as visit:
        assert visit.page.get_attribute("#say", "aria-live") == "polite"
        visit.ask("hello")
        said = [text.strip() for text in visit.page.locator("#say p").all_text_contents()]
        assert " ".join(said) == " ".join(TEXT.split())
        assert len(said) == 3
