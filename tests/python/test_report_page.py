"""The page of `lorafmt report` in a real browser: what it shows, its keys, and that it does no harm."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
from loras import DIFFUSERS, kohya, lora, noise
from test_report import MODULES, ORIGINAL, changed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium is installed", allow_module_level=True)
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

DASH = "\N{EN DASH}"
HOSTILE = "<img src=x onerror=window.harmed=1>"
CLOSING = "</script><script>window.harmed=1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        # Root has no sandbox, and continuous integration is root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of files of several kinds: sound ones, copies, broken ones, and one that means harm."""
    root = tmp_path_factory.mktemp("library")
    folder = root / "loras"
    small = {"transformer_blocks.0.attn.to_q": 2, "single_transformer_blocks.3.attn.to_k": 2}
    first = lora(folder / "a.safetensors", MODULES, seed=1)
    shutil.copy(first, folder / "copy.safetensors")
    changed(first, folder / "near.safetensors", noise=0.05, factor=2.0)
    for rank in range(1, 9):
        lora(folder / "ranks" / f"r{rank}.safetensors", dict.fromkeys(small, rank), seed=rank)
    for number in range(4):
        kohya(folder / "kohya" / f"k{number}.safetensors", ORIGINAL, seed=number)
    lora(folder / "unknown.safetensors", small, seed=11, extra={"nothing.known": noise(2)})
    nan = np.full(3072, np.nan, np.float32), "F32"
    lora(folder / "nan.safetensors", small, seed=12, extra={"transformer.transformer_blocks.1.attn.to_q.diff_b": nan})
    # A path can hold a slash, so a folder and a file together end an element.
    hostile = {f"{CLOSING}.weight": noise(2), f"{HOSTILE}\u202etxt.lora_A.weight": noise(2)}
    said = {"ss_output_name": HOSTILE, "modelspec.title": CLOSING}
    lora(folder / "x<" / f"script>{HOSTILE}.safetensors", small, DIFFUSERS, seed=13, extra=hostile, metadata=said)
    (folder / f"{HOSTILE}.safetensors").write_bytes(b"no")
    page = root / "page.html"
    lorafmt.report(folder, page)
    return page


