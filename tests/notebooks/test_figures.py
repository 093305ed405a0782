import json
import re
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.testing.compare import compare_images

from mythos_core import OpenMythos, figures
from mythos_core.model.config import parity_config
from mythos_core.tasks.machines import machine

COMMITTED = Path(__file__).parents[2] / "figures"


def test_a_figure_is_saved_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("MYTHOS_FIGURES", str(tmp_path / "made"))
    figures.use_house_style()
    fig, ax = plt.subplots()
    figures.loop_by_position(ax, torch.rand(3, 5), "a title", "share")
    figures.save(fig, "name", "what it shows", a=torch.tensor([1.23456789, 2.0]),
                 b={"c": np.int64(3)}, d=[0.1 + 0.2])
    assert (tmp_path / "made" / "name.png").stat().st_size > 1000
    content = json.loads((tmp_path / "made" / "name.json").read_text(encoding="utf-8"))
    assert content == {"alt": "what it shows", "a": [1.23457, 2.0], "b": {"c": 3}, "d": [0.3]}


def test_a_reader_has_controls_and_a_batch_one_picture(monkeypatch, capsys):
    drawn, shown, controls, before = [], [], {}, plt.get_fignums()

    def draw(loop, task, text):
        drawn.append((loop, task, text))
        if text == "abc":
            raise ValueError("text 'abc': must be bits")
        return plt.figure(), f"loop {loop}"

    values = {"loop": (3, 1, 9), "task": ["parity", "Z5"], "text": "0110"}
    monkeypatch.setattr("IPython.display.display", lambda fig, metadata: shown.append(metadata))
    monkeypatch.setattr("ipywidgets.interact", lambda show, **kinds: controls.update(
        kinds, show=show))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    figures.explore(draw, **values)
    assert drawn == [(3, "parity", "0110")] and not controls
    assert plt.get_fignums() == before
    assert shown == [{"image/png": {"alt": "loop 3"}}]
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    figures.explore(draw, **values)
    assert len(drawn) == 1                                   # by interact, which is not here
    slider, menu, field = (controls[name] for name in values)
    assert (slider.value, slider.min, slider.max) == (3, 1, 9)
    assert (menu.value, menu.options, field.value) == ("parity", ("parity", "Z5"), "0110")
    controls["show"](loop=4, task="Z5", text="abc")
    assert capsys.readouterr().out == "text 'abc': must be bits\n" and len(shown) == 1


def test_the_same_figure_is_the_same_file(tmp_path, monkeypatch):
    pictures = []
    for name in ("a", "b"):
        monkeypatch.setenv("MYTHOS_FIGURES", str(tmp_path / name))
        fig, ax = plt.subplots()
        ax.plot([1, 2])
        figures.save(fig, "x", "alt")
        pictures.append((tmp_path / name / "x.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_default_folder_is_the_projects_build(monkeypatch, tmp_path):
    monkeypatch.delenv("MYTHOS_FIGURES", raising=False)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert figures.folder() == tmp_path / "build" / "figures"


@pytest.fixture
def architecture():
    with plt.rc_context():
        yield runpy.run_path(str(COMMITTED / "architecture.py"))
    plt.close("all")


def test_the_committed_diagram_is_the_one_that_the_script_draws(
        architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("MYTHOS_FIGURES", str(tmp_path))
    architecture["main"]()
    about, about_drawn = ((folder / "architecture.json").read_text(encoding="utf-8")
                          for folder in (COMMITTED, tmp_path))
    assert about == about_drawn
    committed, drawn = ((folder / "architecture.svg").read_text(encoding="utf-8")
                        for folder in (COMMITTED, tmp_path))
    # another draws the same letters by other strokes and pixels
    if f"Matplotlib v{matplotlib.__version__}," in committed:
        assert re.findall(r"<(path|use) ", drawn) == re.findall(r"<(path|use) ", committed)
        assert (compare_images(str(COMMITTED / "architecture.png"),
                               str(tmp_path / "architecture.png"), tol=2, in_decorator=True)
                is None)


def test_the_diagram_follows_the_model(architecture):
    def drawn(model):
        ax = plt.figure().add_subplot()
        architecture["draw"](ax, model)
        return ({text.get_text() for text in ax.texts},
                sum(patch.get_linestyle() not in ("-", "solid") for patch in ax.patches))

    shipped, off = drawn(OpenMythos.from_pretrained("parity-extrapolating"))
    other, other_off = drawn(OpenMythos(parity_config(prelude_layers=2, n_experts=3, carry=False,
                                                      halting="none")))
    assert ({"1 block, run once", "4 tokens, 64 channels",
             "a token passes 2 of 4 experts, and 1 shared"} <= shipped)
    assert ({"2 blocks, run once", "64 tokens, 64 channels",
             "a token passes 2 of 3 experts, and 1 shared"} <= other)
    assert off == 7             # loop embedding, token shift, MLA, LoRA, A h, B e, halting head
    assert other_off == 5       # token shift, MLA, A h, B e, halting


def test_a_machine_is_drawn_with_its_letters_and_answers():
    fig = figures.draw_machine(machine("regex:(ab)*c"))
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert {"0", "1", "2", "a / 1", "b / 1", "b / 1\nc / 2", "a, b, c / 1"} <= set(texts)
    plt.close(fig)
    fig = figures.draw_machine(machine("decimal-addition"))
    assert any("..." in text.get_text() for text in fig.axes[0].texts)
    plt.close(fig)
    fig = figures.draw_machine(machine(r"regex:(\$_\$)*"))          # $_$ is no formula
    fig.canvas.draw()
    shown = [*fig.axes[0].texts, fig.axes[0].title]
    assert r"\$, _ / 1" in {text.get_text() for text in shown}
    assert not any(is_math_text(text.get_text()) for text in shown)
    plt.close(fig)


def test_a_machine_is_drawn_with_names_at_places_and_with_a_way_through_it():
    places = [(0.0, 0.5), (-1.0, 0.0), (1.0, 0.0)]
    fig = figures.draw_machine(machine("regex:(ab)*c"), names=["even", "odd", "lost"],
                               places=places, way=[0, 1, 0, 2])
    (ax,) = fig.axes
    at = {text.get_text(): text.get_position() for text in ax.texts}
    assert [at[name] for name in ("even", "odd", "lost")] == places
    assert np.array(ax.lines[0].get_data()).T.tolist() == [[*places[s]] for s in (0, 1, 0, 2)]
    assert ax.collections[0].get_offsets().tolist() == [[*places[2]]]
    plt.close(fig)


def test_a_table_of_shares_says_the_range_over_seeds():
    _, ax = plt.subplots()
    figures.table_of_shares(ax, {"GRU": {"S3": [1.0, 0.5], "Z5": [1.0, 1.0]}, "none": {"Z5": [0]}},
                            "whole")
    assert [text.get_text() for text in ax.texts] == ["50-100", "100", "0"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["S3", "Z5"]
    shown = ax.images[0].get_array()
    assert shown.tolist()[0] == [0.75, 1.0] and shown.mask.tolist() == [[False] * 2, [True, False]]
    plt.close("all")
