"""The K/V policy: the dtype of the main blocks' K and V, their groups of image tokens, their reuse.

Axes: B pictures, T tokens (image first), S keys (T, with the image tokens pooled), N heads, H head
width; half: H / 2.

Grouping: keys and values are averaged over g x g image tokens. A pooled key is rotated (RoPE) to
the position of the group's centre, and the log of the group's token count is added to its score, so
that it has the weight of the tokens it stands for. Caption and pad tokens are not grouped. Reuse:
an NFE uses the K and V of an earlier one and does not need to_k, norm_k and to_v.

Packed K and V (CODINGS; kv_codes.py) hold K before RoPE. Attention decodes and rotates the keys of
few heads at a time, so that no decoded copy of all heads lies beside the packed one.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from ..errors import UsageError
from . import kv_codes, ops
from .attention import Attend
from .attention import attention as attention_of
from .kv_codes import Codes, Coding

SWITCH_T = 500.0  # the last two of Turbo's 8 NFEs have this t or a lower one
FP8 = jnp.dtype(jnp.float8_e4m3fn)
DTYPES = {
    "float32": jnp.dtype(jnp.float32),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
    "fp8": FP8,  # with a scale per head
}
# packed K and V by name: the codings of K and of V. In k5v6 K has 5 bits and V 6
CODINGS = {f"int{bits}": (Coding(bits, by_channel=False),) * 2 for bits in (8, 6)} | {
    f"k{k}v{v}": (Coding(k, by_channel=True), Coding(v, by_channel=True))
    for k, v in itertools.product((4, 5, 6), repeat=2)
}
# default dtypes, early and late, by compute dtype: a card that computes in float16 lacks bf16
OWN_DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bf16", "fp16"),
    "float16": ("fp16", "fp16"),
}
GROUPS = (1, 2, 4)
Tree = TypeVar("Tree")
# layers of a block that an NFE does not need if it reuses K and V
UNUSED_WHEN_REUSED = ("attention.to_k", "attention.to_v", "attention.norm_k")


@dataclass(frozen=True)
class KVFormat:
    """How one NFE of a job stores K and V: the static part."""

    dtype: str  # a name in DTYPES or CODINGS
    group: int = 1  # side of a group in tokens
    grid: tuple[int, int] | None = None  # rows and columns of image tokens; None: no groups

    def keys(self, tokens: int) -> int:
        """S, the number of keys, for T = `tokens`."""
        if self.grid is None:
            return tokens
        groups = math.prod(len(_spans(n, self.group)) for n in self.grid)
        return tokens - math.prod(self.grid) + groups

    def nbytes(self, contexts: int, tokens: int, heads: int, width: int) -> int:
        """Bytes of one block's K and V, for heads of `width` channels."""
        shape = contexts, self.keys(tokens), heads, width
        return sum(
            how.nbytes(*shape)
            if isinstance(how, Coding)
            else math.prod(shape) * how.itemsize + (contexts * heads * 4 if how == FP8 else 0)
            for how in self.stored
        )

    @property
    def stored(self) -> tuple[np.dtype | Coding, np.dtype | Coding]:
        """What K is stored in, and what V."""
        return self.codings or (DTYPES[self.dtype], DTYPES[self.dtype])

    @property
    def codings(self) -> tuple[Coding, Coding] | None:
        """How K and V are packed; None if they are not."""
        return CODINGS.get(self.dtype)

    def attention_dtype(self, compute) -> np.dtype:
        """The dtype of attention's q, k and v in a model computed in `compute`."""
        own = self.codings or self.dtype == "fp8"
        return jnp.dtype(compute) if own else DTYPES[self.dtype]

    def query_dtype(self, compute) -> np.dtype:
        """The dtype of Q after RoPE: float32 for fp8, because K's scales multiply Q."""
        return jnp.dtype(jnp.float32) if self.dtype == "fp8" else self.attention_dtype(compute)

    def in_runs(self, function: Callable[..., Tree], *arrays: Array | np.ndarray) -> Tree:
        """`function` of a block's tokens and what belongs to them, by ops.in_runs where a stored K
        or V depends on its own tokens or its neighbours alone."""
        if self.grid is not None or self.dtype == "fp8":  # its group; the scale of its head
            return function(*arrays)
        together = max(how.together if isinstance(how, Coding) else 1 for how in self.stored)
        return ops.in_runs(function, *arrays, together=together)


