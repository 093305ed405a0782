"""One house style. A figure is saved as a picture and as the numbers behind it."""
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import torch
from matplotlib.transforms import ScaledTranslation

from mythos_core.tasks.machines import Machine

#: Okabe and Ito's colour-blind safe palette (and Tol's wine), one colour for one thing in every
#: notebook.
COLOURS = {"article": "#D55E00", "extrapolating": "#0072B2", "scan": "#882255",
           "gqa": "#E69F00", "mla": "#009E73", "reference": "#999999", "accent": "#CC79A7"}


def use_house_style():
    """Set matplotlib's defaults for this session, as house.mplstyle beside this module has them."""
    plt.style.use(Path(__file__).with_name("house.mplstyle"))


def folder() -> Path:
    """Where figures go: $MYTHOS_FIGURES, or build/figures of the project."""
    cwd = Path.cwd()
    project = cwd.parent if cwd.name == "notebooks" else cwd
    return Path(os.environ.get("MYTHOS_FIGURES") or project / "build" / "figures")


def save(fig, name: str, alt: str, **numbers) -> None:
    """Write NAME.png, and NAME.json with the alternative text and the numbers plotted (6
    significant digits)."""
    folder().mkdir(parents=True, exist_ok=True)
    fig.savefig(folder() / f"{name}.png", metadata={"Software": None})
    content = json.dumps({"alt": alt, **_plain(numbers)}, indent=1) + "\n"
    (folder() / f"{name}.json").write_text(content, encoding="utf-8")


