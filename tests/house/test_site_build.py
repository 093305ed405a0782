"""The builder of the site removes only what it made. What it makes, tests/browser looks at."""
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_a_page_has_its_contents(builder):
    page = builder.read(ROOT / "notebooks" / "05_depth_extrapolation.ipynb")
    contents = builder.describe("05_depth_extrapolation", page)["contents"]
    assert ("3--the-loop-that-doubles", "3 · The loop that doubles") in contents
    assert contents[-1][0] == "references"
