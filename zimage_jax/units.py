"""Sizes in words and bytes, and the one table of dtype names."""

import math

import ml_dtypes
import numpy as np

MIB, GIB = 2**20, 2**30

# name -> (dtype, how safetensors spells it)
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
COMPUTE = ("bfloat16", "float16", "float32")  # what can be computed in
SAFETENSORS = {name: spelling for name, (_, spelling) in _DTYPES.items()}


def size(nbytes: int) -> str:
    """Bytes for a person: GiB, or MiB below 0.1 GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.1f} MiB"


def tree_bytes(tree) -> int:
    """Bytes of a tree of arrays or of ShapeDtypeStructs."""
    import jax  # here: a command checks its options before JAX takes its second to import

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