def data_of(page: Path) -> tuple[str, dict[str, Any], str]:
    """The page before its data, the data, and the page after it."""
    head, rest = page.read_text().split('type="application/json">', 1)
    data, tail = rest.split("</script>", 1)
    return head + 'type="application/json">', json.loads(data), "</script>" + tail


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; whatever it says to the console or asks of a network is an error."""
    contexts, wrong = [], []

    def show(path: Path, scheme: str = "light", width: int = 1200, address: str = "") -> Any:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda asked: asked.url.startswith("file:") or wrong.append(f"request: {asked.url}"))
        page.on("request", lambda asked: asked.resource_type == "document" or wrong.append(f"request: {asked.url}"))
        page.goto(path.as_uri() + address)
        return page

    yield show
    for context in contexts:
        context.close()
    assert wrong == []


def names(page: Any) -> list[str]:
    return page.locator("#table tbody .stem").all_inner_texts()


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.innerText")


def test_all_files_are_listed(library: Path, show: Callable[..., Any]) -> None:
    page = show(library)
    assert len(names(page)) == 19
    assert page.locator("#count").inner_text().startswith("19 files, ")
    assert page.title() == f"19 adapter files {DASH} lorafmt report"
    assert "1\nnot readable" in page.locator("#totals").inner_text()
    assert page.locator("#charts figure").count() == 6


def test_filters(library: Path, show: Callable[..., Any]) -> None:
    page = show(library)
    page.fill("#filter", "ranks R3")
    assert names(page) == ["r3.safetensors"]
    page.fill("#filter", "unknown-key")
    assert "unknown.safetensors" in names(page)
    page.fill("#filter", "no such file")
    assert names(page) == [] and "No file fits" in page.locator("#count").inner_text()
    page.click("#clear")
    page.select_option("#by-dialect", "kohya")
    assert names(page) == [f"k{n}.safetensors" for n in range(4)]
    assert page.locator("#count").inner_text().startswith("4 of 19 files")
    page.fill("#filter", "k2")
    assert names(page) == ["k2.safetensors"]
    page.click("#clear")
    page.select_option("#by-state", "copies")
    assert names(page) == ["a.safetensors", "copy.safetensors"]
    page.select_option("#by-state", "alike")
    assert names(page) == ["a.safetensors", "copy.safetensors", "near.safetensors"]
    page.select_option("#by-state", "failed")
    assert len(names(page)) == 1
    page.click("#clear")
    page.click("#totals button:has-text('with problems')")
    assert len(names(page)) == 3
    for name in ("family", "kind"):
        assert page.locator(f"#by-{name} option").count() >= 2


def test_sorting(library: Path, show: Callable[..., Any]) -> None:
    page = show(library)
    page.select_option("#by-dialect", "diffusers")
    page.fill("#filter", "ranks/")
    by_rank = page.locator("#table thead th.rank")
    ascending = [f"r{n}.safetensors" for n in range(1, 9)]
    by_rank.locator("button").click()
    assert (names(page), by_rank.get_attribute("aria-sort")) == (ascending[::-1], "descending")
    by_rank.locator("button").click()
    assert (names(page), by_rank.get_attribute("aria-sort")) == (ascending, "ascending")
    by_rank.locator("button").click()
    assert by_rank.get_attribute("aria-sort") == "none"
    page.click("#clear")
    page.click("#table thead th.norm button")
    norms = [float(t) for t in page.locator("#table tbody td.norm").all_inner_texts() if t != DASH]
    assert len(norms) >= 15 and norms == sorted(norms, reverse=True)
    # What has no norm comes last in both directions.
    assert page.locator("#table tbody td.norm").last.inner_text() == DASH
    page.click("#table thead th.norm button")
    assert page.locator("#table tbody td.norm").last.inner_text() == DASH


def test_keys(library: Path, show: Callable[..., Any]) -> None:
    page = show(library)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type("ranks/")
    page.keyboard.press("ArrowDown")
    assert "r1.safetensors" in focused(page)
    for key, name in [("ArrowDown", "r2"), ("ArrowDown", "r3"), ("ArrowUp", "r2"), ("End", "r8"), ("Home", "r1")]:
        page.keyboard.press(key)
        assert f"{name}.safetensors" in focused(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#dialog[open] h2").inner_text() == "r2.safetensors"
    page.keyboard.press("ArrowRight")
    assert page.locator("#dialog h2").inner_text() == "r3.safetensors"
    page.keyboard.press("Escape")
    assert page.locator("#dialog[open]").count() == 0
    assert "r3.safetensors" in focused(page)
    # Of all rows one is in the order of tabs.
    assert page.locator("#table tbody [tabindex='0']").count() == 1
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.closest('thead') !== null")


def test_one_file(library: Path, show: Callable[..., Any]) -> None:
    page = show(library)
    page.click("button.open:has-text('near.safetensors')")
    body = page.locator("#dialog .body")
    text = body.inner_text()
    assert "nearly the same" in text and "cosine 0.99" in text and "lorafmt diff " in text
    for title in ("Norm by block", "Rank", "Largest modules", "Who loads it"):
        assert body.locator(f"h3:text-is('{title}')").count() == 1
    assert body.locator(".chart svg").count() == 3
    assert body.locator(".chart rect.column").count() == 2
    body.locator("summary:text-is('Numbers')").click()
    assert "transformer_blocks.0" in body.locator("table", has_text="Block").first.inner_text()
    body.locator("button.link", has_text="copy.safetensors").click()
    assert page.locator("#dialog h2").inner_text() == "copy.safetensors"
    assert "the same bytes" in body.inner_text()
    # The address of a file opens it.
    assert page.evaluate("location.hash").startswith("#file-")
    again = show(library, address=page.evaluate("location.hash"))
    assert again.locator("#dialog[open] h2").inner_text() == "copy.safetensors"


def test_commands_can_be_copied(library: Path, show: Callable[..., Any]) -> None:
    page = show(library)
    page.click("button.open:has-text('unknown.safetensors')")
    notice = page.locator(".notice", has_text="unknown-key")
    assert "--unknown drop" in notice.locator(".command code").inner_text()
    notice.locator(".copy").click()
    # `Copied`, or `Selected` where a page may not copy; the word goes after a while.
    notice.locator(".copy", has_text="ed").wait_for(timeout=1400)


def test_hostile_names_do_no_harm(library: Path, show: Callable[..., Any]) -> None:
    source = library.read_text()
    # What the page brings itself, and nothing else.
    assert source.lower().count("<script") == 2 and source.lower().count("</script>") == 2
    assert "<img" not in source.lower()
    page = show(library)
    assert sum(HOSTILE in name for name in names(page)) == 2
    for at in range(page.locator("button.open", has_text="onerror").count()):
        page.locator("button.open", has_text="onerror").nth(at).click()
        assert HOSTILE in page.locator("#dialog h2").inner_text()
        page.keyboard.press("Escape")
    page.fill("#filter", CLOSING)
    page.locator("button.open").first.click()
    text = page.locator("#dialog").inner_text()
    assert CLOSING in text and "\\u{202e}" in text and "\u202e" not in text
    assert page.locator("img, iframe, object, embed").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("window.harmed") is None


def test_the_policy_forbids_what_is_not_the_page(library: Path, browser: Any, tmp_path: Path) -> None:
    """If text became markup after all, its scripts and pictures would still not run, and nobody would be asked."""
    head, data, tail = data_of(library)
    path = tmp_path / "page.html"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        smuggled = f"<script>window.harmed=1</script><img src='{address}' onerror='window.harmed=1'>"
        text = json.dumps(data).replace("<", "\\u003c")
        path.write_text(head.replace("</main>", smuggled + "</main>") + text + tail)
        page = browser.new_page()
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text))
        page.goto(path.as_uri())
        page.evaluate(f"fetch('{address}').catch(() => null)")
        assert page.locator("main img").count() == 1 and page.evaluate("window.harmed") is None
        assert len(refused) >= 3 and all("Content Security Policy" in text for text in refused), refused
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()
        page.close()


def test_light_and_dark(library: Path, show: Callable[..., Any]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = show(library, "light"), show(library, "dark")
    brightness = [page.evaluate(f"{paper}.match(/\\d+/g).slice(0, 3).map(Number)") for page in (light, dark)]
    assert min(brightness[0]) > 230 and max(brightness[1]) < 40
    light.click("#theme")
    assert light.evaluate(f"{paper}.match(/\\d+/g).slice(0, 3).map(Number)") == brightness[1]
    light.reload()
    assert light.evaluate("document.documentElement.dataset.theme") == "dark"
    light.click("#theme")
    assert light.evaluate("document.documentElement.dataset.theme") == "light"


CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const out = [];
  for (const node of document.querySelectorAll("main *, .top *, dialog *")) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
    if (!own || node.closest(":disabled") || !node.checkVisibility() || node.namespaceURI.endsWith("svg")) continue;
    const [x, y] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))];
    const contrast = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    if (contrast < 4.5) out.push(`${node.tagName}.${node.className} ${node.textContent.slice(0, 30)} ${contrast}`);
  }
  return out;
}"""