def plain(compute) -> KVFormat:
    """K and V without groups, in the compute dtype."""
    return KVFormat(next(name for name, dtype in DTYPES.items() if dtype == compute))


class Nfe(NamedTuple):
    """What one NFE does with K and V."""

    kv_format: KVFormat
    keeps: bool = False  # it stores the K and V it computes for a later NFE
    reuses: bool = False  # it uses the K and V that an earlier NFE stored


class Phase(NamedTuple):
    """Consecutive NFEs that store K and V alike."""

    kv_format: KVFormat
    steps: int  # number of NFEs
    reuse: int = 1  # NFEs that share one K and V; 1: none

    def nfes(self) -> Iterator[Nfe]:
        """What each NFE of the phase does with K and V, in order."""
        for index in range(self.steps):
            computes, is_last = index % self.reuse == 0, index + 1 == self.steps
            keeps = computes and self.reuse > 1 and not is_last
            yield Nfe(self.kv_format, keeps=keeps, reuses=not computes)

    @property
    def caches(self) -> bool:
        """Whether an NFE of the phase uses the K and V of an earlier one."""
        return self.reuse > 1 and self.steps > 1


@dataclass(frozen=True)
class KVPolicy:
    """The options about K and V. A pair is (early, late): early while t > switch_t, then late.

    Raises UsageError for a value that is not allowed.
    """

    # names in DTYPES or CODINGS; None: OWN_DTYPES of the compute dtype
    dtype: tuple[str, str] | None = None
    switch_t: float | int = SWITCH_T  # on the scheduler's scale, 1000 to 0
    group: tuple[int, int] = (1, 1)  # side of a group in tokens, one of GROUPS
    reuse: int = 1  # NFEs that share one K and V; 1: none

    def __post_init__(self):
        for name in self.dtype or ():
            if name not in DTYPES and name not in CODINGS:
                raise UsageError(
                    f"K/V dtype {name!r}: expected one of {', '.join(DTYPES)}, int8, int6, or "
                    "k5v6 and the like, with 4 to 6 bits each"
                )
        if self.dtype and self.dtype[1] == "fp8":
            raise UsageError(
                "K/V dtype fp8 is for the early NFEs only: give the late dtype too, as in fp8:fp16"
            )
        for g in self.group:
            if g not in GROUPS:
                raise UsageError(f"K/V group {g}: expected one of {', '.join(map(str, GROUPS))}")
        if self.reuse < 1:
            raise UsageError(f"K/V reuse {self.reuse}: expected 1 (none) or more NFEs")
        if not 0 <= self.switch_t <= 1000:
            raise UsageError(f"K/V switch at t {self.switch_t:g}: expected 0 to 1000")

    @classmethod
    def parse(
        cls,
        dtype: str | None = None,
        switch_t: float | int = SWITCH_T,
        group: str | int = "1",
        reuse: int = 1,
    ) -> "KVPolicy":
        """From option values: "bf16:fp16" is (early, late), "bf16" is both. Raises UsageError."""
        groups = _pair(str(group), "group")
        if not all(g in map(str, GROUPS) for g in groups):
            raise UsageError(f"K/V group {group!r}: expected 1, 2 or 4, or EARLY:LATE as in 2:1")
        early, late = (int(g) for g in groups)
        return cls(_pair(dtype, "dtype") if dtype else None, switch_t, (early, late), reuse)

    def phases(
        self, times: Float[np.ndarray, "nfes"], compute, rows: int, columns: int
    ) -> tuple[Phase, ...]:
        """The phases of a job with `rows` x `columns` image tokens.

        `times`: the scheduler's t of each NFE (1000 sigma), falling.
        """
        own = OWN_DTYPES[jnp.dtype(compute).name]
        early, late = (
            KVFormat(dtype, group, (rows, columns) if group > 1 else None)
            for dtype, group in zip(self.dtype or own, self.group, strict=True)
        )
        before = int(np.sum(times > self.switch_t))
        if early == late:
            before = len(times)
        found = Phase(early, before, self.reuse), Phase(late, len(times) - before, self.reuse)
        return tuple(phase for phase in found if phase.steps)

    def to_json(self) -> dict[str, str | float | int | None]:
        """The arguments of `parse`."""
        dtype = _join(self.dtype) if self.dtype else None
        return {
            "dtype": dtype,
            "switch_t": self.switch_t,
            "group": _join(self.group),
            "reuse": self.reuse,
        }


