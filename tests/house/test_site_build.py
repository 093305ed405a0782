"""The builder of the site removes only what it made, and shows what pages need not have. What it
makes of ours, tests/browser looks at."""
import base64
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[2]


@pytest.fixture
def builder(monkeypatch):
    """The builder; its two libraries, which only `make site` installs, are not asked for anything
    here."""
    monkeypatch.setitem(sys.modules, "pdoc", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "math_core", SimpleNamespace(LatexToMathML=object))
    file = ROOT / "notebooks" / "site" / "build.py"
    spec = importlib.util.spec_from_file_location("site_builder", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_no_build_made_is_left_as_it_is(builder, tmp_path, monkeypatch, capsys, what):
    kept = tmp_path / "mine" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work", encoding="utf-8")
    out = {"folder": kept.parent, "file": kept}[what]
    monkeypatch.setattr(sys, "argv", ["build.py", str(out)])
    with pytest.raises(SystemExit) as stop:
        builder.main()
    assert stop.value.code == 2 and f"OUT {str(out)!r}: must be" in capsys.readouterr().err
    assert kept.read_text(encoding="utf-8") == "years of work"
    assert sorted(tmp_path.rglob("*")) == [kept.parent, kept]


def test_an_option_is_no_folder(builder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option, code in (("--help", 0), ("--fast", 2)):
        monkeypatch.setattr(sys, "argv", ["build.py", option])
        with pytest.raises(SystemExit) as stop:
            builder.main()
        assert stop.value.code == code
    assert "OUT" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_what_an_earlier_build_left_is_removed(builder, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "site"):
        builder.clear(out)
        (out / "old.html").touch()
        builder.clear(out)
        assert [path.name for path in out.iterdir()] == [builder.MARK]


def page_of(builder, *cells):
    """The pictures of a page, by what they say: where each comes from."""
    builder.name_pictures(notebook := new_notebook(cells=list(cells)))
    about = {"name": "a", "title": "A", "description": "d", "contents": []}
    html, _ = builder.exporter().from_notebook_node(notebook, {"site": about, "page": about,
                                                               "repository": "r"})
    assert "<script" not in html
    pictures = re.findall(r"<img\b[^>]*>", html)
    return {re.search(r'alt="(.*?)"', one)[1]: re.search(r'src="(.*?)"', one)[1]
            for one in pictures}


def test_a_picture_that_is_attached_to_a_cell_is_on_its_page_alone(builder):
    cells = [new_markdown_cell(f"![of {i}](attachment:x.png), ![a file](../figures/y.png)",
                               attachments={"x.png": {"image/png": f"AAA{i}"}}) for i in range(2)]
    assert page_of(builder, *cells) == {"of 0": "data:image/png;base64,AAA0",
                                        "of 1": "data:image/png;base64,AAA1",
                                        "a file": "figures/y.png"}


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><path d="M0 0"/></svg>'


def test_a_drawing_is_a_picture_with_the_words_of_its_figure(builder):
    cells = [new_code_cell("draw()", outputs=[new_output("display_data", {
                 "image/svg+xml": SVG, "text/plain": "<a drawing>"})]),
             new_code_cell('figures.save(figure, "overview", numbers)')]
    ((alt, source),) = page_of(builder, *cells).items()
    numbers = (ROOT / "figures" / "overview.json").read_text(encoding="utf-8")
    assert alt == json.loads(numbers)["alt"]
    kind, _, data = source.partition(",")
    assert kind == "data:image/svg+xml;base64" and base64.b64decode(data).decode() == SVG


def test_of_a_picture_of_both_kinds_the_pixels_are_shown(builder):
    both = new_output("display_data", {"image/svg+xml": SVG, "image/png": "AAAA"},
                      metadata={"image/png": {"alt": "both"}})
    assert page_of(builder, new_code_cell("draw()", outputs=[both])) == {
        "both": "data:image/png;base64,AAAA"}


def test_a_page_has_its_contents(builder):
    page = builder.read(ROOT / "notebooks" / "05_depth_extrapolation.ipynb")
    contents = builder.describe("05_depth_extrapolation", page)["contents"]
    assert ("3--the-loop-that-doubles", "3 · The loop that doubles") in contents
    assert contents[-1][0] == "references"
