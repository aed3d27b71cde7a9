"""The one table of dtype names. Apart from `units`, because NumPy takes 0.1 s to import, and
commands check their options before."""

import ml_dtypes
import numpy as np

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
SAFETENSORS = {name: spelling for name, (_, spelling) in _DTYPES.items()}