def _pair(text: str, name: str) -> tuple[str, str]:
    values = text.split(":")
    if len(values) > 2:
        raise UsageError(f"K/V {name} {text!r}: expected one value, or EARLY:LATE")
    return values[0], values[-1]


def _join(pair: tuple) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}"


# -- groups ----------------------------------------------------------------------------------------


def _spans(count: int, group: int) -> list[tuple[int, int]]:
    """(start, end) of each group of `count` rows or columns; the last group may be smaller."""
    return [(start, min(start + group, count)) for start in range(0, count, group)]


def centres(count: int, group: int) -> Float[np.ndarray, "groups"]:
    """The centre of each group of `count` rows or columns, in tokens."""
    return np.array([(first + last - 1) / 2 for first, last in _spans(count, group)])


def _sizes(kv_format: KVFormat) -> Float[np.ndarray, "groups"]:
    """The number of tokens that each pooled key stands for."""
    rows, columns = (
        [last - first for first, last in _spans(n, kv_format.group)] for n in kv_format.grid or ()
    )
    return np.outer(rows, columns).ravel().astype(np.float32)


def pool(x: Float[Array, "B T N H"], kv_format: KVFormat) -> Float[Array, "B S N H"]:
    """`x` averaged over each group of image tokens; other tokens unchanged."""
    if kv_format.grid is None:
        return x
    (rows, columns), g = kv_format.grid, kv_format.group
    batch, _, *head = x.shape
    image, rest = jnp.split(x, [rows * columns], 1)
    image = image.reshape(batch, rows, columns, *head)
    image = jnp.pad(image, ((0, 0), (0, -rows % g), (0, -columns % g), (0, 0), (0, 0)))
    image = image.reshape(batch, -(-rows // g), g, -(-columns // g), g, *head).sum((2, 4))
    sizes = _sizes(kv_format)[None, :, None, None]
    return jnp.concatenate([image.reshape(batch, -1, *head) / sizes, rest], 1)


def score_bias(kv_format: KVFormat, keys: int) -> Float[np.ndarray, "S"] | None:
    """The bias of the scores of S = `keys` keys: log of the number of tokens each stands for."""
    if kv_format.grid is None:
        return None
    sizes = np.log(_sizes(kv_format))
    return np.concatenate([sizes, np.zeros(keys - len(sizes), np.float32)])


# -- stored K and V --------------------------------------------------------------------------------


class KeyTable(NamedTuple):
    """Rotations and mask of keys."""

    cos: Float[Array | np.ndarray, "B S half"]
    sin: Float[Array | np.ndarray, "B S half"]
    # keys at this index and beyond are masked; None masks none
    lengths: Int[Array | np.ndarray, "B"] | None

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Which keys are not masked."""
        batch, keys, _ = self.cos.shape
        if self.lengths is None:
            return jnp.ones((batch, keys), bool)
        return jnp.arange(keys)[None] < self.lengths[:, None]


class Scaled(NamedTuple):
    """K or V in fp8: the value is `values` times `scale`."""

    values: Float[Array, "B S N H"]
    scale: Float[Array, "B 1 N 1"]


Stored = Shaped[Array, "B S N H"] | Scaled | Codes


class KV(NamedTuple):
    """K and V as stored; K after RoPE, but before it if packed."""

    k: Stored
    v: Stored


def keep_keys(
    k: Float[Array, "B S N H"],
    cos: Float[Array | np.ndarray, "B S half"],
    sin: Float[Array | np.ndarray, "B S half"],
    valid: Bool[Array | np.ndarray, "B S"],
    kv_format: KVFormat,
) -> Stored:
    """K as stored, from float32 before RoPE, pooled."""
    if not kv_format.codings:
        k = ops.rotate_pairs(k, cos, sin)
    return keep(k, valid, kv_format.stored[0])


def keep(
    x: Float[Array, "B S N H"],
    valid: Bool[Array | np.ndarray, "B S"],
    how: np.dtype | Coding,
) -> Stored:
    """K or V as stored, from float32: rounded once, or packed. Values beyond a dtype saturate.

    Masked keys, those not `valid`, count for no scale: a batch gives the bits of single pictures.
    """
    if how == jnp.float32:
        return x
    kept: Stored
    if isinstance(how, Coding):
        kept = kv_codes.encode(x, valid, how)
    elif how == FP8:
        size = jnp.where(valid[..., None, None], jnp.abs(x), 0.0)
        scale = jnp.max(size, (1, 3), keepdims=True) / float(jnp.finfo(FP8).max)
        scale = jnp.where(scale > 0, scale, 1.0)
        kept = Scaled(_saturated(x / scale, FP8), scale)
    else:
        kept = _saturated(x, how)
    # XLA may drop a rounding if the result is widened again (xla_allow_excess_precision). Not seen
    # on a CPU, so no test fails without the barrier
    return lax.optimization_barrier(kept)


def _saturated(x: Float[Array, "B S N H"], dtype) -> Float[Array, "B S N H"]:
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def empty(kv_format: KVFormat, contexts: int, tokens: int, heads: int, width: int) -> KV:
    """Zeros in the shape of one block's stored K and V."""
    shape = contexts, kv_format.keys(tokens), heads, width

    def zeros(how: np.dtype | Coding) -> Stored:
        if isinstance(how, Coding):
            return kv_codes.empty(how, *shape)
        values = jnp.zeros(shape, how)
        return Scaled(values, jnp.zeros((contexts, 1, heads, 1))) if how == FP8 else values

    return KV(*map(zeros, kv_format.stored))


def attention(
    q: Float[Array, "B T N H"],
    held: KV,
    keys: KeyTable,
    kv_format: KVFormat,
    compute,
    attend: Attend,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H) + log counts) v in the dtype `compute`; k and v are `held`'s.

    q is after RoPE, in the dtype `kv_format.query_dtype` gives. Raises UsageError if `attend` wants
    a kernel that does not take these arrays.
    """
    bias = score_bias(kv_format, keys.cos.shape[1])
    of = functools.partial(attention_of, lengths=keys.lengths, bias=bias, attend=attend)
    if kv_format.codings:
        return _by_heads(of, q, held, keys, kv_format.codings)
    dtype = kv_format.attention_dtype(compute)
    (k, k_scale), (v, v_scale) = map(_values, held)
    if k_scale is not None:
        q = q * k_scale
    out = of(q.astype(dtype), k.astype(dtype), v.astype(dtype))
    if v_scale is not None:
        out = out.astype(jnp.float32) * v_scale
    return out.astype(compute)


def _values(stored: Stored) -> tuple[Float[Array, "B S N H"], Float[Array, "B 1 N 1"] | None]:
    if isinstance(stored, Scaled):
        return stored.values, stored.scale
    assert isinstance(stored, Array)
    return stored, None


def heads_at_once(heads: int) -> int:
    """How many heads of packed K and V are decoded at once: a tenth, 3 of 30.

    One would hold the least, but fills few multiprocessors: at 1024x1024 the flash kernel runs 33
    thread blocks a head.
    """
    return max(size for size in range(1, max(1, heads // 10) + 1) if heads % size == 0)


def _by_heads(
    of: Callable[..., Array],
    q: Float[Array, "B T N H"],
    held: KV,
    keys: KeyTable,
    codings: tuple[Coding, Coding],
) -> Float[Array, "B T N H"]:
    """The attention `of` packed K and V, some heads after the others; the output of a group of
    heads takes the place of its queries."""
    heads, width = q.shape[2:]
    size = heads_at_once(heads)

    def step(group: Array, out: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        def here(a: Shaped[Array, "B n N m"]) -> Shaped[Array, "B n heads m"]:
            return lax.dynamic_slice_in_dim(a, group * size, size, 2)

        k, v = (
            kv_codes.decode(codes, coding, width)
            for codes, coding in zip(jax.tree.map(here, held), codings, strict=True)
        )
        k = ops.rotate_pairs(k, keys.cos, keys.sin)
        # the barrier: products of the rounded values, as in `keep`
        k, v = lax.optimization_barrier((_saturated(k, q.dtype), _saturated(v, q.dtype)))
        return lax.dynamic_update_slice_in_dim(out, of(here(out), k, v), group * size, 2)

    return lax.fori_loop(0, heads // size, step, q)
