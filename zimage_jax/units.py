"""Units of bytes, byte counts, and the dtypes of a computation."""

import math
from typing import Any

MIB, GIB = 2**20, 2**30

COMPUTE = ("bfloat16", "float16", "float32")  # the dtypes a job can be computed in


def size(nbytes: int) -> str:
    """`nbytes` as text in GiB, or in MiB below 0.1 GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.1f} MiB"


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of ShapeDtypeStructs."""
    import jax  # here: the import takes a second, and commands check their options before it

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
