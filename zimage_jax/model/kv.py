"""The K/V policy: the dtype of the main blocks' K and V, their groups of image tokens, their reuse.

Axes: B pictures, T tokens (image first), S keys (T, with the image tokens pooled), N heads, H head
width.

Grouping: keys and values are averaged over g x g image tokens. A pooled key is rotated (RoPE) to
the position of the group's centre, and the log of the group's token count is added to its score, so
that it has the weight of the tokens it stands for. Caption and pad tokens are not grouped. Reuse:
an NFE uses the K and V of an earlier one and does not need to_k, norm_k and to_v.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Shaped

from ..errors import UsageError
from .attention import Attend
from .attention import attention as attention_of

SWITCH_T = 500.0  # the last two of Turbo's 8 NFEs have this t or a lower one
DTYPES = {
    "float32": jnp.dtype(jnp.float32),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),  # with a scale per head
}
# default dtypes, early and late, by compute dtype: a card that computes in float16 lacks bf16
OWN_DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bf16", "fp16"),
    "float16": ("fp16", "fp16"),
}
GROUPS = (1, 2, 4)
# parameters of a block that an NFE does not need if it reuses K and V
UNUSED_WHEN_REUSED = ("attention.to_k.kernel", "attention.to_v.kernel", "attention.norm_k.scale")


@dataclass(frozen=True)
class KVFormat:
    """How one NFE of a job stores K and V: the static part."""

    dtype: str  # a name in DTYPES
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
        elements = 2 * contexts * self.keys(tokens) * heads * width
        scales = 2 * contexts * heads * 4 if self.dtype == "fp8" else 0
        return elements * DTYPES[self.dtype].itemsize + scales

    def attention_dtype(self, compute) -> np.dtype:
        """The dtype of attention's q, k and v in a model computed in `compute`."""
        return jnp.dtype(compute) if self.dtype == "fp8" else DTYPES[self.dtype]

    def query_dtype(self, compute) -> np.dtype:
        """The dtype of Q after RoPE: float32 for fp8, because K's scales multiply Q."""
        return jnp.dtype(jnp.float32) if self.dtype == "fp8" else self.attention_dtype(compute)

    @property
    def joins_tokens(self) -> bool:
        """Whether a stored K or V depends on several tokens: on its group, or on fp8's scale."""
        return self.grid is not None or self.dtype == "fp8"


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

    dtype: tuple[str, str] | None = None  # names in DTYPES; None: OWN_DTYPES of the compute dtype
    switch_t: float | int = SWITCH_T  # on the scheduler's scale, 1000 to 0
    group: tuple[int, int] = (1, 1)  # side of a group in tokens, one of GROUPS
    reuse: int = 1  # NFEs that share one K and V; 1: none

    def __post_init__(self):
        for name in self.dtype or ():
            if name not in DTYPES:
                raise UsageError(f"K/V dtype {name!r}: expected one of {', '.join(DTYPES)}")
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
            return (Phase(early, len(times), self.reuse),)
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


class KV(NamedTuple):
    """K after RoPE, and V, as stored. fp8 alone has scales: the value is k times k_scale."""

    k: Shaped[Array, "B S N H"]
    v: Shaped[Array, "B S N H"]
    k_scale: Float[Array, "B 1 N 1"] | None = None
    v_scale: Float[Array, "B 1 N 1"] | None = None


def round_kv(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    lengths: Int[Array | np.ndarray, "B"] | None,
    how: KVFormat,
) -> KV:
    """K and V (float32, pooled) rounded once to the stored dtype; values beyond it saturate.

    `lengths`: masked keys (at this index and beyond) do not count for fp8's scales.
    """
    if how.dtype == "float32":
        return KV(k, v)
    (k, k_scale), (v, v_scale) = (_round(x, lengths, DTYPES[how.dtype]) for x in (k, v))
    # XLA may drop a rounding if the result is widened again (xla_allow_excess_precision). Not seen
    # on a CPU, so no test fails without the barrier
    return lax.optimization_barrier(KV(k, v, k_scale, v_scale))


def _round(
    x: Float[Array, "B S N H"], lengths: Int[Array | np.ndarray, "B"] | None, dtype
) -> tuple[Array, Array | None]:
    largest, scale = float(jnp.finfo(dtype).max), None
    if dtype.itemsize == 1:
        size = jnp.abs(x)
        if lengths is not None:  # without padding: a batch gives the bits of single pictures
            valid = jnp.arange(x.shape[1])[None] < lengths[:, None]
            size = jnp.where(valid[..., None, None], size, 0.0)
        scale = jnp.max(size, (1, 3), keepdims=True) / largest
        scale = jnp.where(scale > 0, scale, 1.0)
        x = x / scale
    return jnp.clip(x, -largest, largest).astype(dtype), scale


def empty(how: KVFormat, contexts: int, tokens: int, heads: int, width: int) -> KV:
    """Zeros in the shape of one block's stored K and V."""
    shape, dtype = (contexts, how.keys(tokens), heads, width), DTYPES[how.dtype]
    scales = [
        jnp.zeros((contexts, 1, heads, 1), jnp.float32) if how.dtype == "fp8" else None
        for _ in range(2)
    ]
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)


def attention(
    q: Float[Array, "B T N H"],
    held: KV,
    lengths: Int[Array | np.ndarray, "B"] | None,
    how: KVFormat,
    compute,
    attend: Attend,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H) + log counts) v in the dtype `compute`; k and v are `held`'s.

    q is after RoPE, in the dtype `how.query_dtype` gives. Raises UsageError if `attend` wants a
    kernel that does not take these arrays.
    """
    dtype = how.attention_dtype(compute)
    if held.k_scale is not None:
        q = q * held.k_scale
    out = attention_of(
        q.astype(dtype),
        held.k.astype(dtype),
        held.v.astype(dtype),
        lengths=lengths,
        bias=score_bias(how, held.k.shape[1]),
        attend=attend,
    )
    if held.v_scale is not None:
        out = out.astype(jnp.float32) * held.v_scale
    return out.astype(compute)
