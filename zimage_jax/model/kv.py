"""How the DiT's main blocks hold K and V: in which precision, over groups of image tokens, and for
how many NFEs.

Axes: B pictures, T tokens (image first), S keys (T, with the image tokens pooled), N heads, H head
width.

Grouping: keys are averaged over g x g image tokens before RoPE and take the position of the group's
centre, values are averaged, and log(count) is added to the score of a key so that it weighs as the
tokens it stands for. Caption and pad tokens stay whole. Reuse: the K and V of an NFE serve the next
ones, which need no to_k, norm_k or to_v."""

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

SWITCH_T = 500.0  # of 8 NFEs the last two are at or below it
DTYPES = {
    "float32": jnp.dtype(jnp.float32),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),  # with a scale per head
}
# early and late, by compute dtype. A card that computes in float16 has no bf16 products
OWN_DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bf16", "fp16"),
    "float16": ("fp16", "fp16"),
}
GROUPS = (1, 2, 4)
# parameters of a block that an NFE which reuses K and V does without
UNUSED_WHEN_REUSED = ("attention.to_k.kernel", "attention.to_v.kernel", "attention.norm_k.scale")


@dataclass(frozen=True)
class KVFormat:
    """How K and V are held during an NFE of one job: everything static about it."""

    dtype: str  # a word of DTYPES
    group: int = 1
    grid: tuple[int, int] | None = None  # rows and columns of image tokens, where they are grouped

    def keys(self, tokens: int) -> int:
        """S for so many tokens."""
        if self.grid is None:
            return tokens
        return (
            tokens - math.prod(self.grid) + math.prod(len(_spans(n, self.group)) for n in self.grid)
        )

    def nbytes(self, contexts: int, tokens: int, heads: int, width: int) -> int:
        """Of the K and V of one block."""
        scales = 2 * contexts * heads * 4 if self.dtype == "fp8" else 0
        return (
            2 * contexts * self.keys(tokens) * heads * width * DTYPES[self.dtype].itemsize + scales
        )

    def attention_dtype(self, compute) -> np.dtype:
        """What Q is cast to, and the products are made in."""
        return jnp.dtype(compute) if self.dtype == "fp8" else DTYPES[self.dtype]

    def query_dtype(self, compute) -> np.dtype:
        """What Q is rounded to after RoPE: float32 where K's scales multiply it first."""
        return jnp.dtype(jnp.float32) if self.dtype == "fp8" else self.attention_dtype(compute)

    @property
    def joins_tokens(self) -> bool:
        """Whether K and V of a token depend on others: by groups, or by fp8's scales."""
        return self.grid is not None or self.dtype == "fp8"


def plain(compute) -> KVFormat:
    """Whole, in the compute dtype."""
    return KVFormat(next(word for word, dtype in DTYPES.items() if dtype == compute))


class Nfe(NamedTuple):
    """What one NFE does about K and V."""

    kv_format: KVFormat
    keeps: bool = False  # what it makes, for a later one
    reuses: bool = False  # what an earlier one kept


class Phase(NamedTuple):
    """A run of NFEs that hold K and V alike."""

    kv_format: KVFormat
    steps: int
    reuse: int = 1

    def nfes(self) -> Iterator[Nfe]:
        for index in range(self.steps):
            first = index % self.reuse == 0
            yield Nfe(
                self.kv_format, self.reuse > 1 and first and index + 1 < self.steps, not first
            )

    @property
    def caches(self) -> bool:
        """Whether any K and V outlive their NFE."""
        return self.reuse > 1 and self.steps > 1


