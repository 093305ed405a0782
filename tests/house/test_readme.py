"""Numbers in the README and in docs/ are those of the figures and the committed rows."""
import json
import re
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest

from mythos_core import study
from mythos_core.__main__ import COMMANDS
from mythos_core.model.model import PRETRAINED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])}
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'Repository = "(.*?)"', PROJECT)[1]
PEER = "https://github.com/kyegomez/OpenMythos"


def figure(name):
    return json.loads((ROOT / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def percent(share):
    return f"{100 * share:.0f} %"


def ratio(a, b):
    sizes = figure("cache_growth")["bytes_64_tokens_4_loops"]
    return f"{sizes[a] // 1024} KB and {sizes[b] // 1024} KB: {sizes[a] / sizes[b]:.2f} times"


def spectrum():
    d = figure("jacobian_spectrum")
    return (f"A = {d['untrained_max_A']:.2f}, radius {d['untrained_rho_J'][0]:.2f} in loop "
            f"{d['loops'][0]}, {d['untrained_rho_J'][-1]:.2f} in {d['loops'][-1]}")


def reached():
    """Of the seeds of the recipe those without an error at 1,024 bits, and how fast the median
    one's answer travels; and of the other batch those without an error to 512."""
    rows, again = ([row for row in study.load(study.RESULTS / name)
                    if row["variant"] == "the recipe"] for name in ("reach.json", "ablations.json"))
    lengths = [16, 32, 64, 128, 256]
    needed = [[row["needed"][str(n)]["random"] for n in lengths] for row in rows]
    speed = median(1 / np.polyfit(lengths, loops, 1)[0] for loops in needed)
    whole = sum(row["whole"]["1024"] == 1.0 for row in rows)
    whole_again = sum(min(row["whole"].values()) == 1.0 for row in again)
    return (f"{whole} of {len(rows)} seeds whole at 1,024 bits, {speed:.2f} positions per loop, "
            f"and {whole_again} of {len(again)} whole to 512 bits in another batch")


def sizes():
    d = figure("model_sizes")
    return f"GQA {d['total_gqa']:,}, MLA {d['total_mla']:,}"


def executed():
    """Loops of the article's model: the last count that was executed, of how many asked for."""
    loops = figure("overview")["article_loops_executed"]
    return f"executes {loops[-1]} of {len(loops)}"


def halting():
    d = figure("act_heatmap")
    return f"{d['asked']} asked for, {d['executed']} executed"


def depth():
    d = figure("overview")
    whole = d["whole_string_accuracy"]["64"]
    return (f"from {percent(whole[15])} of 64-bit strings at 16 loops to {percent(whole[-1])} at "
            f"{d['all_whole_from_loop']['64']}")


def balance():
    """Least and most of five seeds, without and with the balancing bias."""
    off, on = (figure("balance")[f"{k}_violation"] for k in ("off", "on"))
    return (f"violation {min(off):.2f} to {max(off):.2f}, with a bias {min(on):.2f} to "
            f"{max(on):.2f}")


def article():
    found = figure("accuracy_by_position")["exact_match_24_bits"]
    return (f"exact match on 24 bits: article {percent(found['article, 3 loops'])}, "
            f"ours {percent(found['ours, 24 loops'])}")


def certificate(model):
    return json.loads((PRETRAINED / model / "certificate.json").read_text(encoding="utf-8"))


def certificates():
    """Contexts of each shipped proof, by machine."""
    kept = {name: certificate(f"state-{name}") for name in ("Z5", "S3", "A5", "S5")}
    assert all(proof["proved"] for proof in kept.values())
    return "Z5, S3, A5 and S5 proved for every length by {}, {}, {} and {} contexts".format(
        *(proof["contexts"] for proof in kept.values()))


def by_hand():
    proof = certificate("parity-extrapolating")
    assert proof["proved"]
    return f"every string of every length, by {proof['contexts']} contexts"


def proofs():
    """Trainings that ended proved, of all that were run, by machine, with the median of their
    steps."""
    rows, said = study.load(study.RESULTS / "proofs.json"), []
    for name in ("parity", "Z5", "S3", "A5", "S5"):
        of = [row for row in rows if row["variant"] == f"proved {name}"]
        steps = median(row["steps"] for row in of if row["certificate"]["proved"])
        said.append(f"{name} {sum(row['certificate']['proved'] for row in of)} of {len(of)} "
                    f"({steps:.0f} steps)")
    return ", ".join(said)


def doubling():
    """Trainings of doubling models that ended proved, of all that were run, with medians."""
    rows, said = study.load(study.RESULTS / "doubling.json"), []
    for name in ("parity", "Z5", "S3", "addition", "A5"):
        runs = [row for row in rows if row["variant"] == f"doubling {name}"]
        proved = [row for row in runs if row["certificate"]["proved"]]
        steps, seconds = (median(row[key] for row in proved) for key in ("steps", "train_seconds"))
        said.append(f"{name} {len(proved)} of {len(runs)} ({steps:.0f} steps, {seconds:.0f} s)")
    return ", ".join(said)


def doubling_speed():
    """Of one string the time from left to right, and by open-mythos, over that of doubling."""
    found, said = figure("bench_doubling"), []
    for threads in ("1 threads", "2 threads"):
        at = found[threads]["values"].index(1024)
        ours, strict, theirs = found[threads]["milliseconds"].values()
        said.append(f"{strict[at] / ours[at]:.1f} and {theirs[at] / ours[at]:.1f} times as fast as "
                    f"these at 1,024 letters, and {strict[-1] / ours[-1]:.1f} times as fast as "
                    "left to right at 65,536")
    step = found["training_step"]
    return (f"With one thread it is {said[0]}; with two, {said[1]}. A training step of its recipe "
            f"takes {step['doubling'] / step['strict']:.2f} times as long as one of the strict "
            "model's.")


def safeties():
    """The least lead over its bound of any choice, of the models of each kind that ship."""
    kinds = {"doubling": [], "state": [], "contracting": []}
    for file in PRETRAINED.glob("*/certificate.json"):
        kind = file.parent.name.partition("-")[0]
        kinds["state" if kind == "parity" else kind].append(
            min(json.loads(file.read_text(encoding="utf-8"))["safety"].values()))
    assert len(kinds["contracting"]) == 8
    return (f"at least {int(min(kinds['doubling']))} times as much in the doubling models, "
            f"{int(min(kinds['state']))} in the strict ones with codes")


def contracting():
    """Trainings of contracting models that ended proved, of all that were run."""
    said = []
    rows = study.load(study.RESULTS / "contracting.json")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of = [row for row in rows if row["variant"] == variant]
        proved = [row for row in of if row["certificate"]["proved"]]
        name = re.sub(r"contracting |machine |regex:", "", variant)
        with_balls = (f" ({median(row['certificate']['codes'] for row in proved):.0f} balls, "
                      f"{median(row['steps'] for row in proved):.0f} steps)" if proved else "")
        said.append(f"{name} {len(proved)} of {len(of)}{with_balls}")
    return "; ".join(said)


def grus():
    """GRUs that were proved as trained, of all that were tried."""
    said = {}
    for row in study.load(study.RESULTS / "gru_balls.json"):
        said.setdefault(row["variant"].rpartition(" ")[2], []).append(row["proved"])
    return ", ".join(f"{name} {sum(proved)} of {len(proved)}" for name, proved in said.items())


def doubling_machines():
    """The same of the machines of which no model ships."""
    rows, said = study.load(study.RESULTS / "doubling.json"), {}
    for row in rows:
        if "machine" in row["variant"] and "S5" not in row["variant"]:
            name = row["variant"].removeprefix("doubling machine ").removeprefix("regex:")
            said.setdefault(name, []).append(row["certificate"]["proved"])
    return ", ".join(f"{name} {sum(proved)} of {len(proved)}" for name, proved in said.items())


def random_machines():
    rows = study.load(study.RESULTS / "machines.json")
    proved = [row["certificate"]["proved"] for row in rows if "random" in row["variant"]]
    return f"Of {len(proved)} machines drawn at random {sum(proved)} were proved too"


def generation():
    """Exact matches of 64-bit prompts."""
    d = figure("generation_exact_match")
    match = dict(zip(d["loops"], d["exact_match"][d["prompt_bits"].index(64)]))
    return f"{percent(match[16])} at 16 loops, {percent(match[96])} at 96"


def text():
    """Bits per byte of three blocks without a loop, and of the looped ones after 8, the least and
    the most; means over seeds."""
    rows = study.unpack(study.RESULTS / "language.json")

    def bits(arm, loops):
        return mean(row["bits"][row["loops"].index(loops)] for row in rows if row["arm"] == arm)
    looped = [bits(arm, 8) for arm in ("reference", "random-loops", "strict", "strict-carry")]
    return (f"not here: {bits('unlooped', 1):.3f} bits per byte unlooped, {min(looped):.3f} to "
            f"{max(looped):.3f} with 8 loops")


CLAIMS = {
    "text": text,
    "sizes": sizes,
    "cache": lambda: ratio("gqa", "mla"),
    "key per head": lambda: ratio("gqa", "mla_key_per_head"),
    "spectrum": spectrum,
    "executed": executed,
    "halting": halting,
    "depth": depth,
    "seeds": reached,
    "by hand": by_hand,
    "certificates": certificates,
    "proofs": proofs,
    "doubling": doubling,
    "doubling machines": doubling_machines,
    "contracting": contracting,
    "GRUs": grus,
    "doubling speed": doubling_speed,
    "safeties": safeties,
    "random machines": random_machines,
    "balance": balance,
    "generation": generation,
    "article": article,
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_readme_says_what_the_figures_say(claim):
    assert any(CLAIMS[claim]() in " ".join(page.split()) for page in PAGES.values())


def proof_seconds(name):
    """The shortest and the longest training of a machine."""
    taken = [row["train_seconds"] for row in study.load(study.RESULTS / "proofs.json")
             if row["variant"] == f"proved {name}"]
    return f"{min(taken):.0f} to {max(taken):.0f}"


def test_the_proofs_are_counted():
    assert doubling() in README
    page = " ".join(PAGES["docs/results.md"].split())
    assert proofs() in page
    assert (f"a training of S3 took {proof_seconds('S3')} seconds, one of S5 {proof_seconds('S5')}"
            in page)


def test_the_readme_is_a_page_that_one_reads():
    """At most 120 lines of 120 columns; addresses and the count of proofs stay on one line."""
    lines = README.splitlines()
    assert len(lines) <= 120
    whole = re.compile(r"\[[\w-]+\]: http|parity \d")
    assert [line for line in lines if len(line) > 120 and not whole.match(line)] == []


def amount(value, unit):
    return ("" if value is None else f"{value:,.0f} {unit}" if value >= 100
            else f"{value:.3g} {unit}")


def bar_of(row):
    """What a row asks for: the least ratio, or without a reference the most seconds."""
    return ("" if row["bar"] is None else amount(row["bar"], row["unit"]) if row["ratio"] is None
            else f"{row['bar']:.2g}")


def bench_line(row):
    """A row of figures/bench.json as a line of the table in docs/bench.md."""
    reference, ours, floor = (amount(row[key], row["unit"])
                              for key in ("reference", "ours", "floor"))
    spread = "" if row["low"] == row["high"] else f" ({row['low']:.2f} to {row['high']:.2f})"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}{spread}"
    bar = bar_of(row) + ("" if row["reached"] else ", not reached")
    work = row["work"] + (f"; first calls {row['warm_up']:.0f} s" if row["warm_up"] else "")
    where = row["threads"] if row["device"] == "cpu" else row["device"]
    share = percent(row["floor"] / row["ours"]) if row["floor"] else ""
    return f"| {work} | {where} | {reference} | {ours} | {ratio} | {bar} | {floor} | {share} |"


def bench_table():
    """What docs/bench.md quotes of the latest run in figures/bench.json."""
    bench = figure("bench")[0]
    machine = bench["machine"]
    rates = ", ".join(f"{rate:.0f} GFLOP/s on {threads}"
                      for threads, rate in machine["GFLOP_per_second"].items())
    head = ["| work | threads | open-mythos | ours | ratio | bar | limit | share of it |",
            "|---|---|---|---|---|---|---|---|"]
    where = (f"By `{machine['command']}` on {machine['cpu']}, {machine['threads']} threads "
             f"({rates}), torch {machine['torch']}:")
    return "\n".join([where, "", *head, *map(bench_line, bench["rows"])])


def processors_table():
    """What docs/bench.md quotes of every run in figures/bench.json: the rows that have a bar."""
    runs = figure("bench")
    names = [f"{run['machine']['cpu']}, commit {run['commit'][:7]}" for run in runs]
    lines = [f"| work | bar | {' | '.join(names)} |", "|---|---" + "|---" * len(runs) + "|"]
    for row in runs[0]["rows"]:
        if row["bar"] is not None:
            found = [next((old for old in run["rows"] if old["work"] == row["work"]), None)
                     for run in runs]
            cells = ["" if one is None else amount(one["ours"], one["unit"]) if one["ratio"] is None
                     else f"{one['ratio']:.2f}" for one in found]
            lines.append(f"| {row['work']} | {bar_of(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def other_loops_table():
    """What docs/bench.md quotes of looped transformers of other packages."""
    bench = figure("bench_peers")[0]
    lines = [f"On {bench['machine']['cpu']}, torch {bench['machine']['torch']}:", "",
             "| work | threads | theirs | ours | ratio |", "|---|---|---|---|---|"]
    return "\n".join(lines + [" |".join(bench_line(row).split(" |")[:5]) + " |"
                              for row in bench["rows"]])


LOOPING = ("settled, as in its recipe", "settled", "16 loops", "1 to 16 loops",
           "1 to 16 loops, thrown starts")


def looping_table():
    """What docs/bench.md says of training with and without loops."""
    rows = study.load(study.RESULTS / "looping.json")
    lines = ["| training | parity: proved, median of the steps, and each | S3 |", "|---|---|---|"]
    for variant in LOOPING:
        cells = [[row for row in rows if row["variant"] == f"{name}, {variant}"]
                 for name in ("parity", "S3")]
        lines.append(f"| {variant} | {' | '.join(map(first_proofs, cells))} |")
    return "\n".join(lines)


def first_proofs(rows):
    """On how many seeds there was one, and after how many steps."""
    steps = [row["steps"] for row in rows if row["proved"]]
    return (f"{len(steps)} of {len(rows)}, {median(steps):.0f} "
            f"({', '.join(map(str, sorted(steps)))})")


def test_training_without_loops_is_quoted():
    assert looping_table() in PAGES["docs/bench.md"], looping_table()


@pytest.mark.parametrize("made", [bench_table, processors_table, other_loops_table])
def test_the_bench_is_quoted(made):
    table = made()
    if table not in PAGES["docs/bench.md"]:
        pytest.fail("after `make bench` paste this into docs/bench.md, in place of the table "
                    f"there:\n\n{table}\n", pytrace=False)


def gpu_words():
    """What docs/bench.md quotes of figures/gpu.json."""
    found = figure("gpu")
    head = ["| work | device | open-mythos | ours | ratio | bar | limit | share of it |",
            "|---|---|---|---|---|---|---|---|"]
    proofs = {}
    for name, kept in found["tests"]["recorded"].items():
        if "certificate" in kept:
            mode = name.partition("[")[2].partition("-")[0]
            proofs.setdefault(mode, []).append(kept["certificate"])
    modes = "; ".join(f"{mode} {sum(c['proved'] for c in of)} of {len(of)}"
                      for mode, of in sorted(proofs.items()))
    assert all(c["wrong"] == 0 for of in proofs.values() for c in of)
    said = (f"By `{found['command']}` on one {found['device']}, "
            f"torch {found['versions']['torch']}, "
            f"in {found['seconds']:.0f} s: {found['tests']['passed']} tests and "
            f"{found['notebooks']['passed']} notebooks with "
            f"{sum(found['notebooks']['claims'].values())} claims passed.")
    return [said, f"Certificates that hold: {modes}.",
            "\n".join([*head, *map(bench_line, found["bench"]["rows"])])]


def test_the_run_on_a_gpu_is_quoted():
    for words in gpu_words():
        if " ".join(words.split()) not in " ".join(PAGES["docs/bench.md"].split()):
            pytest.fail(f"after `make gpu` paste this into docs/bench.md:\n\n{words}\n",
                        pytrace=False)


ARMS = {"unlooped": "3 blocks, no loop", "unlooped-deep": "12 blocks, no loop",
        "reference": "ACT, 8 loops, as in open-mythos", "random-loops": "loop, reads its own state",
        "strict": "strict loop", "strict-carry": "strict loop with the carry"}


def language_table(file="language.json", arms=ARMS):
    """What docs/language.md quotes of rows: bits per byte by loops, the mean of three seeds."""
    rows = study.unpack(study.RESULTS / file)
    shown = [1, 2, 4, 8, 16, 128]
    lines = [f"| model | {' | '.join(map(str, shown))} | seeds, at its best |",
             "|---" * (len(shown) + 2) + "|"]
    for arm, name in arms.items():
        of = [row for row in rows if row["arm"] == arm]
        assert len(of) == 3
        at = [mean(row["bits"][row["loops"].index(n)] for row in of) for n in shown]
        least, most = (f(row["best"] for row in of) for f in (min, max))
        cells = [name, *(f"{x:.3f}" for x in at), f"{least:.3f} to {most:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def doubling_table():
    """The same of the loop that doubles, and of the ordinary one beside it."""
    return language_table("language_doubling.json", {"random-loops": ARMS["random-loops"],
                                                     "doubling": "doubling loop"})


def test_the_loop_that_doubles_on_text_is_quoted():
    if doubling_table() not in PAGES["docs/language.md"]:
        pytest.fail(f"paste this into docs/language.md:\n\n{doubling_table()}\n", pytrace=False)


def pace_table():
    """What docs/language.md quotes of three arms: bits on the validation side by steps, means."""
    rows = study.unpack(study.RESULTS / "language.json")
    steps = (100, 200, 400, 700, 1000, 1500)
    lines = [f"| model | {' | '.join(f'{step:,}' for step in steps)} |",
             "|---" * (len(steps) + 1) + "|"]
    for arm in ("random-loops", "strict", "strict-carry"):
        curves = [dict(row["validation"]) for row in rows if row["arm"] == arm]
        cells = [f"{mean(curve[step] for curve in curves):.3f}" for step in steps]
        lines.append(f"| {ARMS[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_how_fast_the_arms_learn_is_quoted():
    if pace_table() not in PAGES["docs/language.md"]:
        pytest.fail(f"paste this into docs/language.md:\n\n{pace_table()}\n", pytrace=False)


def balance_table():
    """What docs/language.md quotes of strict models with and without the balancing bias."""
    rows = study.unpack(study.RESULTS / "language_balance.json")
    head = ["balancing bias", "seed", "evenness of the loads", "division by kind",
            "bits at the best"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        rate = row["recipe"]["config"]["balance_rate"]
        division = max(max(of) - min(of) for of in zip(*row["experts_by_kind"].values()))
        lines.append(f"| {f'{rate} a step' if rate else 'none'} | {row['seed']} "
                     f"| {row['expert_entropy']:.3f} | {division:.2f} | {row['best']:.3f} |")
    return "\n".join(lines)


def test_the_balance_of_experts_on_text_is_quoted():
    if balance_table() not in PAGES["docs/language.md"]:
        pytest.fail(f"paste this into docs/language.md:\n\n{balance_table()}\n", pytrace=False)
    rows = study.unpack(study.RESULTS / "language_balance.json")
    recipes = [{**row["recipe"], "config": {**row["recipe"]["config"], "balance_rate": None}}
               for row in rows]
    assert all(recipe == recipes[0] for recipe in recipes)       # nothing else differs
    assert ([(row["recipe"]["config"]["balance_rate"], row["seed"]) for row in rows]
            == [(rate, seed) for rate in (0.0, 0.01) for seed in range(3)])


def test_the_bits_of_text_are_quoted_and_say_what_the_page_says():
    table, rows = language_table(), study.unpack(study.RESULTS / "language.json")
    if table not in PAGES["docs/language.md"]:
        pytest.fail(f"paste this into docs/language.md:\n\n{table}\n", pytrace=False)
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for a in ARMS for s in range(3)]
    best = {arm: [row["best"] for row in rows if row["arm"] == arm] for arm in ARMS}
    for row in rows:
        if row["trained_loops"] > 1:
            assert row["bits"][-1] - row["bits"][row["loops"].index(8)] < 1e-3
        if "one_loop" in row:
            assert row["largest_difference"] < 2e-5
    assert min(best["strict"]) < max(best["random-loops"])
    assert mean(best["strict-carry"]) < min(
        mean(best[arm]) for arm in ("strict", "random-loops", "reference"))
    others = [min(best[arm]) for arm in ARMS if "deep" not in arm]
    assert max(best["unlooped-deep"]) < min(others) - 0.06


def test_bounds_in_prose_hold():
    assert max(figure("overview")["article_token_accuracy"]) < 0.60
    assert figure("overview")["whole_string_accuracy"]["1024"][-1] == 1.0
    recipe = figure("training_recipe")
    assert (recipe["held_out_step"][-1] == 250 and min(seed[-1] for seed in recipe["whole_16_bits"])
            == 1.0)


def anchors(page):
    """What headings are called in an address: lower case, no punctuation, a hyphen for a space."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)", page, re.M)}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = re.sub(r"```.*?```", "", PAGES[name], flags=re.S)
    defined = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", page, re.M))
    assert set(re.findall(r"\]\[([\w-]+)\]", page)) == set(defined)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", page), *defined.values()]:
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_a_repository_is_ours_or_the_one_measured_against(name):
    named = re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", PAGES[name])
    assert set(named) <= {REPOSITORY, PEER}


def test_the_readme_says_how_to_install_and_what_it_is_measured_against():
    assert f"git clone {REPOSITORY} &&" in README and f"`pip install git+{REPOSITORY}`" in README
    tutorials = re.findall(r"https://www\.marktechpost\.com/\S+", README)
    assert PEER in README and len(set(tutorials)) == 2


@pytest.mark.parametrize("page, printed", [("README.md", 0), ("docs/use.md", 3)])
def test_the_code_runs(capsys, page, printed):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[page], re.S)
    exec(compile(code, page, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == printed


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name):
    """Make's targets, and the commands of `mythos` with their options."""
    given = re.findall(r"(?:^|`)mythos ([a-z]+)\b([^`\n]*(?:\\\n.*)*)", PAGES[name], re.M)
    for command, rest in given:
        parser = ArgumentParser()
        import_module(COMMANDS[command].module).options(parser)
        assert set(re.findall(r"(?<!\S)--\w[\w-]*", rest)) <= {*parser._option_string_actions}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+(?:-[a-z]+)*):", makefile, re.M)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", PAGES[name], re.M)) <= set(targets)
