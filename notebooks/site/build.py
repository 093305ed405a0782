"""The notebooks and the README's first screen as a static site: python notebooks/site/build.py OUT.

The pages have no script and ask no other machine for anything: TeX becomes MathML here, pictures are files beside the pages.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
from math_core import LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from traitlets.config import Config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'Repository = "(.*?)"', PROJECT).group(1)


class Renderer(IPythonRenderer):
    """Markdown whose TeX becomes MathML (an error if it is no TeX), and whose pictures from elsewhere, the badges, become words."""
    tex = LatexToMathML()

    def inline_math(self, body):
        return self.tex.convert_with_local_state(body, displaystyle=False)

    def block_math(self, body):
        return f'<span class="formula">{self.tex.convert_with_local_state(body, displaystyle=True)}</span>'

    def image(self, text, url, title=None):
        return text if "://" in url else super().image(text, url, title)


def markdown2html(source):
    """Links between notebooks lead from page to page, figures lie beside the pages, and a table's cells have a box that style.css gives a width."""
    html = MarkdownWithMath(renderer=Renderer(escape=False)).render(source)
    html = re.sub(r'(?<=href=")(?:\.\./)?(?:notebooks/)?(\d\d_\w+)\.ipynb', r"\1.html", html)
    html = re.sub(r'(?<=src=")\.\./figures/', "figures/", html)
    return re.sub(r"<(t[hd])\b([^>]*)>(.*?)</\1>", r"<\1\2><div>\3</div></\1>", html, flags=re.S)


def name_pictures(notebook):
    """Give every picture without words the alternative text of the figure that is saved next, and the last one before the saving its file."""
    pictures = []
    for cell in notebook.cells:
        pictures += [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {}) and "image/png" not in output.metadata]
        if pictures and (saved := re.search(r'figures\.save\(\s*\w+,\s*"(\w+)"', cell.source)):
            for picture in pictures:
                about = (ROOT / "figures" / f"{saved[1]}.json").read_text(encoding="utf-8")
                picture.metadata["image/png"] = {"alt": json.loads(about)["alt"]}
            pictures[-1].metadata["filenames"] = {"image/png": f"figures/{saved[1]}.png"}
            pictures = []


def front():
    """The README up to its second heading, and its table of notebooks, as a notebook of one cell."""
    screen = README[:README.index("\n## ")]
    table = re.search(r"^## The notebooks$.*?^\|.*?^$", README, re.M | re.S)[0]
    links = "\n".join(re.findall(r"^\[\w+\]: .*$", README, re.M))
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"{screen}\n{table}\n{links}")])


def describe(name, notebook):
    """A page's title and its description for search engines: the question, or the README's opening."""
    text = notebook.cells[0].source
    opening = re.search(r"\*\*Question\.\*\*(.*?)\n\n", text, re.S) or re.search(r"\n\n(.*?)\n\n", text, re.S)
    return {"name": name, "title": re.match(r"# (.*)", text)[1], "description": " ".join(re.sub(r"[$*`]", "", opening[1]).split())}


def main(out):
    notebooks = {"index": front()} | {path.stem: nbformat.read(path, 4) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
    pages = [describe(name, notebook) for name, notebook in notebooks.items()]
    exporter = HTMLExporter(template_name="template", extra_template_basedirs=[str(HERE)], filters={"markdown2html": markdown2html},
                            preprocessors=[CoalesceStreamsPreprocessor], exclude_input_prompt=True, exclude_output_prompt=True,
                            config=Config(NbConvertBase={"display_data_priority": ["text/html", "image/png", "text/plain"]}))   # a widget needs a kernel
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "figures", out / "figures", ignore=shutil.ignore_patterns("*.json", "*.py", "__pycache__"))
    shutil.copy(HERE / "style.css", out)
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None]):
        notebook = notebooks[page["name"]]
        name_pictures(notebook)
        html, _ = exporter.from_notebook_node(notebook, {"site": pages[0], "page": page, "before": before, "after": after, "repository": REPOSITORY})
        (out / f"{page['name']}.html").write_text(html, encoding="utf-8")
    print(f"{len(pages)} pages in {out}, {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 2**20:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
