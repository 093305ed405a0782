"""How cost grows, ours beside open-mythos 0.5.0, as figures/bench_scaling.png. By `make bench`. No
position halts, so that every loop asked for is run."""
import statistics
from functools import partial

import machine
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from workloads import NEVER, decode, forward, mixture, training_step

from mythos_core import figures

RUNS = 5
run_all = partial(forward, "cpu", loops=4, halt_bias=NEVER)
#: Panels: title, what is varied, its values, the pair for a value, threads (None: torch's default).
PANELS = {"loops": ("Training step", "loops", (1, 2, 4, 8, 16),
                    lambda n: training_step("cpu", n, NEVER), None),
          "length": ("Forward, 4 strings", "positions", (24, 64, 128, 256, 512, 1024),
                     lambda n: run_all(batch=4, length=n), None),
          "batch": ("Forward, 24 positions", "strings", (8, 32, 128, 512),
                    lambda n: run_all(batch=n), None),
          "experts": ("MoE, 4 experts chosen, forward and backward", "experts",
                      (4, 8, 16, 32, 64), lambda n: mixture("cpu", n, 4), 1),
          "gqa": ("Decode a token, GQA", "tokens of context", (64, 192, 512, 1536),
                  lambda n: decode("cpu", "gqa", n), 1),
          "mla": ("Decode a token, MLA", "tokens of context", (64, 192, 512, 1536),
                  lambda n: decode("cpu", "mla", n), 1)}
COLOURS = {"open-mythos": figures.COLOURS["reference"], "ours": figures.COLOURS["article"],
           "ours, window of 4": figures.COLOURS["extrapolating"]}


def medians(*works) -> list[float]:
    """Milliseconds of each, in turns, after one turn that is not counted."""
    taken = [[1e3 * machine.seconds(work) for work in works] for _ in range(RUNS + 1)]
    return [statistics.median(times) for times in zip(*taken[1:])]


def measure(panel) -> dict:
    """Milliseconds of each curve at each value, and the exponents k of the fits milliseconds ~
    values^k."""
    _, _, values, pair_at, number = PANELS[panel]
    rows = []
    with machine.threads(number) as threads:
        for value in values:
            pair = pair_at(value)
            windowed = [run_all(batch=4, length=value, window=4).ours] if panel == "length" else []
            rows.append(medians(pair.theirs, pair.ours, *windowed))
    curves = dict(zip(COLOURS, zip(*rows)))
    exponents = {name: np.polyfit(np.log(values), np.log(times), 1)[0]
                 for name, times in curves.items()}
    return {"threads": threads, "values": values, "milliseconds": curves, "exponents": exponents}


def draw(ax, panel, threads, values, milliseconds, exponents):
    title, label, *_ = PANELS[panel]
    by_cost = sorted(milliseconds, key=lambda name: milliseconds[name][-1])
    for rank, name in enumerate(by_cost):
        # labels of curves that end together stay readable
        times, apart = milliseconds[name], 12 * (rank - (len(by_cost) - 1) / 2)
        ax.loglog(values, times, "o-", color=COLOURS[name], markersize=4)
        text = f"{name} $n^{{{round(exponents[name], 2) + 0.0:.2f}}}$"  # + 0.0: not -0.00
        ax.annotate(text, (values[-1], times[-1]), (6, apart), textcoords="offset points",
                    va="center", fontsize=9, color=COLOURS[name], annotation_clip=False)
    ax.set(title=title, xlabel=label,
           ylabel=f"milliseconds on {threads} thread{'s' * (threads > 1)}", xticks=values,
           xticklabels=values)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.margins(y=0.1)
    ax.minorticks_off()


def test_scaling():
    figures.use_house_style()
    fig, axes = plt.subplots(2, 3, figsize=(14, 7))
    measured = {panel: measure(panel) for panel in PANELS}
    for panel, ax in zip(PANELS, axes.flat):
        draw(ax, panel, **measured[panel])
    alt = ("Six log-log panels of milliseconds, ours beside open-mythos: against loops, length, "
           "batch, experts, and context with GQA and MLA")
    figures.save(fig, "bench_scaling", alt, **measured)
