"""The peer that we are measured against, open-mythos 0.5.0: its main.py alone, without importing
the package and what it pulls in."""
import importlib.util
from dataclasses import fields
from functools import cache

import torch

from mythos_core import MythosConfig


@cache
def load():
    """The module main.py of the package."""
    package = importlib.util.find_spec("open_mythos")
    spec = importlib.util.spec_from_file_location("open_mythos_main",
                                                  package.submodule_search_locations[0]
                                                  + "/main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(config: MythosConfig, std: float = 0.02):
    """A reference model with our config's hyper-parameters; its weights at `std`, so that logits
    are not all alike."""
    main = load()
    made = main.OpenMythos(main.MythosConfig(**{f.name: getattr(config, f.name)
                                                for f in fields(main.MythosConfig)}))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return made
