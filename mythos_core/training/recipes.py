"""What is trained and how: a model, its task, and the settings of the training."""
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mythos_core.model.config import MythosConfig, parity_config
from mythos_core.tasks.corpus import Corpus
from mythos_core.tasks.groups import group
from mythos_core.tasks.machines import Machine, machine

FEW = 12            # states up to which a machine fits narrow experts and small batches
MOST_MOVES = 20_000  # states times letters: each has to be met in training, and many times


@dataclass(frozen=True)
class Recipe:
    """How a model is trained to track a state, or to predict the next byte of a text: AdamW, one
    batch of one length and one number of loops a step.

    A recipe with a machine ends when the certificate holds: the learning rate stays until the model
    is proved for the first time, or `training.schedule.PATIENCE` attempts have been refused, and
    then falls for as many steps again; if the proof holds at their end the training is done, else
    it goes on. `steps` is then the most there may be.
    """

    name: str
    config: MythosConfig
    # what is to be proved; None = nothing, and the task is that of `group`
    machine: Machine | None = None
    steps: int = 600
    batch: int = 64
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0                       # largest gradient norm
    warmup: int = 0                         # steps over which the learning rate rises to lr
    # last fraction of the steps, over which it falls to 0.01 lr; with a machine only if nothing
    # has been proved by then
    decay: float = 0.0
    # shortest and longest string; one length a step, by `training.schedule.draw`
    lengths: tuple[int, int] = (24, 24)
    # first fraction of the steps, over which the longest length grows from 3; the shortest is at
    # most that
    curriculum: float = 0.0
    # fewest and most loops, drawn uniformly ...
    # None, for strict models: until they settle, left to right
    loops: tuple[int, int] | None = (3, 3)
    # ... but at most the length and this many; None = however many
    spare_loops: int | None = None
    group: str = "Z2"                       # of `groups.group`; Z2 is prefix parity
    generators: bool = False                # of `Group.make_batch`, as
    strings: str = "uniform"
    # score only as far as T loops reach: `reach` * T positions; None = all. This sets the speed
    # that is learned: what is scored must be answered in time
    reach: float | None = None
    # each move of the machine counts the same in a batch's loss, however rare; else each position
    balanced: bool = False
    # share of states that the next position reads as the mean of those that mean the same
    handed_on: float = 0.0
    # weight of `losses.state_loss`: states that get the same answers for long are told apart
    state_loss: float = 0.0
    # weight, while the learning rate falls, of `losses.center_loss`, and of a dilated model of
    # `losses.spread_ratio`; of one that is to contract, whether it is told labels then
    center_loss: float = 0.0
    # weight, while the learning rate falls, of `losses.steepness`: the loop is to contract, and the
    # weights as trained are what is proved at the end of the fall
    contraction: float = 0.0
    ponder_cost: float = 0.0                # for halting = "act_remainder": weight of Graves' N + R
    corpus: Corpus | None = None            # the task is its next byte, and `strings` the split

    @property
    def scans(self) -> bool:
        """Whether a dilated model is trained to multiply what letters do to the machine."""
        return self.machine is not None and self.config.dilation > 1

    @property
    def make_batch(self):
        """`make_batch` of the recipe's corpus or machine, or of its group with its alphabet."""
        if self.corpus is not None:
            return self.corpus.make_batch
        if self.machine is not None:
            return self.machine.make_batch
        return partial(group(self.group).make_batch, generators=self.generators)

    def as_dict(self) -> dict:
        """Every field as JSON has it."""
        plain = {name: value for name, value in vars(self).items()
                 if name not in ("config", "machine", "corpus")}
        return plain | {"config": asdict(self.config),
                        "machine": self.machine and self.machine.as_dict(),
                        "corpus": self.corpus and self.corpus.as_dict()}


def recipe_for(machine: Machine, **changes) -> Recipe:
    """The recipe that trains a model until it is proved to be `machine`: strict, without
    the carry, without positions, and with a window of 1, so that a state is handed on
    from each position to the next.

    Args:
        changes: to the recipe's fields; by "config.NAME" to the model's.

    Raises:
        ValueError: for a machine too large to be trained.
    """
    if len(machine) * machine.letters > MOST_MOVES:
        raise ValueError(f"machine {machine.name!r} has {len(machine):,} states x "
                         f"{machine.letters:,} letters: must be at most {MOST_MOVES:,} together")
    few = len(machine) <= FEW
    model = dict(vocab_size=max(4, machine.vocab_size), max_seq_len=None, strict=True,
                 halting="settled", carry=False, rope=False, window=1, loop_embedding=False,
                 lora_rank=0, init_std=64 ** -0.5, expert_dim=32 if few else 128, loop_noise=0.3)
    model |= {name.removeprefix("config."): changes.pop(name)
              for name in list(changes) if name.startswith("config.")}
    training = dict(steps=4000, batch=64 if few else 128, lr=4e-3, betas=(0.9, 0.98), warmup=30,
                    lengths=(9, 16), curriculum=0.03, loops=None,
                    strings="covering" if machine.reversible else "touring",
                    balanced=not machine.reversible,
                    state_loss=0.0 if machine.reversible else 0.3, handed_on=0.5,
                    center_loss=1.0)
    return Recipe(**{"name": machine.name, "config": parity_config(**model), "machine": machine,
                     **training, **changes})


