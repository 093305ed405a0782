"""The README, the notebooks, docs/ and an API reference as a static site.

    python notebooks/site/build.py OUT

The pages have no script and ask no other machine for anything: TeX becomes MathML here, pictures
are files beside them.
"""
import argparse
import json
import pkgutil
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pdoc
from jinja2 import pass_context
from math_core import LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from traitlets.config import Config

import mythos_core

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'Repository = "(.*?)"', PROJECT)[1]
DOCS = ("glossary", "claims", "use", "certificate", "batches", "bench", "language", "peers",
        "results")
#: What is shown of an output, the first that it has; no widget: it needs a kernel.
KINDS = ["text/html", "image/png", "image/svg+xml", "text/plain"]
SOURCES = [ROOT / "README.md", *sorted(ROOT.glob("notebooks/*.ipynb")),
           *(ROOT / "docs" / f"{name}.md" for name in DOCS)]
PAGES = {path.name: "index" if path.stem == "README" else path.stem for path in SOURCES}
#: In the folder of a site; without it nothing is removed there.
MARK = ".made-by-site-build"


class Renderer(IPythonRenderer):
    """Markdown whose TeX becomes MathML (an error if it is no TeX), and whose pictures from
    elsewhere, the badges, are drawn here."""
    tex = LatexToMathML()

    def inline_math(self, body):
        return self.tex.convert_with_local_state(body, displaystyle=False)

    def block_math(self, body):
        formula = self.tex.convert_with_local_state(body, displaystyle=True)
        return f'<span class="formula">{formula}</span>'

    def image(self, text, url, title=None):
        if "://" in url:
            return f'<span class="badge">{text}</span>'
        return super().image(text, re.sub(r"^\.\./", "", url), title)

    def link(self, text, url, title=None):
        return super().link(text, on_the_site(url), title)

    def heading(self, text, level, **attrs):
        """Headings are addressed as on the code host: in lower case, without punctuation."""
        html = super().heading(text, level, **attrs)
        return re.sub(r'(?<=id=")[^"]+|(?<=href="#)[^"]+', lambda name: anchor(name[0]), html,
                      count=2)


def anchor(heading):
    """What a heading is addressed by."""
    return re.sub(r"[^\w-]", "", unquote(heading).replace(" ", "-").lower())


def on_the_site(url):
    """Where a link leads: from page to page, and to the repository for a file that is no page."""
    path, _, anchor = url.partition("#")
    if not path or "://" in path:
        return url
    if page := PAGES.get(Path(path).name):
        return f"{page}.html#{anchor}" if anchor else f"{page}.html"
    return f"{REPOSITORY}/blob/main/{path.removeprefix('../')}"


@pass_context
def markdown2html(context, source):
    """A cell's pictures that are attached to it lie in the page. A table's cells have a box that
    style.css gives a width."""
    attached = context.get("cell", {}).get("attachments")
    html = MarkdownWithMath(renderer=Renderer(escape=False, attachments=attached)).render(source)
    return re.sub(r"<(t[hd])\b([^>]*)>(.*?)</\1>", r"<\1\2><div>\3</div></\1>", html, flags=re.S)


def picture(output):
    """The kind of the picture that an output is shown as; None if it is none."""
    return next((kind for kind in KINDS if kind in output.get("data", {})
                 and kind.startswith("image/")), None)


def name_pictures(notebook):
    """Give every picture without words the alternative text of the figure that is saved next, and
    the last one before the saving its file."""
    pictures = []
    for cell in notebook.cells:
        pictures += [output for output in cell.get("outputs", [])
                     if (kind := picture(output)) and kind not in output.metadata]
        if pictures and (saved := re.search(r'figures\.save\(\s*\w+,\s*"(\w+)"', cell.source)):
            numbers = (ROOT / "figures" / f"{saved[1]}.json").read_text(encoding="utf-8")
            for output in pictures:
                output.metadata[picture(output)] = {"alt": json.loads(numbers)["alt"]}
            pictures[-1].metadata["filenames"] = {"image/png": f"figures/{saved[1]}.png"}
            pictures = []


def read(path):
    """A notebook, or a page of Markdown as a notebook of one cell."""
    if path.suffix == ".ipynb":
        return nbformat.read(path, 4)
    cell = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))
    return nbformat.v4.new_notebook(cells=[cell])


def words(text):
    """Markdown without its signs, and of a link what it says."""
    text = re.sub(r"\[(.*?)\](\(.*?\)|\[.*?\])", r"\1", text)
    return " ".join(re.sub(r"[$*`]", "", text).split())


def describe(name, notebook):
    """A page's title, its description for search engines (the question, or the opening), and its
    contents: the addresses and the titles of its sections."""
    text = notebook.cells[0].source
    opening = (re.search(r"\*\*Question\.\*\*(.*?)\n\n", text, re.S)
               or re.search(r"\n\n(.*?)\n\n", text, re.S))
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.*)", re.sub(r"^```.*?^```", "", prose, flags=re.M | re.S), re.M)
    return {"name": name, "title": re.match(r"# (.*)", text)[1], "description": words(opening[1]),
            "contents": [(anchor(heading), words(heading)) for heading in headings]}


def clear(out):
    """Make the folder empty but for MARK; ValueError for one that has anything in it and is no
    earlier site."""
    if (out / MARK).is_file():
        shutil.rmtree(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT {str(out)!r}: must be a new or empty folder, or one that an earlier "
                         f"build made, which has a file {MARK}")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def exporter():
    """What makes a page of a notebook."""
    return HTMLExporter(template_name="template", extra_template_basedirs=[str(HERE)],
                        filters={"markdown2html": markdown2html},
                        preprocessors=[CoalesceStreamsPreprocessor],
                        exclude_input_prompt=True, exclude_output_prompt=True,
                        config=Config(NbConvertBase={"display_data_priority": KINDS}))


def build(out):
    """Write the site to a folder; ValueError if there is something else in it."""
    clear(out)
    notebooks = {PAGES[path.name]: read(path) for path in SOURCES}
    pages = [describe(name, notebook) for name, notebook in notebooks.items()]
    write = exporter()
    shutil.copytree(ROOT / "figures", out / "figures",
                    ignore=shutil.ignore_patterns("*.json", "*.py", "__pycache__"))
    shutil.copy(HERE / "style.css", out)
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None]):
        notebook = notebooks[page["name"]]
        name_pictures(notebook)
        html, _ = write.from_notebook_node(notebook, {"site": pages[0], "page": page,
                                                      "before": before, "after": after,
                                                      "repository": REPOSITORY})
        (out / f"{page['name']}.html").write_text(html, encoding="utf-8")
    pdoc.render.configure(docformat="google", search=False, show_source=False)
    for name in mythos_core.__all__:   # pdoc sees only what the package has imported
        getattr(mythos_core, name)
    modules = [module.name for module in pkgutil.iter_modules(mythos_core.__path__, "mythos_core.")
               if not module.name.endswith("__main__")]          # the command line: it has --help
    pdoc.pdoc("mythos_core", *modules, output_directory=out / "api")
    print(f"{len(pages)} pages in {out}, "
          f"{sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 2**20:.1f} "
          "MB")


def main():
    parser = argparse.ArgumentParser(description="Build the site. What an earlier build left in "
                                                 "OUT is removed first.")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder, or a site's")
    try:
        build(parser.parse_args().out.resolve())
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
