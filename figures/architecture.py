"""The model of docs/use.md as architecture.svg, .png and .json, and that of notebook 01 as
architecture_gqa.png and .json; the numbers, and what is dashed, come from the configs.

    MYTHOS_FIGURES=figures python figures/architecture.py
"""
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path

from mythos_core import OpenMythos, figures
from mythos_core.model.config import tutorial_config
from mythos_core.tasks import parity

NAME = "parity-extrapolating"
INK, QUIET, TINT, FILL = "#222222", "#5f5f5f", "#E6F1F8", figures.COLOURS["extrapolating"]
BITS = torch.tensor([[0, 1, 1, 0, 1, 0]])
# a string, what is asked for, and how the two are called
PARITY = (BITS[0].tolist(), (parity.answers(BITS + 1)[0] - 1).tolist(), "a string of bits",
          "answers: parity so far")
BYTES = ("looped", "ooped.", "a string of bytes", "logits for the next byte")
# x of what comes before the loop, of the line of e, the block, the line of h, what comes after
LEFT, E, MIDDLE, H, RIGHT = 1.05, 2.95, 5.05, 7.15, 9.0
# y of the way out, the sum behind the block, the one before it, the way in
TOP, CARRY, SUM, BOTTOM = 5.98, 5.52, 1.0, 0.6


def say(ax, x, y, text, size=10, color=QUIET, ha="center", **style):
    ax.text(x, y, text, size=size, color=color, ha=ha, va="center_baseline", **style)


def box(ax, x, y, width, height, title, note="", on=True, face="white"):
    """A box around (x, y), dashed if it is a switch that this model leaves off."""
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height,
                                boxstyle="round,pad=0,rounding_size=0.08", lw=1.2, zorder=2,
                                facecolor=face, edgecolor=INK if on else QUIET,
                                linestyle="-" if on else (0, (4, 3))))
    say(ax, x, y + 0.13 * bool(note), title, 11, INK if on else QUIET,
        weight="bold" if on else "normal")
    say(ax, x, y - 0.14, note, 9.5)


def line(ax, *points, head=True, zorder=1):
    """A line through points, with an arrow's head at the last."""
    style = "-|>,head_length=5,head_width=2.5" if head else "-"
    ax.add_patch(FancyArrowPatch(path=Path(points), arrowstyle=style, lw=1.2, color=INK, fill=head,
                                 zorder=zorder))


def plus(ax, x, y):
    ax.add_patch(Circle((x, y), 0.13, facecolor="white", edgecolor=INK, lw=1.2, zorder=2))
    ax.plot([x - 0.07, x + 0.07, x, x, x], [y, y, y, y - 0.07, y + 0.07], color=INK, lw=1.2,
            zorder=3)


def string(ax, x, y, tokens):
    """Tokens as squares; bits that are 1 are filled."""
    for i, token in enumerate(tokens):
        left = x + 0.29 * (i - len(tokens) / 2)
        ax.add_patch(Rectangle((left, y - 0.145), 0.29, 0.29,
                               facecolor=FILL if token == 1 else "white", edgecolor=INK, lw=1,
                               zorder=2))
        say(ax, left + 0.145, y, token, 11, "white" if token == 1 else INK)


def experts(ax, c, y):
    """The mixture: the router sends a token to some of the experts, the shared one sees all."""
    box(ax, MIDDLE, y, 3.4, 1.16, "")
    say(ax, MIDDLE, y + 0.39, "mixture of experts", 11, INK, weight="bold")
    box(ax, 3.83, y, 0.76, 0.36, "router")
    line(ax, (4.21, y), (4.45, y), zorder=3)
    for i in range(c.n_experts):
        box(ax, 4.6 + 0.33 * i, y, 0.28, 0.36, i + 1, face=TINT if i < c.n_experts_per_tok
            else "white")
    say(ax, 5.83, y, "+", 11, INK)
    box(ax, 6.3, y, 0.76, 0.36, "shared", face=TINT)
    say(ax, MIDDLE, y - 0.39, f"a token passes {c.n_experts_per_tok} of {c.n_experts} experts, "
        f"and {c.n_shared_experts} shared", 9.5)


def block(ax, c):
    """What is looped, from the sum at the bottom to the one at the top."""
    gqa, seen = c.attn_type == "gqa", f"window {c.window}" if c.window else "no window"
    line(ax, (MIDDLE, SUM), (MIDDLE, CARRY - 0.13))
    plus(ax, MIDDLE, SUM)
    box(ax, 3.88, SUM, 1.5, 0.36, "loop embedding", on=c.loop_embedding)
    line(ax, (4.63, SUM), (MIDDLE - 0.13, SUM))
    box(ax, MIDDLE, 1.52, 3.4, 0.36, "norm")
    box(ax, MIDDLE, 2.14, 3.4, 0.52, "token shift", "half of the channels from the position before",
        on=c.token_shift)
    box(ax, 4.6, 2.86, 2.5, 0.52, "attention: GQA",
        f"{c.n_heads} heads, {c.n_kv_heads} key/value, {seen}" if gqa else "", on=gqa)
    box(ax, 6.32, 2.86, 0.86, 0.52, "MLA", on=not gqa)
    experts(ax, c, 3.9)
    ax.add_patch(FancyBboxPatch((3.25, 2.5), 3.6, 2.22, boxstyle="round,pad=0,rounding_size=0.08",
                                facecolor="none", edgecolor=FILL, lw=1, zorder=1))
    say(ax, 3.4, 4.6, "transformer block", 9.5, FILL, ha="left", weight="bold")
    say(ax, 6.7, 4.6, "each part adds to its input", 9, FILL, ha="right")
    box(ax, MIDDLE, 4.98, 3.4, 0.36, "LoRA of the loop", on=c.lora_rank > 0)
    plus(ax, MIDDLE, CARRY)
    for x, rail, end, name in ((3.85, E, MIDDLE - 0.13, r"B $\odot$ e"),
                               (6.25, H, MIDDLE + 0.13, r"A $\odot$ h")):
        line(ax, (rail, CARRY), (end, CARRY))
        box(ax, x, CARRY, 0.8, 0.36, name, on=c.carry)