def doubling_recipe(machine: Machine, **changes) -> Recipe:
    """The recipe that trains a dilated model until it is proved to be `machine`: its loops multiply
    what stretches of letters do, each loop stretches twice as long. Trained on 3 loops and 8
    letters at most; every loop is asked what is to be answered to the letters that it has read.

    Args:
        changes: as `recipe_for`.

    Raises:
        ValueError: for a machine whose monoid is too large, or which does not ask everywhere.
    """
    # one expert: where none is chosen, no choice can be close
    model = dict(vocab_size=max(4, machine.vocab_size), max_seq_len=None, dilation=2,
                 halting="settled", carry=False, rope=False, window=1, loop_embedding=False,
                 lora_rank=0, init_std=64 ** -0.5, n_experts=1, n_experts_per_tok=1,
                 expert_dim=64 if len(machine.monoid()) <= FEW else 256, loop_noise=0.3,
                 loop_norm=True)
    model |= {name.removeprefix("config."): changes.pop(name)
              for name in list(changes) if name.startswith("config.")}
    training = dict(steps=4000, batch=64, lr=4e-3, betas=(0.9, 0.98), warmup=30, lengths=(2, 8),
                    loops=(1, 3), handed_on=0.5, center_loss=1.0,
                    strings="touring" if machine.strings.has_traps else "uniform")
    return Recipe(**{"name": f"doubling-{machine.name}", "config": parity_config(**model),
                     "machine": machine, **training, **changes})


def contracting_recipe(machine: Machine, doubling: bool = False, **changes) -> Recipe:
    """The recipe that trains a strict or a doubling model until its weights as trained, unrounded,
    are proved to be `machine`: while the learning rate falls, a loop is asked to forget what it is
    off by.

    Args:
        changes: as `recipe_for`.
    """
    # an embedding that is not dwarfed by the state, exact as it is: no prelude's rounding comes in
    model = {"config.loop_norm": True, "config.prelude_layers": 0, "config.coda_layers": 0,
             "config.embed_std": 0.5, "config.n_experts_per_tok": 1, "state_loss": 0.0}
    if not doubling:
        model |= {"config.n_experts": 1, "config.expert_dim": 64 if len(machine) <= FEW else 256}
        return recipe_for(machine, **{"name": f"contracting-{machine.name}", "contraction": 0.3,
                                      **model, **changes})
    # Few channels round little. Of several experts the one that is chosen is the same all around a
    # state: so they tell products apart, where one expert for all has to be steep.
    model |= {"config.dim": 32, "config.n_heads": 2, "config.n_kv_heads": 2, "config.n_experts": 8,
              "config.expert_dim": 64}
    return doubling_recipe(machine, **{"name": f"contracting-doubling-{machine.name}",
                                       "contraction": 12.0, "steps": 8000, **model, **changes})


#: What the recipes that let a position read its own state, and extrapolate by luck, share: the
#: model, and its training.
_MODEL: dict[str, Any] = dict(vocab_size=4, max_seq_len=4096, halting="none", loop_embedding=False,
                              lora_rank=0, token_shift=True, init_std=64 ** -0.5)
_TRAINING: dict[str, Any] = dict(batch=40, lr=2e-3, betas=(0.9, 0.98), warmup=50, decay=0.8,
                                 lengths=(9, 16), curriculum=0.25, loops=(1, 16), strings="mixed",
                                 reach=1.5)


def _carrying(name: str, steps: int) -> Recipe:
    tracked = group(name)
    config = parity_config(**{**_MODEL, "vocab_size": len(tracked) + 1}, expert_dim=128, window=2,
                           loop_noise=0.1, start_noise=1.0)
    return Recipe(f"{name}-carrying", config, None, steps,
                  **{**_TRAINING, "decay": 0.7, "curriculum": 0.3, "reach": 1.0},
                  group=name, generators=len(tracked) > 50)


RECIPES = {recipe.name: recipe for recipe in (
    Recipe("parity-seed", parity_config()),
    recipe_for(machine("parity"), name="parity-extrapolating"),
    *(recipe_for(machine(name), name=f"state-{name}") for name in ("Z5", "S3", "A5", "S5")),
    *(doubling_recipe(machine(name)) for name in ("parity", "Z5", "S3", "addition")),
    doubling_recipe(machine("A5-all"), name="doubling-A5"),
    *(contracting_recipe(machine(name)) for name in ("parity", "Z5", "S3", "addition")),
    *(contracting_recipe(machine(name), doubling=True)
      for name in ("parity", "Z5", "S3", "addition")),
    Recipe("parity-carrying", parity_config(**_MODEL, window=4, loop_noise=0.3, start_noise=4.0),
           **_TRAINING),
    *(_carrying(name, steps) for name, steps in
      {"Z2": 600, "Z5": 1500, "S3": 1500, "A5": 2200, "S5": 3200}.items()),
)}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError listing the names there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe = {name!r}: must be one of {sorted(RECIPES)}")
    return RECIPES[name]
