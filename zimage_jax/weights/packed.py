"""Named arrays as the bytes of a safetensors file, to and from programs that we do not know.

Nothing in such bytes is run. The safetensors library checks sizes and offsets: the tensors lie one
behind another and fill the rest exactly.
"""

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ..errors import UsageError
from ..files import parse_json, printable

_LARGEST_HEADER = 1 << 20  # bytes
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of a safetensors file."""
    return safetensors.numpy.save({n: np.ascontiguousarray(a) for n, a in arrays.items()})


def unpack(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays by name, and the metadata. Raises UsageError for what is no safetensors file, a header
    over 1 MiB, and other dtypes than float32, float16, bfloat16 and uint8."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_LARGEST_HEADER, len(data) - 8):
        raise UsageError("expected a safetensors file, with a header of at most 1 MiB")
    try:
        tensors = safetensors.deserialize(data)
    except SafetensorError as fault:
        raise UsageError(f"not a whole safetensors file ({printable(fault)})") from None
    arrays = {}
    for name, tensor in tensors:
        dtype = _DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise UsageError(
                f"{printable(name, 40)} is {tensor['dtype']}: expected one of {', '.join(_DTYPES)}"
            )
        arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    header = parse_json(data[8 : 8 + size], "the header")
    return arrays, header.get("__metadata__") or {}
