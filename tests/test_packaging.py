"""One set of packages, said in five files; and a core that stays thin."""
import ast
import re
import statistics
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def lines(file):
    return [line.strip() for line in (ROOT / file).read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]


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


def test_the_package_asks_for_a_part_of_requirements_txt():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*project["dependencies"], *project["optional-dependencies"]["cluster"]} <= set(lines("requirements.txt"))
    assert project["requires-python"] == ">=3.10"


def test_the_core_stays_thin():
    functions = []
    for file in (ROOT / "mythos_core").rglob("*.py"):
        tree, text = ast.parse(file.read_text()), file.read_text().splitlines()
        docs = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        counted = {i for i, line in enumerate(text, 1) if line.strip() and not line.strip().startswith("#")} - docs
        functions += [len(counted & set(range(n.lineno, n.end_lineno + 1))) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert statistics.median(functions) <= 12 and statistics.quantiles(functions, n=10)[-1] <= 32


def test_imports_run_one_way():
    order = ["provenance", "batch", "config", "layers", "cache", "attention", "moe", "halting",
             "loop", "model", "interop", "groups", "parity", "machines", "recipes", "certificate",
             "training", "probes", "study", "figures"]
    for position, module in enumerate(order):
        assert all(order.index(other) < position for other in imported(module)), module


def test_imports_of_a_batch_run_one_way_too():
    order = ["record", "grid", "notebook", "plan", "run", "cluster", "report", "__main__"]
    for position, module in enumerate(order):
        text = (ROOT / "mythos_core" / "batch" / f"{module}.py").read_text(encoding="utf-8")
        found = re.findall(r"from mythos_core\.batch\.(\w+) import", text)
        assert all(order.index(other) < position for other in found), module


def imported(module):
    """The modules of the package that a module, or those of a package in it, import from."""
    folder = ROOT / "mythos_core"
    files = [*folder.glob(f"{module}.py"), *folder.glob(f"{module}/*.py")]
    assert files, module
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return {*re.findall(r"from mythos_core\.(\w+)", text)} - {module}
