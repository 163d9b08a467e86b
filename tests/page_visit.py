"""Visits to the server's page by a real browser: what it showed, what it asked for, what it complained about."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn

from serve.client import EngineClient
from serve.hosts.sockets import open_listener, url_of
from serve.http.app import build_app
from serve.http.settings import ServerSettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextmanager
def serving(engine: EngineClient, settings: ServerSettings | None = None) -> Iterator[str]:
    """The URL of a server in a thread."""
    config = uvicorn.Config(build_app(engine, settings), log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with open_listener("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"{url_of(listener)}/"
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@dataclass
class Visit:
    """A page, what its browser complained about, and every address it asked for."""

    page: Page
    url: str
    complaints: list[str]
    requests: list[str]

    def ask(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if wait:
            self.page.wait_for_selector("#send:visible")

    def shown(self) -> str:
        """The last answer as it is on the page."""
        return str(self.page.locator(".text").last.evaluate("(node) => node.textContent"))

    def tokens(self, name: str) -> list[Any]:
        """A JavaScript expression of every token ``t`` on the page."""
        found = self.page.eval_on_selector_all(".text .t", f"(all) => all.map((t) => {name})")
        return list(found)

    def until(self, condition: str | Callable[[], bool], seconds: float = 15) -> None:
        """Waits for JavaScript in the page, which the page's policy forbids Playwright's own way of, or for Python."""
        deadline = time.monotonic() + seconds
        while not (self.page.evaluate(condition) if isinstance(condition, str) else condition()):
            assert time.monotonic() < deadline, f"not in {seconds} s: {condition}"
            self.page.wait_for_timeout(25)


@contextmanager
def visiting(browser: Browser, url: str, *, clean: bool = True, **options: Any) -> Iterator[Visit]:
    """A fresh browser profile on the page. ``clean``: complaints fail the test."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    context.set_default_timeout(15_000)
    page = context.new_page()
    visit = Visit(page, url, [], [])
    page.on("console", lambda message: visit.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on("request", lambda request: visit.requests.append(request.url))
    page.goto(url)
    visit.until("experts > 0 || $('settings').open")
    yield visit
    assert not clean or visit.complaints == []
    context.close()


LAYOUT_SHIFT = """() => new Promise((done) => {
  new PerformanceObserver((list) => done(list.getEntries().reduce((sum, entry) => sum + entry.value, 0)))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(0), 300);
})"""
# Texts whose contrast with what is behind them is below WCAG's AA, as "ratio text"; colours of any notation.
LOW_CONTRAST = """(root) => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const pixel = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = pixel(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (pixel(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const low = [], walker = document.createTreeWalker(document.querySelector(root), NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, style")) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    seen++;
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${((a + 0.05) / (b + 0.05)).toFixed(2)} ${walker.currentNode.data}`);
  }
  return { seen, low };
}"""
