"""One set of packages, said in five files; and a core that stays thin."""
import ast
import importlib
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import mythos_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = ["*", ".ci/*", ".github/**/*", "docs/*", "figures/*.py", "mythos_core/*",
         "mythos_core/*/*.py", "notebooks/*", "notebooks/site/*", "tests/*.py"]
#: A word of a command: an option, something between quotes, or letters up to a string's end.
WORD = r"""-\S+|"[^"`]+"|'[^'`]+'|[\w.\[\]=<>+:/@~$(){},-]+"""


def lines(file):
    return [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
            if line.strip() and not line.lstrip().startswith("#")]


def name(requirement):
    return re.split(r"[><=]", requirement)[0].lower().replace("_", "-")


def test_environment_yml_has_what_requirements_txt_has():
    listed = [line.removeprefix("- ") for line in lines("environment.yml")]
    after = listed[listed.index("pip:") + 1:]
    assert [line for line in after if line != "-e ."] == lines("requirements.txt")


def test_every_requirement_is_pinned_above_its_floor():
    pinned = {name(line): line.split("==")[1] for line in lines("constraints.txt")}
    for requirement in lines("requirements.txt") + lines("requirements-site.txt"):
        floor = [int(n) for n in requirement.split(">=")[1].split(".")]
        assert [int(n) for n in re.findall(r"\d+", pinned[name(requirement)])] >= floor, requirement


def test_the_package_and_its_extras_ask_for_what_requirements_txt_has():
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["cluster"], *extras["dev"]]
    assert sorted(asked) == sorted(lines("requirements.txt"))
    assert extras["site"] == lines("requirements-site.txt")
    assert PROJECT["requires-python"] == ">=3.10"


def text_of(path):
    if path.suffix == ".ipynb":
        return "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    return path.read_text(encoding="utf-8", errors="ignore")


def installed(text):
    """What the commands of pip in a text install: the words that are no options."""
    for command in re.findall(rf"pip install((?: +(?:{WORD}))+)", text):
        yield from (word.strip("\"'") for word in re.findall(WORD, command) if word[0] != "-")


def known(word, requirements):
    """Our code by its address or its folder, a variable, a file that is here, or a requirement."""
    address = rf"({PROJECT['name']}(\[\w+\])? @ )?git\+{re.escape(PROJECT['urls']['Repository'])}"
    ours = re.fullmatch(rf"{address}|\.(\[[\w,]+\])?", word)
    return bool(ours or set("${") & set(word) or (ROOT / word).is_file()
                or re.split(r"[><=]", word)[0] in requirements)


def test_nobody_is_told_to_install_a_package_that_is_not_ours():
    listed = lines("requirements.txt") + lines("requirements-site.txt")
    requirements = {"pip", "open-mythos", "x-transformers", *map(name, listed)}
    paths = {path for pattern in TEXTS for path in ROOT.glob(pattern) if path.is_file()}
    told = [(path.relative_to(ROOT).as_posix(), word)
            for path in sorted(paths - {Path(__file__)}) for word in installed(text_of(path))]
    assert len({path for path, _ in told}) > 9                       # the notebooks, at least
    assert [(path, word) for path, word in told if not known(word, requirements)] == []


@pytest.mark.parametrize("command", [
    "pip install mythos-core[cluster]", "%pip install -q recurrent-depth-tutorial",
    "pip install 'git+https://github.com/kyegomez/OpenMythos'"])
def test_a_name_that_is_not_ours_is_seen(command):
    assert [known(word, {"torch"}) for word in installed(command)] == [False]


def test_the_version_is_said_once():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", mythos_core.__version__)
    assert f"## [{mythos_core.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("public", mythos_core.__all__)
def test_a_public_name_is_there_and_is_its_room_s(public):
    room = importlib.import_module(f"mythos_core.{mythos_core._ROOMS[public]}")
    assert getattr(mythos_core, public) is getattr(room, public)
    assert public in dir(mythos_core) and public in room.__all__


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mythos_core.nothing  # noqa: B018


@pytest.mark.parametrize("room", sorted(path.parent.name for path in
                                        (ROOT / "mythos_core").glob("*/__init__.py")))
def test_a_room_says_what_is_in_it(room):
    """Its README names each of its modules, and itself is named in CONTRIBUTING.md."""
    folder = ROOT / "mythos_core" / room
    page = (folder / "README.md").read_text(encoding="utf-8")
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert {module for module in modules if f"`{module}`" not in page} == set()
    assert f"`{room}`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def load_yaml(file):
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_package():
    """It has what its format asks for, and says what the package says. cffconvert itself can't be
    here: it needs an older jsonschema than Jupyter."""
    citation = load_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert citation["authors"][0]["name"] and citation["license"] == PROJECT["license"]
    assert citation["version"] == mythos_core.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert f"# {citation['title']}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n\nCopyright")


def test_the_hooks_are_of_exact_versions_from_the_index_and_of_the_pinned_ruff():
    """A package index is all that they need, as it is all that the make targets need."""
    (local,) = load_yaml(".pre-commit-config.yaml")["repos"]
    needed = {need for hook in local["hooks"] for need in hook.get("additional_dependencies", [])}
    assert local["repo"] == "local" and all("==" in need for need in needed)
    (ruff,) = [need for need in needed if name(need) == "ruff"]
    assert ruff in lines("constraints.txt")


@pytest.mark.parametrize("form", ["bug", "claim"])
def test_an_issue_form_asks_for_something(form):
    fields = load_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")["body"]
    assert fields and all(field["validations"]["required"] for field in fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_the_core_stays_thin():
    functions = []
    for file in (ROOT / "mythos_core").rglob("*.py"):
        code = file.read_text(encoding="utf-8")
        tree, text = ast.parse(code), code.splitlines()
        docs = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef,
                                 ast.FunctionDef)) and ast.get_docstring(node):
                docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        counted = ({i for i, line in enumerate(text, 1) if line.strip()
                    and not line.strip().startswith("#")} - docs)
        functions += [len(counted & set(range(n.lineno, n.end_lineno + 1)))
                      for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert statistics.median(functions) <= 12 and statistics.quantiles(functions, n=10)[-1] <= 32
