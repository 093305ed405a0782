"""OpenMythos: prelude, looped block, coda; generation; weights in and out."""
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.attention import Context
from mythos_core.model.cache import KVCache
from mythos_core.model.config import MythosConfig
from mythos_core.model.dilated import DilatedBlock
from mythos_core.model.layers import NORM_EPS, RMSNorm, evaluating, known
from mythos_core.model.loop import Observer, RecurrentBlock, TransformerBlock
from mythos_core.model.sampling import check_sampling, columns, lengths_of, require, sample
from mythos_core.model.strict import StrictBlock
from mythos_core.model.weights import (
    PRETRAINED,
    digest,
    load_weights,
    read_config,
    save_weights,
    shipped,
)

FILES = ["config.json", "model.safetensors"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# positions of a strict model that are looped together behind a cache, unless n_loops says it:
PIECE = 8
#            loops grow with them, and passes of prelude and coda become fewer
# loops a position, at most, in which a strict model with the carry comes near enough to rest
SLOWLY = 100


class OpenMythos(nn.Module, PyTorchModelHubMixin):
    """A recurrent-depth transformer.

        e = prelude(embed(ids));  h_0 = e
        h_{t+1} = A * h_t + B * e + block(norm(h_t + e + ...))          for t = 0 .. T - 1
        logits = head(norm(coda(ACT-weighted sum of h_1 .. h_T)))       coda(h_T) with halting off

    The head's weight is the embedding's. Same weights, any T: depth is chosen at each call. With
    `config.strict` the loop must settle (`StrictBlock`), and T is as many loops as that takes; with
    `config.dilation` = r > 1 (`DilatedBlock`) T loops read r^T positions, and T is log_r(length).
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.prelude = nn.ModuleList(TransformerBlock(config) for _ in range(config.prelude_layers))
        block = (StrictBlock if config.strict else DilatedBlock if config.dilation > 1
                 else RecurrentBlock)
        self.recurrent: Any = block(config)
        self.coda = nn.ModuleList(TransformerBlock(config) for _ in range(config.coda_layers))
        self.norm = RMSNorm(config.dim, NORM_EPS)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self._init_weights()

    def __setattr__(self, name: str, value):
        """AttributeError for another config: the parts were made by the first, which is saved."""
        if name == "config" and "config" in vars(self):
            raise AttributeError("config: is fixed when the model is made; must be given to a new "
                                 "one, as OpenMythos(replace(model.config, ...))")
        super().__setattr__(name, value)

    def _init_weights(self):
        """Every matrix ~ N(0, init_std^2), the embedding by embed_std; vectors keep what their
        module gave them."""
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                embedding = self.config.embed_std if parameter is self.embed.weight else None
                nn.init.normal_(parameter, std=embedding or self.config.init_std)

    def forward(self, ids: Tensor, n_loops: int | None = None, kv_cache: KVCache | None = None,
                observer: Observer | None = None) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token at each position.

        Args:
            ids: (B, S) int64 tokens. Behind what `kv_cache` holds, if given: positions continue
                there. Pad shorter rows on the right, with any token: no position reads a later one.
                But in training the experts' load counts all, and a dilated model's default n_loops
                is for S.
            n_loops: T >= 1, the most loops; default max_loop_iters, or in a strict model as many as
                it takes to settle, and in a dilated one, without a cache, as many as read the whole
                string (and, with halting = "settled", one more that sees nothing change). With one
                cache, the same at every call, unless the model is strict.
            kv_cache: filled in place; a cached pass is inference and records no gradient. A strict
                model reads `ids` in pieces of n_loops * stride positions, which settle in n_loops;
                so its logits do not depend on n_loops, and n_loops = 1 is a recurrent network, left
                to right.
            observer: called with a `LoopRecord` after each loop that ran.

        Raises:
            ValueError: before any work, the cache untouched, naming the argument, its value and
                what is allowed.
        """
        settles, strict = n_loops is None and self.config.strict, self.config.strict
        if n_loops is None:
            n_loops = self._default_loops(ids.shape[1:].numel(), kv_cache)
        self._check(ids, n_loops, kv_cache)
        if kv_cache is None:
            ctx = self.context(ids)
            e = self.encode(ids, ctx)
            if settles and observer is None:
                return self.decode(self.recurrent.settle(e), ctx)
            if settles:
                n_loops = ids.shape[1] * (SLOWLY if self.config.carry else 1)
            return self.decode(self.recurrent(e, n_loops, ctx, observer), ctx)
        pieces = ids.split(n_loops * self.config.stride, 1) if strict else [ids]
        whole = kv_cache.all_or_nothing() if len(pieces) > 1 else nullcontext()
        with torch.inference_mode(), whole:      # the first spares small operations bookkeeping
            logits = [self._cached(piece, n_loops, kv_cache, observer) for piece in pieces]
        return torch.cat(logits, 1)  # outside: one that may be changed in place

    def _default_loops(self, seq, kv_cache):
        c = self.config
        if c.strict:
            return PIECE
        if c.dilation == 1:
            return c.max_loop_iters
        if kv_cache is None:
            return self.recurrent.loops_for(seq) + (c.halting == "settled")
        most, length = c.dilation ** c.max_loop_iters, kv_cache.length + seq
        require(length <= most, "sequence length", length,
                f"at most dilation ** max_loop_iters = {most} where n_loops is not given")
        return c.max_loop_iters

    def _cached(self, ids, n_loops, kv_cache, observer):
        ctx = self.context(ids, kv_cache)
        if self.config.strict:                                   # more would change nothing
            n_loops = min(n_loops, -(-ids.shape[1] // self.config.stride))
        logits = self.decode(self.recurrent(self.encode(ids, ctx), n_loops, ctx, observer), ctx)
        kv_cache.advance(ids.shape[1])
        return logits

    def context(self, ids: Int[Tensor, "batch seq"], kv_cache: KVCache | None = None) -> Context:
        """What the layers of one pass over `ids` share."""
        return Context.of(self.config, len(ids), ids.shape[1], kv_cache, like=self.embed.weight)

    def encode(self, ids: Int[Tensor, "batch seq"], ctx: Context) -> Float[Tensor, "batch seq dim"]:
        """e = prelude(embed(ids)), with which a pass begins."""
        self.recurrent.block.ffn.begin()
        x = self.embed(ids)
        for i, block in enumerate(self.prelude):
            x, _ = block(x, ctx, f"prelude.{i}")
        return x

    def decode(self, output: Float[Tensor, "batch seq dim"],
               ctx: Context) -> Float[Tensor, "batch seq vocab"]:
        """head(norm(coda(output)))."""
        for i, block in enumerate(self.coda):
            output, _ = block(output, ctx, f"coda.{i}")
        return self.head(self.norm(output))

    def without_halting(self) -> "OpenMythos":
        """A copy in eval mode that runs every loop it is asked for: the same weights, halting =
        "none"."""
        free = OpenMythos(replace(self.config, halting="none")).to(self.embed.weight)
        free.load_state_dict({name: weight for name, weight in self.state_dict().items()
                              if not name.startswith("recurrent.act.")})
        return free.eval()

    def generate(self, ids: Tensor, max_new_tokens: int = 64, n_loops: int = 8,
                 temperature: float = 1.0, top_k: int = 50,
                 generator: torch.Generator | None = None, use_cache: bool = True,
                 cache_loops: int | None = None, observer: Observer | None = None,
                 top_p: float = 1.0, stop: int | Sequence[int] | None = None,
                 lengths: Sequence[int] | Tensor | None = None,
                 kv_cache: KVCache | None = None) -> Int[Tensor, "batch longer"]:
        """`ids` (B, S) continued by `max_new_tokens` sampled tokens: (B, S + max_new_tokens), in
        eval mode whatever the model's.

        Args:
            n_loops: loops for every token; a strict model reads the prompt in pieces of as many
                positions, and then takes one loop for each token, whatever n_loops is; a dilated
                one takes as many as read all that there will be, or with a kv_cache max_loop_iters.
            temperature: divides the logits; 0 = the most likely token.
            top_k: sample among that many most likely tokens; 0 or more than vocab_size = among all.
            generator: source of randomness; default torch's own.
            use_cache: False recomputes every token from scratch; slower, same tokens.
            cache_loops: `KVCache.loops`: fewer entries than loops, other logits. A strict model has
                one anyway.
            observer: as for `forward`; sees every pass.
            top_p: of the top_k, sample among the most likely, as few as have that share of their
                probability (nucleus sampling, Holtzman et al. 2020).
            stop: a token, or several, at which a row ends. From there on the row repeats it, and
                what is returned ends where the last row does.
            lengths: (B,) tokens of each row's prompt, in 1 .. S; the row's other ids are padding:
                any tokens, and not read. Each row is continued behind its own, to the common end,
                as it would be alone (unless cache_loops shares entries: other passes, other
                logits).
            kv_cache: holds what comes before `ids`, and is filled on. Afterwards it lacks only the
                newest column, with which the next call's ids have to begin.

        Raises:
            ValueError: before any work, naming the argument, its value and what is allowed.
        """
        new = self.stream(ids, max_new_tokens, n_loops, temperature, top_k, generator,
                          use_cache, cache_loops, observer, top_p, stop, lengths, kv_cache)
        shared = ids.shape[1] if lengths is None else int(min(lengths))
        return torch.cat([ids[:, :shared], *new], 1)

    def stream(self, ids: Tensor, max_new_tokens: int = 64, n_loops: int = 8,
               temperature: float = 1.0, top_k: int = 50,
               generator: torch.Generator | None = None, use_cache: bool = True,
               cache_loops: int | None = None, observer: Observer | None = None,
               top_p: float = 1.0, stop: int | Sequence[int] | None = None,
               lengths: Sequence[int] | Tensor | None = None,
               kv_cache: KVCache | None = None) -> Iterator[Int[Tensor, "batch 1"]]:
        """What `generate` puts behind the shortest prompt, column by column, each when it is drawn.
        Arguments and errors are those of `generate`. Between columns the model is in its own mode,
        and a kv_cache lacks the column given last."""
        self._check(ids, n_loops, None)
        length = ids.shape[1] + max_new_tokens
        self._check_new(max_new_tokens, length, kv_cache)
        check_sampling(temperature, top_k, top_p)
        stops, lengths = self._stops(stop, ids), lengths_of(lengths, ids)
        require(use_cache or kv_cache is None, "use_cache", use_cache, "True with a kv_cache")
        require(cache_loops is None or (use_cache and kv_cache is None), "cache_loops",
                cache_loops, "None if use_cache is False, or with a kv_cache")
        n_loops = self._loops_to(length, n_loops, use_cache, kv_cache)
        cache = KVCache(length, cache_loops) if use_cache and kv_cache is None else kv_cache
        if use_cache:
            self._check(ids, n_loops, cache)
        start, modules = cache.length if use_cache else 0, list(self.modules())

        def draw(read):
            unread = read[:, cache.length - start:] if use_cache else read
            with torch.no_grad(), evaluating(modules):
                logits = self(unread, n_loops, cache, observer)[:, -1]          # (B, vocab)
            return sample(logits, temperature, top_k, generator, top_p)
        return columns(ids, lengths, length, draw, stops)

    def _check_new(self, max_new_tokens, length, kv_cache):
        most = self.config.max_output_tokens
        require(1 <= max_new_tokens <= most, "max_new_tokens", max_new_tokens,
                f"in 1 .. max_output_tokens = {most}")
        start, before = (0, "") if kv_cache is None else (kv_cache.length, "kv_cache.length + ")
        self._check_length(f"{before}ids.shape[1] + max_new_tokens", start + length)

    def _loops_to(self, length, n_loops, use_cache, kv_cache):
        """The loops of a generation up to `length` positions, behind those of `kv_cache`."""
        if self.config.dilation > 1 and kv_cache is None:
            return self.recurrent.loops_for(length)
        if self.config.dilation > 1:
            return self._default_loops(length, kv_cache)
        return None if self.config.strict and not use_cache else n_loops

    def _stops(self, stop, ids):
        vocab = self.config.vocab_size
        tokens = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        require(all(isinstance(token, int) and 0 <= token < vocab for token in tokens), "stop",
                stop, f"tokens, in 0 .. vocab_size - 1 = {vocab - 1}")
        return ids.new_tensor(tokens)

    def _check(self, ids, n_loops, kv_cache):
        vocab, start = self.config.vocab_size, kv_cache.length if kv_cache is not None else 0
        require(isinstance(n_loops, int) and n_loops >= 1, "n_loops",
                n_loops, "an integer, at least 1")
        require(ids.dim() == 2 and ids.numel() > 0, "ids.shape",
                tuple(ids.shape), "(batch, seq), neither of them 0")
        require(ids.dtype == torch.int64, "ids.dtype", ids.dtype, "torch.int64")
        low, high = known(lambda: [int(x) for x in ids.aminmax()]) or (0, 0)
        require(low >= 0 and high < vocab, "ids",
                f"tokens {low} .. {high}", f"in 0 .. vocab_size - 1 = {vocab - 1}")
        self._check_length("sequence length", start + ids.shape[1])
        if kv_cache is not None:
            kv_cache.begin(config=self.config, batch=len(ids), n_loops=n_loops,
                           dtype=self.embed.weight.dtype, device=ids.device)

    def _check_length(self, name, length):
        most = self.config.max_seq_len
        require(most is None or length <= most, name, length, f"at most max_seq_len = {most}")

    def _save_pretrained(self, save_directory: Path):
        """The weights' part of `save_pretrained`."""
        save_weights(self, save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a name is not a keyword
            cls, name_or_dir: str | Path, *, map_location="cpu", **hub) -> "OpenMythos":
        """A model in eval mode: one that ships with the package (by name), `save_pretrained`'s
        directory, or a hub id. A Path is always a directory.

        Args:
            map_location: device to load to.
            hub: for a hub id, the options of huggingface_hub's download.

        Raises:
            ValueError: for a name that is none of these.
            TypeError: naming an option that there is not, or that has no meaning here.
            FileNotFoundError, OSError: naming the file that is missing or damaged, and what is
                wrong with it.
        """
        by_name = isinstance(name_or_dir, str) and name_or_dir in shipped()
        folder = PRETRAINED / name_or_dir if by_name else Path(name_or_dir)
        is_hub_id = isinstance(name_or_dir, str) and HUB_ID.fullmatch(name_or_dir)
        allowed = HUB_OPTIONS if is_hub_id and not folder.is_dir() else ()
        for option in hub:
            if option not in allowed:
                raise TypeError(f"from_pretrained({str(name_or_dir)!r}) has no option {option!r}: "
                                f"map_location, and for a hub id {', '.join(HUB_OPTIONS)}; "
                                "the model's .to(...) changes its dtype")
        if not folder.is_dir():
            require(is_hub_id, "name_or_dir", repr(str(name_or_dir)),
                    f"a directory, a hub id 'owner/name', or one of {shipped()}")
            folder = Path(snapshot_download(str(name_or_dir), allow_patterns=FILES, **hub))
        config = read_config(folder / "config.json")
        model = load_weights(cls, config, folder / "model.safetensors")
        _compare_with_certificate(model, folder / "certificate.json")
        return model.to(map_location).eval()


def _compare_with_certificate(model, file: Path):
    """Warn where a certificate lies beside weights that it is not of."""
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        of = found["weights"], found["config"]
    except (ValueError, KeyError, TypeError) as error:
        of = "nothing", f"that can be read ({type(error).__name__})"
    if of != (digest(model), asdict(model.config)):
        warnings.warn(f"{file}: is of other weights than those beside it, or of another config: "
                      f"of {of}", stacklevel=3)
