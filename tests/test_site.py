"""The documentation in a real browser: every page, wide and narrow, light and dark, from a server and from disk.

Needs `pip install '.[docs]'` and Chromium (on Debian: `apt-get install chromium`). With SITE_SCREENS, the name of a
folder, pictures of the first 6,000 pixels of each page are left there: they take most of the time.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from processes import output_of

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENS = os.environ.get("SITE_SCREENS")
WIDE, NARROW, HEIGHT = 1400, 390, 900  # pixels

if CHROMIUM is None:
    pytest.skip("no Chromium: the pages are not looked at in a browser", allow_module_level=True)
pytest.importorskip("mkdocs", reason="the pages are not built: pip install '.[docs]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no browser is driven: pip install '.[docs]'")

pytestmark = pytest.mark.rehearsal

# What is wrong with the page that is open, as sentences
PROBLEMS = r"""(wide) => {
  const found = []
  const say = (what, element) => found.push(`${what}: ${element.textContent.trim().slice(0, 80)}`)
  const all = (selector) => document.querySelectorAll(selector)
  const root = document.documentElement
  if (root.scrollWidth > root.clientWidth + 1) found.push(`the page is ${root.scrollWidth} px wide`)
  for (const name of all(".word"))
    if (name.getClientRects().length > 1) say("broken name", name)
  if (wide)
    for (const block of all("article pre > code, article div.arithmatex"))
      if (block.scrollWidth > block.clientWidth + 1) say("does not fit its column", block)
  for (const formula of all(".arithmatex"))
    if (!formula.querySelector(".katex") || formula.querySelector(".katex-error")) say("not rendered", formula)
  for (const image of all("article img"))
    if (image.offsetParent && !image.naturalWidth) found.push(`no picture: ${image.src}`)
  const texts = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const inside = texts.currentNode.parentElement
    const raw = inside.closest("code, pre, script, style, .katex") ? /%%/ : /\$\$|\\[([]|%%|:math:|\{\{/
    if (raw.test(texts.currentNode.data)) say("raw markup", inside)
  }
  return found
}"""

# Texts whose contrast with what lies behind them is below WCAG's 4.5 (3 for large ones)
FAINT = r"""() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
  const painted = (color) => {
    canvas.clearRect(0, 0, 1, 1)
    canvas.fillStyle = color
    canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
  }
  const colors = new Map() // painting one takes a hundred times as long
  const rgba = (color) => colors.get(color) ?? colors.set(color, painted(color)).get(color)
  const over = ([r, g, b, a], below) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a))
  const seen = new Map()
  const behind = (element) => {
    if (!element) return [1, 1, 1]
    if (!seen.has(element)) {
      const color = rgba(getComputedStyle(element).backgroundColor)
      seen.set(element, color[3] === 1 ? color.slice(0, 3) : over(color, behind(element.parentElement)))
    }
    return seen.get(element)
  }
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
  const found = new Map()
  for (const element of document.querySelectorAll("article :is(p, li, td, th, h1, h2, h3, a, code, span, summary)")) {
    if (element.closest(".headerlink, .katex, .md-clipboard") || element.getAttribute("href") === "#") continue
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue
    const style = getComputedStyle(element)
    const background = behind(element)
    const key = style.color + background + style.fontSize
    if (found.has(key)) continue
    const [one, two] = [light(over(rgba(style.color), background)), light(background)].sort((a, b) => b - a)
    const ratio = (one + 0.05) / (two + 0.05)
    const enough = parseFloat(style.fontSize) >= 24 ? 3 : 4.5
    const text = `${element.className || element.tagName}: ${element.textContent.trim().slice(0, 40)}`
    found.set(key, ratio < enough ? `contrast ${ratio.toFixed(2)}: ${text}` : "")
  }
  return [...found.values()].filter(Boolean)
}"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            try:
                output_of(1, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), folder=ROOT)
            except pytest.fail.Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return folder


@pytest.fixture(scope="session")
def server(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def watched(browser: playwright.Browser, home: str) -> tuple[playwright.Page, list[str]]:
    """A page that is to be opened from `home` alone, and a list of what goes wrong there."""
    page = browser.new_page(viewport={"width": WIDE, "height": HEIGHT}, color_scheme="light")
    wrong: list[str] = []
    local = (f"{home}/", "data:", "blob:")
    page.on("request", lambda asked: asked.url.startswith(local) or wrong.append(f"foreign request: {asked.url}"))
    page.on("requestfailed", lambda asked: wrong.append(f"not found: {asked.url}"))
    page.on("console", lambda said: said.type == "error" and wrong.append(f"console: {said.text}"))
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    return page, wrong


def test_every_page(site: Path, server: str, browser: playwright.Browser) -> None:
    """Each is opened once, every second one from disk, and then made narrow."""
    homes = [server, site.as_uri()]
    opened = [watched(browser, home) for home in homes]
    problems, shown = {}, dict.fromkeys(homes, "light")
    paths = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    # the links of 404.html are absolute: servers show it for pages anywhere
    for number, name in enumerate(path for path in paths if path != "404.html"):
        (page, wrong), home = opened[number % 2], homes[number % 2]
        page.set_viewport_size({"width": WIDE, "height": HEIGHT})  # before it opens: what grows later is animated
        page.goto(f"{home}/{name}")
        page.wait_for_function("document.fonts.status === 'loaded'")
        found, other = [], {"light": "dark", "dark": "light"}[shown[home]]
        schemes = {WIDE: (shown[home], other), NARROW: (other,) if SCREENS is None else (other, shown[home])}
        for width in (WIDE, NARROW):
            page.set_viewport_size({"width": width, "height": HEIGHT})
            found += [f"{width} px: {each}" for each in page.evaluate(PROBLEMS, width == WIDE)]
            for scheme in schemes[width]:
                if scheme != shown[home]:
                    page.emulate_media(color_scheme=scheme)
                    page.wait_for_selector(f"body[data-md-color-scheme={'slate' if scheme == 'dark' else 'default'}]")
                    shown[home] = scheme
                found += [f"{width} px, {scheme}: {each}" for each in page.evaluate(FAINT)]
                if SCREENS is not None:
                    photograph(page, f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.jpeg", width)
        found += wrong
        wrong.clear()
        if found:
            problems[name] = found
    assert not problems, "\n".join(f"{name}\n  " + "\n  ".join(found) for name, found in problems.items())


def photograph(page: playwright.Page, name: str, width: int) -> None:
    height = min(page.evaluate("document.documentElement.scrollHeight"), 6000)
    area = {"x": 0, "y": 0, "width": width, "height": height}
    page.screenshot(path=Path(SCREENS, name), full_page=True, clip=area, quality=70, animations="disabled")


@pytest.mark.parametrize("from_disk", [False, True])
def test_search(from_disk: bool, site: Path, server: str, browser: playwright.Browser) -> None:
    home = site.as_uri() if from_disk else server
    page, wrong = watched(browser, home)
    first = page.locator(".md-search-result__link").first
    for _ in range(12):  # what is typed before the search has begun is sometimes not heard
        page.goto(f"{home}/methods/gappo.html")
        page.fill(".md-search__input", "accumulation window")
        with suppress(playwright.TimeoutError):
            first.wait_for(timeout=5_000)
            break
    assert first.get_attribute("href").startswith(home)
    assert not wrong
