"""Every page that `make site` made, as a reader meets it: on a phone and on a desk, with no network
but the site itself."""
import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
DOCS = ["glossary", "claims", "use", "certificate", "batches", "bench", "language", "peers",
        "results"]
PAGES = ["index", *NOTEBOOKS, *DOCS]

# What a reader sees of a page, read off in one go. Text in <code> and <pre> is meant as it stands;
# a box that scrolls may hold more than it shows.
LOOK = """() => {
    const box = e => {
        const {width, height} = e.getBoundingClientRect();
        return {width, height};
    };
    const picture = e => (
        {src: e.getAttribute("src"), alt: e.alt, natural: e.naturalWidth, ...box(e)});
    const prose = document.querySelector("main").cloneNode(true);
    prose.querySelectorAll("pre, code, math").forEach(e => e.remove());
    return {
        width: document.documentElement.scrollWidth,
        prose: prose.textContent,
        maths: [...document.querySelectorAll("math")].map(box),
        pictures: [...document.images].map(picture),
        links: [...document.links].map(e => e.href),
        way: Object.fromEntries(
            [...document.querySelectorAll("nav a")].map(e => [e.rel, e.getAttribute("href")])),
        description: document.querySelector("meta[name=description]").content,
    };
}"""


@pytest.fixture(scope="module")
def origin():
    assert SITE.is_dir(), "make site comes first"
    server = ThreadingHTTPServer(("127.0.0.1", 0),
                                 partial(SimpleHTTPRequestHandler, directory=SITE))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module", params=[(name, width) for name in PAGES for width in (390, 1280)],
                ids=lambda param: f"{param[0]}-{param[1]}")
def seen(browser, origin, request):
    """A page after it was loaded, with folded parts open; its picture goes to build/screenshots."""
    name, width = request.param
    page, requests, wrong = browser.new_page(viewport={"width": width, "height": 900}), [], []
    page.on("request", lambda sent: requests.append(sent.url))
    page.on("requestfailed", lambda sent: wrong.append(sent.url))
    page.on("response", lambda got: wrong.append(f"{got.status} {got.url}") if got.status >= 400
            else None)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{origin}/{name}.html")
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    page.screenshot(path=ROOT / "build" / "screenshots" / f"{name}-{width}.png", full_page=True)
    yield SimpleNamespace(name=name, viewport=width, requests=requests, wrong=wrong, page=page,
                          title=page.title(), **page.evaluate(LOOK))
    page.close()


def cells(name, kind):
    if name not in NOTEBOOKS:
        return ""
    return "\n".join(cell.source for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb",
                                                           4).cells if cell.cell_type == kind)


def test_no_page_has_a_script_or_asks_elsewhere():
    """The API reference's too, which are pdoc's."""
    pages = {path: path.read_text(encoding="utf-8") for path in SITE.rglob("*.html")}
    assert SITE / "api" / "mythos_core" / "proof.html" in pages
    asking = re.compile(r"<script|src=\"http|@import|url\(http")
    assert [path for path, page in pages.items() if asking.search(page)] == []


def test_every_page_of_docs_is_on_the_site():
    assert sorted(DOCS) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def test_it_loads_and_nothing_is_wrong(seen):
    assert seen.wrong == []


def test_no_request_leaves_the_site(seen, origin):
    assert seen.requests and all(url.startswith((origin, "data:")) for url in seen.requests)


def test_it_is_as_wide_as_the_screen(seen):
    assert seen.width == seen.viewport


def test_pictures_are_there_with_their_words(seen):
    for picture in seen.pictures:
        assert picture["natural"] > 0 and picture["width"] > 200 and picture[
            "height"] > 100, picture
        assert len(picture["alt"].split()) > 4 and "No description" not in picture["alt"], picture
    shown = {picture["src"]: picture["alt"] for picture in seen.pictures}
    for figure in re.findall(r'figures\.save\(\s*\w+,\s*"(\w+)"', cells(seen.name, "code")):
        about = (ROOT / "figures" / f"{figure}.json").read_text(encoding="utf-8")
        assert shown[f"figures/{figure}.png"] == json.loads(about)["alt"]


def test_maths_is_drawn(seen):
    assert not re.search(r"\$[^\s$][^$]*\$|\\[a-zA-Z]{2,}", seen.prose)
    text = re.sub(r"```.*?```|`[^`]*`", "", cells(seen.name, "markdown"), flags=re.S)
    assert len(seen.maths) == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.S))
    assert all(box["width"] > 0 and box["height"] > 0 for box in seen.maths)


def test_links_between_pages_lead_somewhere(seen, origin):
    for url in {url for url in seen.links if url.startswith(origin)}:
        address, _, fragment = url.partition("#")
        page = seen.page.request.get(address)
        assert page.ok and (not fragment or f'id="{fragment}"' in page.text()), url


def test_the_way_through_the_course(seen):
    here = PAGES.index(seen.name)
    neighbours = {"prev": PAGES[here - 1] if here else None,
                  "next": PAGES[here + 1] if here + 1 < len(PAGES) else None}
    assert seen.way == {rel: f"{name}.html" for rel, name in neighbours.items() if name}


def test_what_a_search_engine_shows(seen):
    assert seen.title.startswith(seen.page.text_content("h1").removesuffix("¶"))
    assert 10 < len(seen.description.split()) < 90 and not re.search(r"[$*`\\]", seen.description)