@dataclass(frozen=True)
class KVPolicy:
    """The user's words: (early, late) while t > switch_t and from there on. No dtype: the compute
    dtype's own (OWN_DTYPES)."""

    dtype: tuple[str, str] | None = None
    switch_t: float | int = SWITCH_T
    group: tuple[int, int] = (1, 1)
    reuse: int = 1

    def __post_init__(self):
        for word in self.dtype or ():
            if word not in DTYPES:
                raise UsageError(f"K/V dtype {word!r}: expected one of {', '.join(DTYPES)}")
        if self.dtype and self.dtype[1] == "fp8":
            raise UsageError(
                "K/V dtype fp8 is for the early NFEs: name the late ones' too, as in fp8:fp16"
            )
        for g in self.group:
            if g not in GROUPS:
                raise UsageError(f"K/V group {g}: expected one of {', '.join(map(str, GROUPS))}")
        if self.reuse < 1:
            raise UsageError(f"K/V reuse {self.reuse}: expected over how many NFEs, from 1 (none)")
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
        """From words as "bf16:fp16" and "2:1", early and late, or one for both."""
        groups = _pair(str(group), "group")
        if not all(g in map(str, GROUPS) for g in groups):
            raise UsageError(f"K/V group {group!r}: expected 1, 2 or 4, or two of them as in 2:1")
        early, late = (int(g) for g in groups)
        return cls(_pair(dtype, "dtype") if dtype else None, switch_t, (early, late), reuse)

    def phases(
        self, times: Float[np.ndarray, "nfes"], compute, rows: int, columns: int
    ) -> tuple[Phase, ...]:
        """The phases of a job: `times` are the scheduler's t of each NFE (1000 sigma), falling."""
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
        """What `parse` takes."""
        dtype = _join(self.dtype) if self.dtype else None
        return {
            "dtype": dtype,
            "switch_t": self.switch_t,
            "group": _join(self.group),
            "reuse": self.reuse,
        }


def _pair(text: str, name: str) -> tuple[str, str]:
    words = text.split(":")
    if len(words) > 2:
        raise UsageError(
            f"K/V {name} {text!r}: expected one word, or two with a colon, early and late"
        )
    return words[0], words[-1]


def _join(pair: tuple) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}"


# -- groups ----------------------------------------------------------------------------------------


def _spans(count: int, group: int) -> list[tuple[int, int]]:
    """(first, past the last) of each group; the last one may be short."""
    return [(start, min(start + group, count)) for start in range(0, count, group)]


def centres(count: int, group: int) -> Float[np.ndarray, "groups"]:
    """Where each group of so many rows or columns has its centre."""
    return np.array([(first + last - 1) / 2 for first, last in _spans(count, group)])


def _sizes(kv_format: KVFormat) -> Float[np.ndarray, "groups"]:
    """Tokens that each pooled key stands for."""
    rows, columns = (
        [last - first for first, last in _spans(n, kv_format.group)] for n in kv_format.grid or ()
    )
    return np.outer(rows, columns).ravel().astype(np.float32)


def pool(x: Float[Array, "B T N H"], kv_format: KVFormat) -> Float[Array, "B S N H"]:
    """Averages over the groups of image tokens; the rest as it is."""
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
    """What is added to the scores of S keys: log of the tokens each stands for."""
    if kv_format.grid is None:
        return None
    sizes = np.log(_sizes(kv_format))
    return np.concatenate([sizes, np.zeros(keys - len(sizes), np.float32)])


# -- held K and V ----------------------------------------------------------------------------------


class KV(NamedTuple):
    """K after RoPE and V, as held. Scales are fp8's alone: what was held times scale is what was
    meant."""

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
    """K and V, in float32 and pooled, rounded once to the held dtype, saturating."""
    if how.dtype == "float32":
        return KV(k, v)
    (k, k_scale), (v, v_scale) = (_round(x, lengths, DTYPES[how.dtype]) for x in (k, v))
    # XLA may drop a rounding whose result is widened again (xla_allow_excess_precision): not seen
    # on a CPU, so no test fails without the barrier
    return lax.optimization_barrier(KV(k, v, k_scale, v_scale))


def _round(
    x: Float[Array, "B S N H"], lengths: Int[Array | np.ndarray, "B"] | None, dtype
) -> tuple[Array, Array | None]:
    largest, scale = float(jnp.finfo(dtype).max), None
    if dtype.itemsize == 1:
        size = jnp.abs(x)
        if (
            lengths is not None
        ):  # padding that is masked must not move the scale: a batch gives what single runs give
            size = jnp.where(
                (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None, None], size, 0.0
            )
        scale = jnp.max(size, (1, 3), keepdims=True) / largest
        scale = jnp.where(scale > 0, scale, 1.0)
        x = x / scale
    return jnp.clip(x, -largest, largest).astype(dtype), scale


def empty(how: KVFormat, contexts: int, tokens: int, heads: int, width: int) -> KV:
    """Room for the K and V of one block."""
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
    """softmax(q k / sqrt(H) + log counts) v, with float32 q after RoPE, in the compute dtype."""
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
