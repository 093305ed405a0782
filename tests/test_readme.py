"""Every number in the README's tables is in a figure's JSON, and says the same."""
import json
import re
from pathlib import Path
from statistics import mean, median

import pytest

from mythos_core import study
from mythos_core.model import PRETRAINED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def figure(name):
    return json.loads((ROOT / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def percent(share):
    return f"{100 * share:.0f} %"


def ratio(a, b):
    sizes = figure("cache_growth")["bytes_64_tokens_4_loops"]
    return f"{sizes[a] // 1024} KB and {sizes[b] // 1024} KB: {sizes[a] / sizes[b]:.2f} times"


def spectrum():
    d = figure("jacobian_spectrum")
    return f"A = {d['untrained_max_A']:.2f}, yet the loop's Jacobian has radius {d['untrained_rho_J'][0]:.2f}"


def reached():
    rows = [row for row in study.load(study.RESULTS / "reach.json") if row["variant"] == "the recipe"]
    assert len(rows) == 10
    return sum(row["whole"]["1024"] == 1.0 for row in rows)


def certificates():
    """Contexts of each shipped proof, by machine."""
    kept = {name: json.loads((PRETRAINED / f"state-{name}" / "certificate.json").read_text(encoding="utf-8")) for name in ("Z5", "S3", "A5", "S5")}
    assert all(proof["proved"] for proof in kept.values())
    return "Z5, S3, A5 and S5 proved for every length by {}, {}, {} and {} contexts".format(*(proof["contexts"] for proof in kept.values()))


def by_hand():
    proof = json.loads((PRETRAINED / "parity-extrapolating" / "certificate.json").read_text(encoding="utf-8"))
    assert proof["proved"]
    return f"every string of every length, by {proof['contexts']} contexts"


def proofs():
    """Trainings that ended proved, of all that were run, by machine, with the median of their steps."""
    rows, said = study.load(study.RESULTS / "proofs.json"), []
    for name in ("parity", "Z5", "S3", "A5", "S5"):
        of = [row for row in rows if row["variant"] == f"proved {name}"]
        steps = median(row["steps"] for row in of if row["certificate"]["proved"])
        said.append(f"{name} {sum(row['certificate']['proved'] for row in of)} of {len(of)} ({steps:.0f} steps)")
    return ", ".join(said)


def generation(bits, loops):
    d = figure("generation_exact_match")
    return d["exact_match"][d["prompt_bits"].index(bits)][d["loops"].index(loops)]


CLAIMS = {
    "sizes": lambda: f"GQA {figure('model_sizes')['total_gqa']:,}, MLA {figure('model_sizes')['total_mla']:,}",
    "cache": lambda: ratio("gqa", "mla"),
    "key per head": lambda: ratio("gqa", "mla_key_per_head"),
    "spectrum": spectrum,
    "executed": lambda: f"executes {figure('loops_article')['loops_executed'][-1]} of {figure('loops_article')['loops_asked'][-1]}",
    "halting": lambda: f"{figure('act_heatmap')['asked']} asked for, {figure('act_heatmap')['executed']} executed",
    "depth": lambda: f"from {percent(figure('depth_extrapolation')['whole_string_accuracy']['64'][15])} of 64-bit strings at 16 loops to "
                     f"{percent(figure('depth_extrapolation')['whole_at_last_loop']['64'])} at {figure('depth_extrapolation')['all_whole_from_loop']['64']}",
    "seeds": lambda: f"{reached()} of 10 seeds whole at 1,024 bits, {figure('frontier_speed')['positions_per_loop']:.2f} positions a loop",
    "by hand": by_hand,
    "certificates": certificates,
    "proofs": proofs,
    "balance": lambda: "from {:.2f} to {:.2f}".format(*(mean(figure("balance")[f"{k}_violation"]) for k in ("off", "on"))),
    "generation": lambda: f"{percent(generation(64, 16))} at 16 loops, {percent(generation(64, 96))} at 96",
    "article": lambda: f"article: {percent(sum(figure('training_article')['token_accuracy'][-50:]) / 50)} of tokens",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_readme_says_what_the_figures_say(claim):
    assert CLAIMS[claim]() in README


def amount(value, unit):
    return "" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def bench_line(row):
    """A row of figures/bench.json as a line of the README's table."""
    reference, ours, floor = (amount(row[key], row["unit"]) for key in ("reference", "ours", "floor"))
    spread = "" if row["low"] == row["high"] else f" ({row['low']:.2f} to {row['high']:.2f})"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}{spread}"
    bar = "" if row["bar"] is None else amount(row["bar"], row["unit"]) if row["ratio"] is None else f"{row['bar']:.2g}"
    work = row["work"] + (f"; first calls {row['warm_up']:.0f} s" if row["warm_up"] else "")
    where = row["threads"] if row["device"] == "cpu" else row["device"]
    share = percent(row["floor"] / row["ours"]) if row["floor"] else ""
    return f"| {work} | {where} | {reference} | {ours} | {ratio} | {bar}{'' if row['reached'] else ', not reached'} | {floor} | {share} |"


def bench_table():
    """What the README quotes of figures/bench.json."""
    bench = figure("bench")
    machine = bench["machine"]
    rates = ", ".join(f"{rate:.0f} GFLOP/s on {threads}" for threads, rate in machine["GFLOP_per_second"].items())
    head = ["| work | threads | open-mythos | ours | ratio | bar | limit | share of it |", "|---|---|---|---|---|---|---|---|"]
    where = f"By `{machine['command']}` on {machine['cpu']}, {machine['threads']} threads ({rates}), torch {machine['torch']}:"
    return "\n".join([where, "", *head, *map(bench_line, bench["rows"])])


def test_the_readme_quotes_the_bench():
    table = bench_table()
    if table not in README:
        pytest.fail(f"after `make bench` paste this into the README's section How fast, in place of the table there:\n\n{table}\n", pytrace=False)


def test_bounds_in_prose_hold():
    assert max(figure("loops_article")["token_accuracy"]) < 0.60
    assert figure("depth_extrapolation")["whole_at_last_loop"]["1024"] == 1.0
    recipe = figure("training_recipe")
    assert recipe["held_out_step"][-1] == 250 and min(seed[-1] for seed in recipe["whole_16_bits"]) == 1.0


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    repository = re.search(r'Repository = "https://github.com/(.*?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)
    for name in re.findall(r"\(notebooks/(\w+)\.ipynb\)", README):
        assert f"colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb" in README


def test_the_code_in_the_readme_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_commands_in_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"(?:^|`)make (\w+)", README, re.M)) <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
