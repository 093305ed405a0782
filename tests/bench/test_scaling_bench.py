"""How cost grows, as three figures, by `make bench`: ours beside open-mythos 0.5.0, where no
position halts, so that every loop asked for is run; a strict model's by the order in which its
positions settle; and that of a training step and of a proof by the states of the machine."""
import statistics
from functools import partial

import machine
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator
from workloads import (
    NEVER,
    decode,
    forward,
    machine_step,
    mixture,
    models,
    step_of,
    training_step,
)

from mythos_core import KVCache, OpenMythos, figures
from mythos_core.model.config import parity_config
from mythos_core.proof.certificate import certify
from mythos_core.tasks.machines import machine as machine_of
from mythos_core.tasks.parity import make_batch
from mythos_core.training.recipes import doubling_recipe

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


#: Ways to settle a whole string of a strict model.
SCHEDULES = {"all at once": lambda model, ids: model(ids, ids.shape[1]),
             "pieces of 32": lambda model, ids: model(ids, 32, KVCache(ids.shape[1])),
             "pieces of 8": lambda model, ids: model(ids, 8, KVCache(ids.shape[1])),
             "left to right": lambda model, ids: model(ids)}
LENGTHS = (32, 64, 128, 256, 512)
LONG = (64, 256, 1024, 4096, 16_384, 65_536)       # of one string
#: The machines of which a proved model ships, and its name.
PROVED = {"parity": "parity-extrapolating", **{name: f"state-{name}" for name in
                                               ("Z5", "S3", "A5", "S5")}}


def medians(*works, runs=RUNS) -> list[float]:
    """Milliseconds of a call of each, in turns, after one turn that is not counted."""
    turns = [machine.turn(work) for work in works]
    taken = [[1e3 * machine.seconds(calls) / number for calls, number in turns]
             for _ in range(runs + 1)]
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


def draw(ax, colours, title, label, threads, values, milliseconds, exponents):
    by_cost = sorted(milliseconds, key=lambda name: milliseconds[name][-1])
    for rank, name in enumerate(by_cost):
        # labels of curves that end together stay readable
        times, apart = milliseconds[name], 12 * (rank - (len(by_cost) - 1) / 2)
        ax.loglog(values, times, "o-", color=colours[name], markersize=4)
        text = f"{name} $n^{{{round(exponents[name], 2) + 0.0:.2f}}}$"  # + 0.0: not -0.00
        ax.annotate(text, (values[-1], times[-1]), (6, apart), textcoords="offset points",
                    va="center", fontsize=9, color=colours[name], annotation_clip=False)
    ax.set(title=title, xlabel=label,
           ylabel=f"milliseconds on {threads} thread{'s' * (threads > 1)}", xticks=values,
           xticklabels=values)
    low, *_, high = sorted(time for times in milliseconds.values() for time in times)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low
                                          else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.margins(y=0.1)
    ax.minorticks_off()


def test_scaling():
    figures.use_house_style()
    fig, axes = plt.subplots(2, 3, figsize=(14, 7))
    measured = {panel: measure(panel) for panel in PANELS}
    for (panel, (title, label, *_)), ax in zip(PANELS.items(), axes.flat):
        draw(ax, COLOURS, title, label, **measured[panel])
    alt = ("Six log-log panels of milliseconds, ours beside open-mythos: against loops, length, "
           "batch, experts, and context with GQA and MLA")
    figures.save(fig, "bench_scaling", alt, **measured)


@torch.no_grad()
def schedules(strings: int) -> dict:
    """As `measure`, of so many strings of each of `LENGTHS`, by the proved parity model; all
    schedules have the same answers."""
    model = OpenMythos.from_pretrained("parity-extrapolating").without_halting()
    rows = []
    for length in LENGTHS:
        ids, answers = make_batch(strings, length)
        works = [lambda way=way, ids=ids: way(model, ids) for way in SCHEDULES.values()]
        assert all(torch.equal(work().argmax(-1), answers) for work in works)
        rows.append(medians(*works, runs=3))
    curves = dict(zip(SCHEDULES, zip(*rows)))
    exponents = {name: np.polyfit(np.log(LENGTHS[1:]), np.log(times[1:]), 1)[0]
                 for name, times in curves.items()}
    return {"threads": 1, "values": LENGTHS, "milliseconds": curves, "exponents": exponents}


