"""KVCache: what a model keeps of the positions it has read, for each layer and each loop."""
import copy
import math
from contextlib import contextmanager

from torch import Tensor


class _Strip:
    """One cached tensor, positions on axis -2. The buffer starts at absolute position `first`.

    In memory positions are innermost: a product of a few queries with many keys is then three times
    as fast on a CPU. Room is made in steps of 16 positions, so that every channel starts at a cache
    line: MLA's product takes a quarter less.
    """

    def __init__(self, keep: int | None):
        self.buffer: Tensor | None = None
        self.first, self.keep = 0, keep

    def wanted_from(self, length: int) -> int:
        """First position that a token at `length` may still read."""
        return 0 if self.keep is None else max(self.first, length - self.keep)

    def write(self, x: Tensor, length: int, capacity: int) -> Tensor:
        """Put x at positions length, length + 1, ...; return what is wanted of the past, with x
        behind it."""
        begin, end = self.wanted_from(length), length + x.shape[-2]
        if self.buffer is None or end - self.first > self.buffer.shape[-2]:
            self._make_room(x, begin, length, max(end - begin, 2 * (length - begin),
                                                  capacity if self.keep is None else 0))
        self.newest(length, x.shape[-2]).copy_(x)
        return x if begin == length else self.newest(begin, end - begin)

    def newest(self, length: int, seq: int) -> Tensor:
        """The `seq` positions from `length` on, as written."""
        return self.buffer.narrow(-2, length - self.first, seq)

    def _make_room(self, like: Tensor, begin: int, length: int, size: int):
        old, past = self.buffer, slice(begin - self.first, length - self.first)
        room = *like.shape[:-2], like.shape[-1], -(-size // 16) * 16
        self.buffer, self.first = like.new_empty(*room).mT, begin
        if old is not None:
            self.buffer[..., : length - begin, :] = old[..., past, :]

    def nbytes(self, length: int) -> int:
        return (math.prod(self.buffer.shape[:-2]) * (length - self.wanted_from(length))
                * self.buffer.shape[-1] * self.buffer.element_size())


class KVCache:
    """Keys and values of the positions read so far, one entry for each layer outside the loop and
    for each loop; of a strict model one entry for all loops, which holds the settled states.

    An entry's buffer doubles when it is full, so appending a token costs amortised O(1) copies;
    with `capacity` known it is allocated once. An entry with a window keeps only what the window
    can still see. Nothing counts as read until the pass is over (`advance`): a pass that fails
    half-way leaves the cache as it was.

    Args:
        capacity: positions to allocate at first use; 0 = as many as the first pass brings.
        loops: entries for the loop; loop t uses entry t mod `loops`, so that a position leaves what
            its last loops gave (Huginn, Geiping et al. 2025), the size does not grow with n_loops,
            and n_loops >= loops may differ from pass to pass. None = one for each loop: the same
            logits as without a cache. A strict model has one and the same logits, and refuses
            another number, as a dilated one does, whose loops read different distances.

    Attributes:
        length: positions read, the position of the next token.
        nbytes: bytes of what a later token can read, over all entries; spare capacity is not
            counted.
        len(cache): the number of layer-loop entries: prelude_layers + n_loops + coda_layers once
            filled, or with a strict model prelude_layers + 1 + coda_layers.
    """

    def __init__(self, capacity: int = 0, loops: int | None = None):
        if capacity < 0:
            raise ValueError(f"capacity = {capacity}: must be 0 or more")
        if loops is not None and loops < 1:
            raise ValueError(f"loops = {loops}: must be 1 or more, "
                             "or None for an entry for each loop")
        self.capacity, self.loops, self.length = capacity, loops, 0
        self._strips: dict[tuple[str, str], _Strip] = {}
        self._made_for: dict | None = None

    def __len__(self) -> int:
        return len({layer for layer, _ in self._strips})

    @property
    def nbytes(self) -> int:
        return sum(strip.nbytes(self.length) for strip in self._strips.values())

    def begin(self, *, config, n_loops: int, **made_for):
        """Open a pass; refuse it, with a ValueError, if it differs from the first one in any of the
        named things: in n_loops only where an entry belongs to one loop."""
        made_for["config"] = config
        if self.loops is not None and config.one_map:
            name = "strict" if config.strict else "dilation"
            raise ValueError(f"kv_cache.loops = {self.loops}: must be None for a model "
                             f"whose {name} = {getattr(config, name)}")
        if self.loops is not None and n_loops < self.loops:
            raise ValueError(f"n_loops = {n_loops}: must be at least kv_cache.loops = "
                             f"{self.loops}, or an entry stays empty")
        if self.loops is None and not config.strict:
            made_for["n_loops"] = n_loops
        for name, value in (self._made_for or {}).items():
            if made_for[name] != value:
                raise ValueError(f"kv_cache was filled with {name} = {value}, this pass has "
                                 f"{name} = {made_for[name]}: use a new KVCache")
        self._pending = made_for
        if not self.length:
            self._strips.clear()  # left by a first pass that did not finish

    def extend(self, layer: str, name: str, x: Tensor, keep: int | None = None) -> Tensor:
        """Append x (..., S, d) to tensor `name` of `layer`; return (..., past + S, d), where past
        <= keep if given."""
        kind, _, number = layer.partition(".")
        if kind == "loop" and self.loops is not None:
            layer = f"loop.{int(number) % self.loops}"
        strip = self._strips.setdefault((layer, name), _Strip(keep))
        return strip.write(x, self.length, self.capacity)

    @contextmanager
    def all_or_nothing(self):
        """If what is done inside, a pass in several pieces, fails, the cache is left as it was."""
        before = self.length, self._made_for
        strips = {key: copy.copy(strip) for key, strip in self._strips.items()}
        try:
            yield
        except BaseException:            # pieces have been written behind what was there
            (self.length, self._made_for), self._strips = before, strips
            raise

    def advance(self, n_positions: int):
        """Count the positions of a finished pass as read."""
        self.length += n_positions
        self._made_for = self._pending