def _plain(value):
    """Tensors, arrays and numbers as JSON has them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [_plain(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def explore(draw: Callable, **values) -> None:
    """Show what draw(name=value, ...) returns, a figure and its alternative text; where a reader is
    there, in JupyterLab or Colab, with a control for each value: a slider for (value, least, most),
    a menu for a list, of which the first is drawn, and a field for text."""
    from IPython.display import display

    def show(**chosen):
        try:
            fig, alt = draw(**chosen)
        except ValueError as error:         # what a reader may type is told, not traced
            return print(error)
        display(fig, metadata={"image/png": {"alt": alt}})
        plt.close(fig)

    watched = "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules
    if not (watched and find_spec("ipywidgets")):
        return show(**{name: value if isinstance(value, str) else value[0]
                       for name, value in values.items()})
    from ipywidgets import Dropdown, IntSlider, Text, interact

    def control(value):
        if isinstance(value, str):
            return Text(value, continuous_update=False)
        if isinstance(value, list):
            return Dropdown(options=value)
        return IntSlider(*value, continuous_update=False)
    interact(show, **{name: control(value) for name, value in values.items()})


def loop_by_position(ax, matrix, title: str, label: str, **imshow):
    """A heat map with loops (from 1) up the left and positions (from 1) along the bottom; returns
    the image."""
    matrix = np.asarray(matrix)
    image = ax.imshow(matrix, origin="lower", aspect="auto", interpolation="nearest",
                      extent=(0.5, matrix.shape[1] + 0.5, 0.5, matrix.shape[0] + 0.5), **imshow)
    ax.set(title=title, xlabel="position", ylabel="loop")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label=label)
    return image


def table_of_shares(ax, by_seed: dict[str, dict[str, list[float]]], title: str):
    """Rows and columns of shares in 0 .. 1, each a list over seeds: the colour is their mean, and
    the text the lowest and the highest in %, or the one number that they all are. Empty: no
    run."""
    columns = list(dict.fromkeys(name for row in by_seed.values() for name in row))
    means = np.full((len(by_seed), len(columns)), np.nan)
    for y, row in enumerate(by_seed.values()):
        for x, name in enumerate(columns):
            if seeds := row.get(name):
                means[y, x] = np.mean(seeds)
                low, high = (f"{100 * share:.0f}" for share in (min(seeds), max(seeds)))
                ax.text(x, y, low if low == high else f"{low}-{high}", ha="center", va="center",
                        fontsize=7.5, color="white" if means[y, x] < 0.5 else "black")
    ax.imshow(means, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set(title=title, xticks=range(len(columns)), yticks=range(len(by_seed)))
    ax.set_xticklabels(columns, fontsize=9)
    ax.set_yticklabels(by_seed, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)


MOST_DRAWN = 24  # states of a machine whose moves are labelled


def draw_machine(machine: Machine, ax=None, names=None, places=None, way=()):
    """A machine as a graph: a circle for each state, the start a square, an arrow for each move
    with its letters / the answer (a token). Returns the figure.

    Args:
        names: of the states, by number, in place of their numbers.
        places: of the states, (x, y) in -1 .. 1; default a circle.
        way: states that a string goes through, marked by a thick line, and the last by a disc.
    """
    size = 2.5 + 0.45 * min(len(machine), MOST_DRAWN)
    ax = ax or plt.subplots(figsize=(1.4 * size, size))[1]
    labels = {}
    for state, (row, answers) in enumerate(zip(machine.next_state.tolist(),
                                               machine.answer.tolist())):
        for letter, (after, answer) in enumerate(zip(row, answers)):
            labels.setdefault((state, after), {}).setdefault(answer, []).append(letter)
    graph = nx.DiGraph(list(labels))
    layout = (nx.circular_layout(sorted(graph)) if places is None
              else dict(enumerate(np.asarray(places, dtype=float))))
    node_size = 420 if names is None else 1500
    curved = {"node_size": node_size, "connectionstyle": "arc3,rad=0.12", "ax": ax}
    if len(way):
        x, y = zip(*(layout[state] for state in way))
        ax.plot(x, y, color=COLOURS["accent"], lw=7, alpha=0.4, zorder=0)
        ax.scatter(x[-1], y[-1], 3 * node_size, COLOURS["accent"], alpha=0.5, zorder=0)
    between = [edge for edge in graph.edges if edge[0] != edge[1]]
    nx.draw_networkx_edges(graph, layout, between, edge_color="dimgrey", arrowsize=9, **curved)
    for shape, nodes in (("s", [machine.start]), ("o", sorted(set(graph) - {machine.start}))):
        nx.draw_networkx_nodes(graph, layout, nodes, node_size=node_size, node_shape=shape, ax=ax,
                               node_color="white", edgecolors=COLOURS["extrapolating"])
    nx.draw_networkx_labels(graph, layout, names and dict(enumerate(names)), font_size=9, ax=ax)
    if len(machine) <= MOST_DRAWN:
        text = {edge: "\n".join(f"{_few(machine, letters)} / {answer}"
                                for answer, letters in by_answer.items())
                for edge, by_answer in labels.items()}
        nx.draw_networkx_edge_labels(graph, layout, {edge: text[edge] for edge in between},
                                     font_size=7, rotate=False, bbox={"color": "white", "pad": 0.2},
                                     **curved)
    middle = np.mean(list(layout.values()), axis=0)
    for state in set(graph) & {a for a, b in labels if a == b}:
        _loop(ax, layout[state], layout[state] - middle, node_size ** 0.5 / 2,
              text[state, state] if len(machine) <= MOST_DRAWN else "")
    ax.set_title(_literal(machine.name))
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    ax.axis("off")
    return ax.figure


def _loop(ax, place, outward, radius: float, label: str):
    """An arrow from a node of a radius in points back to it, on the side away from the others."""
    angle = np.arctan2(outward[1], outward[0])

    def off(turn, far):
        """Where something is that lies so many radii from the node."""
        x, y = far * radius * np.cos(angle + turn) / 72, far * radius * np.sin(angle + turn) / 72
        return ax.transData + ScaledTranslation(x, y, ax.figure.dpi_scale_trans)

    ax.annotate("", place, xycoords=off(0.6, 1.15), xytext=place, textcoords=off(-0.6, 1.15),
                arrowprops={"arrowstyle": "-|>", "color": "dimgrey", "shrinkA": 0, "shrinkB": 0,
                            "connectionstyle": "arc3,rad=2", "mutation_scale": 9})
    ax.text(*place, label, transform=off(0.0, 2.3), fontsize=7, va="center",
            ha=("right", "center", "left")[1 + round(np.cos(angle))])


def _literal(text: str) -> str:
    """As text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def _few(machine, letters):
    """The names of letters, the first three of many."""
    names = [_literal(machine.symbols[letter]) for letter in letters]
    return ", ".join(names if len(names) < 4 else [*names[:3], "..."])