def test_schedules_of_a_strict_loop():
    figures.use_house_style()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    colours = dict(zip(SCHEDULES, ("#777777", *(figures.COLOURS[name] for name in
                                                ("reference", "extrapolating", "article")))))
    with machine.threads(1):
        measured = {f"{strings} strings": schedules(strings) for strings in (1, 16)}
    for ax, title, found in zip(axes, ("One string", "16 strings"), measured.values()):
        draw(ax, colours, title, "positions", **found)
    alt = ("Two log-log panels of milliseconds against length, for one string and for 16: a strict "
           "model settled all at once, in pieces of 32 and of 8, and from left to right")
    figures.save(fig, "bench_schedules", alt, **measured)


def by_states(works: dict) -> dict:
    """As `measure`, of work for machines of so many states."""
    with machine.threads(1) as threads:
        times = [medians(work)[0] for work in works.values()]
    return {"threads": threads, "values": list(works), "milliseconds": {"strict": times},
            "exponents": {"strict": np.polyfit(np.log(list(works)), np.log(times), 1)[0]}}


def test_states_of_the_machine():
    figures.use_house_style()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    proved = {len(asked): lambda asked=asked, shipped=shipped: certify(shipped, asked)
              for asked, shipped in ((machine_of(name), OpenMythos.from_pretrained(kept))
                                     for name, kept in PROVED.items())}
    measured = {"Training step, Z2 to Z48": by_states(
                    {n: machine_step(f"Z{n}") for n in (2, 4, 8, 12, 16, 24, 48)}),
                "Certificate of each model that ships": by_states(proved)}
    for ax, (title, found) in zip(axes, measured.items()):
        draw(ax, {"strict": figures.COLOURS["article"]}, title, "states of the machine", **found)
    alt = ("Two log-log panels of milliseconds against the states of the machine: a training step, "
           "and the certificate of a proved model")
    figures.save(fig, "bench_states", alt, **measured)


def test_a_string_by_doubling_and_from_left_to_right():
    """One string of S3, whole: by log2(length) loops of the doubling model, by the strict one from
    left to right, and by the reference at 16 loops, which cannot learn it; with what a training
    step of the two recipes takes."""
    figures.use_house_style()
    shuffles, measured = machine_of("S3"), {}
    doubling, strict = (OpenMythos.from_pretrained(name) for name in ("doubling-S3", "state-S3"))
    theirs, _ = models(parity_config(max_seq_len=4096), "cpu", NEVER)
    for threads in (1, 2):
        with machine.threads(threads), torch.no_grad():
            rows = {"doubling": [], "left to right": [], "open-mythos, 16 loops": []}
            for length in LONG:
                ids, answers = shuffles.make_batch(1, length, torch.Generator().manual_seed(1))
                works = [lambda ids=ids: doubling(ids), lambda ids=ids: strict(ids)]
                assert all((work().argmax(-1) == answers).all() for work in works)
                if length <= 1024:
                    works.append(lambda ids=ids: theirs(ids, n_loops=16))
                for name, time in zip(rows, medians(*works, runs=3 if length <= 4096 else 1)):
                    rows[name].append(time)
        measured[f"{threads} threads"] = {"values": LONG, "milliseconds": rows}
    with machine.threads(1):
        steps = medians(machine_step("S3"), step_of(doubling_recipe(shuffles), 2))   # 3 loops
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    colours = dict(zip(rows, (figures.COLOURS[name] for name in
                              ("scan", "extrapolating", "reference"))))
    for ax, (title, row) in zip(axes, measured.items()):
        for name, times in row["milliseconds"].items():
            ax.loglog(LONG[:len(times)], times, "o-", ms=4, color=colours[name], label=name)
        ax.set(title=f"One string of S3, {title.replace('1 threads', '1 thread')}",
               xlabel="letters", ylabel="milliseconds")
        ax.legend()
    alt = ("Two log-log panels of milliseconds against the letters of one string: doubling far "
           "below left to right up to tens of thousands of letters")
    figures.save(fig, "bench_doubling", alt, **measured,
                 training_step={"strict": steps[0], "doubling": steps[1]})
