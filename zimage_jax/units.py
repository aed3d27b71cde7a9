"""Units of bytes, byte counts, and the one table of dtype names."""

import math
from typing import Any

import ml_dtypes
import numpy as np

MIB, GIB = 2**20, 2**30

# name -> (dtype, safetensors' name)
_DTYPES = {
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
    "float32": (np.dtype(np.float32), "F32"),
    "int8": (np.dtype(np.int8), "I8"),
    "int32": (np.dtype(np.int32), "I32"),
    "uint8": (np.dtype(np.uint8), "U8"),
    "uint16": (np.dtype(np.uint16), "U16"),
}
DTYPES = {name: dtype for name, (dtype, _) in _DTYPES.items()}
COMPUTE = ("bfloat16", "float16", "float32")  # the dtypes a job can be computed in
SAFETENSORS = {name: spelling for name, (_, spelling) in _DTYPES.items()}


def size(nbytes: int) -> str:
    """`nbytes` as text in GiB, or in MiB below 0.1 GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.1f} MiB"


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of ShapeDtypeStructs."""
    import jax  # here: the import takes a second, and commands check their options before it

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
