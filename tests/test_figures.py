import json

import matplotlib.pyplot as plt
import numpy as np
import torch

from mythos_core import figures


def test_a_figure_is_saved_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("MYTHOS_FIGURES", str(tmp_path / "made"))
    figures.use_house_style()
    fig, ax = plt.subplots()
    figures.loop_by_position(ax, torch.rand(3, 5), "a title", "share")
    figures.save(fig, "name", "what it shows", a=torch.tensor([1.23456789, 2.0]), b={"c": np.int64(3)}, d=[0.1 + 0.2])
    assert (tmp_path / "made" / "name.png").stat().st_size > 1000
    assert json.loads((tmp_path / "made" / "name.json").read_text()) == {"alt": "what it shows", "a": [1.23457, 2.0], "b": {"c": 3}, "d": [0.3]}


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