UNNAMED = """() => {
  const named = (n) => n.innerText || n.getAttribute("aria-label") || n.closest("label") || n.querySelector("caption");
  const all = [...document.querySelectorAll("button, input, select, section, nav, table")];
  return all.filter((n) => !named(n)).map((n) => n.outerHTML);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_controls_have_names(library: Path, show: Callable[..., Any], scheme: str) -> None:
    page = show(library, scheme)
    assert page.evaluate(CONTRAST) == []
    page.click("button.open:has-text('unknown.safetensors')")
    assert page.evaluate(CONTRAST) == []
    page.keyboard.press("Escape")
    assert page.evaluate(UNNAMED) == []


@pytest.mark.parametrize("width", [360, 720, 1200])
def test_nothing_is_wider_than_the_window(library: Path, show: Callable[..., Any], width: int) -> None:
    page = show(library, width=width)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    page.click("button.open:has-text('near.safetensors')")
    assert not page.evaluate("document.querySelector('dialog').scrollWidth > innerWidth")
    assert page.locator("#dialog .chart svg").count() == 3


def test_a_thousand_files(library: Path, show: Callable[..., Any], tmp_path: Path) -> None:
    head, data, tail = data_of(library)
    whole = [f for f in data["files"] if f["adapter"]]
    data["files"] = [{**whole[i % len(whole)], "path": f"all/{i:04}.safetensors", "near": []} for i in range(1000)]
    data["groups"], data["totals"]["files"] = [], 1000
    path = tmp_path / "page.html"
    path.write_text(head + json.dumps(data).replace("<", "\\u003c") + tail)
    page = show(path)
    assert len(names(page)) == 100
    # From the first byte to a table that can be used; a slow machine takes a tenth of that.
    spent = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert spent < 5000
    page.locator("button.open").first.focus()
    page.keyboard.press("End")
    assert "0999.safetensors" in focused(page)
    assert page.locator("#pager .dim").inner_text() == f"901{DASH}1,000 of 1,000"
    page.keyboard.press("Home")
    page.click("#pager button:text-is('Next')")
    assert names(page)[0] == "0100.safetensors"
    page.keyboard.press("/")
    page.keyboard.type("0777")
    assert names(page) == ["0777.safetensors"]
    assert page.locator("#pager").is_hidden()


def test_a_single_file_is_shown_at_once(show: Callable[..., Any], tmp_path: Path) -> None:
    lora(tmp_path / "style.safetensors", MODULES)
    lorafmt.report(tmp_path / "style.safetensors", tmp_path / "page.html")
    page = show(tmp_path / "page.html")
    assert page.locator("h1").inner_text() == "style.safetensors"
    assert page.locator("#files").is_hidden() and page.locator("#single .chart svg").count() == 3


def test_headers_only(show: Callable[..., Any], tmp_path: Path) -> None:
    paths = [lora(tmp_path / f"{n}.safetensors", MODULES, seed=n) for n in range(2)]
    lorafmt.report(paths, tmp_path / "page.html", weights=False)
    page = show(tmp_path / "page.html")
    assert page.locator("#table thead th.norm").count() == 0
    assert "headers only" in page.locator("#made").inner_text()
    page.locator("button.open").first.click()
    assert "Norm by block" not in page.locator("#dialog").inner_text()
