"""A folder of weights, config.json and model.safetensors, read with distrust: whatever is wrong is
said by file, before anything of the size that it claims is built."""
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
import torch.nn as nn

from mythos_core.model.config import MythosConfig

Model = TypeVar("Model", bound=nn.Module)
PRETRAINED = Path(__file__).parents[1] / "pretrained"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TIED = {"head.weight", "embed.weight"}   # one tensor, of which a file has one name
#: Fields that count modules, and what names the tensors of the modules begin with.
COUNTED = {"prelude_layers": "prelude.", "coda_layers": "coda.",
           "n_shared_experts": "recurrent.block.ffn.shared."}


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model.safetensors"))


def read_config(file: Path) -> MythosConfig:
    """The MythosConfig in a config.json; keys that are not fields (provenance) are left out, and
    fields without a key get their defaults, with a warning that names them.

    Raises:
        FileNotFoundError, OSError: naming the file and what is wrong with it.
    """
    _require_file(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        names = MythosConfig.__dataclass_fields__
        config = MythosConfig(**{name: values[name] for name in values if name in names})
    except (ValueError, TypeError, RecursionError) as error:
        raise OSError(f"{file}: not a model configuration: {error}") from error
    missing = [f"{name} = {getattr(config, name)!r}" for name in names if name not in values]
    if missing:
        warnings.warn(f"{file}: defaults were taken for {', '.join(missing)}", stacklevel=3)
    return config


def load_weights(make: type[Model], config: MythosConfig, file: Path) -> Model:
    """`make(config)` with the weights of a safetensors file, in float64 if they are, else in
    float32.

    Raises:
        FileNotFoundError, OSError: naming the file and what is wrong with it: another shape than
            `config` asks for, or numbers that are none.
    """
    _require_file(file)
    try:
        header = _header(file)
        _compare(make, config, header)
        model = make(config)
        if "F64" in {dtype for dtype, _ in header.values()}:
            model = model.double()
        safetensors.torch.load_model(model, file)
        _require_finite(model)
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]   # torch's own go on with where in its source
        raise OSError(f"{file}: damaged, or not the weights of its config.json: "
                      f"{reason}") from error
    return model


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write, beside it, what is then to lie at `file`: which is all there, or as it was.

    Raises:
        OSError: naming the file that could not be written, and why.
    """
    beside = file.with_name(f"{file.name}.tmp")
    try:
        yield beside
        os.replace(beside, file)
    except (OSError, safetensors.SafetensorError) as error:     # a full disk has no name by itself
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{file}: could not be written: {reason}") from error
    finally:
        beside.unlink(missing_ok=True)


def save_weights(model: nn.Module, file: Path):
    """Write what `load_weights` reads, for whom the umask lets read it.

    Raises:
        OSError: as `whole`.
    """
    with whole(file) as beside:
        beside.touch()
        mode = beside.stat().st_mode             # safetensors' own is for the owner alone
        safetensors.torch.save_model(model, str(beside))
        beside.chmod(mode)


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights as a file of safetensors has them: of each tensor, by name, its name,
    dtype, shape and bytes; a tensor with two names counts as the embedding's."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name != "head.weight":
            kind = DTYPES[tensor.dtype]
            found.update(f"{name} {kind} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _require_file(file: Path):
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: missing; a model directory holds config.json and model.safetensors")
    if not file.is_file():                       # a pipe would keep its reader waiting
        raise OSError(f"{file}: not a regular file")


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor, by name."""
    with safetensors.safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}


def _compare(make, config: MythosConfig, header):
    """ValueError unless the header is that of the model that `config` describes."""
    for field, start in COUNTED.items():         # first: on "meta" too a million takes long
        numbers = {name[len(start):].split(".")[0] for name in header if name.startswith(start)}
        if len(numbers) != getattr(config, field):
            raise ValueError(f"it has {field} = {len(numbers)}, not {getattr(config, field)}")
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in make(config).state_dict().items()}
    missing = wanted.keys() - header.keys() - (TIED if TIED & header.keys() else set())
    for what, names in {"lacks": missing, "has unknown": header.keys() - wanted.keys()}.items():
        if names:
            raise ValueError(f"it {what} {sorted(names)}")
    for name, (dtype, shape) in header.items():
        if shape != wanted[name]:
            raise ValueError(f"{name} has the shape {shape}, not {wanted[name]}")
        if dtype not in DTYPES.values():
            raise ValueError(f"{name} is of dtype {dtype}: must be one of {list(DTYPES.values())}")


def _require_finite(model: nn.Module):
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