def around(ax, strict):
    """The loop's ground, and the lines of e and h."""
    ax.add_patch(FancyBboxPatch((2.5, 0.2), 5.1, 6.55, boxstyle="round,pad=0,rounding_size=0.15",
                                facecolor=TINT, edgecolor="none", zorder=0))
    say(ax, 2.75, 6.47, "looped block", 12.5, FILL, ha="left", weight="bold")
    say(ax, 7.35, 6.47, "T times, the same weights", 11, FILL, ha="right")
    line(ax, (LEFT, 6.0), (LEFT, BOTTOM), (MIDDLE, BOTTOM), (MIDDLE, SUM - 0.13))
    line(ax, (E, BOTTOM), (E, CARRY), head=False)
    line(ax, (MIDDLE, CARRY + 0.13), (MIDDLE, TOP), (RIGHT, TOP), (RIGHT, 0.83))
    line(ax, (H, TOP), (H, SUM), (MIDDLE + 0.13, SUM))
    ax.plot([E, H, E, H], [BOTTOM, TOP, CARRY, CARRY], "o", ms=4, color=INK, zorder=3)
    for x, y, text in ((1.85, 0.73, "e, the first h"), (6.1, 6.1, "h, after the loop"),
                       (8.3, 6.1, "after the last")):
        say(ax, x, y, text, color=INK)
    whose = "h of the position before" if strict else "h"
    say(ax, 7.37, 3.6, f"{whose}, next loop", color=INK, rotation=90)
    say(ax, 2.74, 3.6, "e, the same at every loop", color=INK, rotation=90)


def draw(ax, model, name=NAME, example=PARITY):
    c, (read, asked, what, answers) = model.config, example
    before, after = (f"{n} block{'s' * (n != 1)}, run once"
                     for n in (c.prelude_layers, c.coda_layers))
    around(ax, c.strict)
    block(ax, c)
    say(ax, LEFT, 6.42, f"ids: {what}")
    string(ax, LEFT, 6.1, read)
    box(ax, LEFT, 4.5, 1.9, 0.56, "embed", f"{c.vocab_size} tokens, {c.dim} channels")
    box(ax, LEFT, 2.7, 1.9, 0.56, "prelude", before)
    box(ax, RIGHT, 4.98, 1.9, 0.56, "halting head", "when to stop", on=c.halting.startswith("act"))
    box(ax, RIGHT, 3.64, 1.9, 0.56, "coda", after)
    box(ax, RIGHT, 2.3, 1.9, 0.56, "norm, head", f"{c.dim} channels, {c.vocab_size} logits")
    string(ax, RIGHT, 0.68, asked)
    say(ax, RIGHT, 0.36, answers)
    size = f"{sum(p.numel() for p in model.parameters()):,}"
    codes = f" States are rounded to {c.codes} codes." if c.codes else ""
    say(ax, 5, -0.02, f"{name}: {size} parameters, however many loops.{codes} Dashed: switches "
        "that it leaves off.")


def page():
    """An empty figure, and its axes."""
    fig = plt.figure(figsize=(10, 7.1))
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 10), ylim=(-0.2, 6.9))
    ax.axis("off")
    return fig, ax


def words(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


def main():
    figures.use_house_style()
    plt.rcParams.update({"svg.hashsalt": NAME, "figure.constrained_layout.use": False})
    fig, ax = page()
    draw(ax, OpenMythos.from_pretrained(NAME))
    figures.save(fig, "architecture", alt="Bits are embedded and pass the prelude, which gives e. "
                 "The looped block adds e to h of the position before, then "
                 "come norm, attention and mixture of experts. It runs T times with the same "
                 "weights; coda and head give the answers.", words=words(ax))
    fig.savefig(figures.folder() / "architecture.svg", metadata={"Date": None})
    fig, ax = page()
    draw(ax, OpenMythos(tutorial_config("gqa")), "GQA model of notebook 01", BYTES)
    figures.save(fig, "architecture_gqa", alt="Bytes are embedded and pass the prelude, which "
                 "gives e. The looped block adds e and a loop embedding to h, then come norm, "
                 "attention, mixture of experts and LoRA; A times h and B times e are added. It "
                 "runs T times with the same weights; a halting head weighs the states, and coda "
                 "and head give the logits.", words=words(ax))


if __name__ == "__main__":
    main()
