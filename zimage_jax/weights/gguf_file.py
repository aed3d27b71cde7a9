"""GGUF files: the header, and tensors that the `gguf` package dequantises.

The header is parsed here, with limits: the package's reader makes an array for each of 300,000
tokens, and on a hostile length it does not end.

    "GGUF", u32 version, u64 tensors, u64 keys
    each key: string, u32 type, value        a string: u64 bytes, UTF-8
    each tensor: string, u32 axes, u64 each (the last of the shape first), u32 type, u64 offset
    data, from the next multiple of general.alignment
"""

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ..errors import ConversionError, UsageError
from ..files import open_regular, printable
from .tensors import Header, Tensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_HEADER = 64 << 20  # bytes; Qwen3's tokens and merges take 6 MB
_MOST_TENSORS, _MOST_AXES, _LONGEST = (
    1 << 16,
    4,
    1 << 16,
)  # the last: bytes of a string that is kept
_ALIGNMENT = 32  # bytes, without general.alignment
_NUMBERS = {  # value types but string and array
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "?", 10: "Q", 11: "q", 12: "d"},
}
_STRING, _ARRAY = 8, 9
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# llama.cpp's names of Qwen3 -> those of its PyTorch class. (Its q and k are not permuted, as
# llama's are.)
_QWEN3 = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LLAMA = re.compile(rf"(?:blk\.(\d+)\.)?({'|'.join(_QWEN3)})\.weight")


@dataclass(frozen=True)
class GGUFTensor(Tensor):
    """A tensor in blocks of ggml; `dtype` is the block's type, as Q4_K."""

    block: int  # weights of a block
    block_bytes: int

    @property
    def is_readable(self) -> bool:
        return True  # or the header was refused

    def _widened(self, first: int, last: int) -> np.ndarray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        width = math.prod(self.shape[1:])
        row = width // self.block * self.block_bytes
        data = self._bytes(first * row, (last - first) * row).reshape(last - first, row)
        values = dequantize(data, GGMLQuantizationType[self.dtype])
        return values.reshape(last - first, *self.shape[1:])


def read_gguf(file: Path) -> Header:
    """The header of a GGUF file: its tensors under PyTorch's names, and its strings and numbers.

    Raises UsageError without the `gguf` package, ConversionError for a damaged file, and for a type
    that the package does not dequantise.
    """
    try:
        import gguf
    except ModuleNotFoundError as fault:
        raise UsageError(
            f"{file}: reading GGUF needs {fault.name}: run scripts/setup gguf, or pip install "
            f"{fault.name}"
        ) from None
    with open_regular(file, ConversionError, buffering=-1) as f:
        try:
            return _Reader(file, f, gguf).header()
        except (struct.error, UnicodeDecodeError, OverflowError) as fault:
            raise ConversionError(
                f"{file}: not a whole GGUF file ({printable(fault)}); download it again"
            ) from None
        except OSError as fault:
            raise ConversionError(
                f"{file}: cannot be read ({fault.strerror or printable(fault)})"
            ) from None


class _Reader:
    """Reads a header once, from its first byte."""

    def __init__(self, path: Path, file: BinaryIO, gguf: ModuleType):
        self._path, self._file, self._gguf = path, file, gguf
        self._size = os.fstat(file.fileno()).st_size
        self._end = min(self._size, _LARGEST_HEADER)
        self._position = 0

    def header(self) -> Header:
        magic, (version,) = self._take(4), self._unpack("I")
        if magic != MAGIC or version not in _VERSIONS:
            self._refuse(f"version {version}, expected {' or '.join(map(str, _VERSIONS))}")
        count, keys = self._unpack("QQ")
        if count > _MOST_TENSORS:
            self._refuse(f"{count} tensors, expected {_MOST_TENSORS} at most")
        values: dict[str, Any] = {}
        for _ in range(keys):  # each takes 12 bytes or more of what is there
            key = self._name()
            (kind,) = self._unpack("I")
            value = self._value(kind, keeps_array=key.startswith(_ORIGINAL_SHAPE))
            if value is not None:
                values[key] = value
        raw = [self._tensor() for _ in range(count)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            self._refuse(f"alignment {printable(alignment, 40)}")
        start = -(-self._position // alignment) * alignment
        tensors = [self._placed(start, values, *tensor) for tensor in raw]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            self._refuse("two tensors of one name")
        metadata = {k: str(v) for k, v in values.items() if not isinstance(v, tuple)}
        return Header(tensors, metadata)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (axes,) = self._name(), self._unpack("I")
        if axes > _MOST_AXES:
            self._refuse(f"{printable(name)} has {axes} axes")
        shape = self._unpack(f"{axes}Q")[::-1]
        return name, shape, *self._unpack("IQ")

    def _placed(
        self, start: int, values: dict[str, Any], name: str, shape: tuple, number: int, offset: int
    ) -> Tensor:
        """The tensor of a row of the header, whose data begins at `start`."""
        try:
            kind = self._gguf.GGMLQuantizationType(number)
            block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
            self._gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, LookupError, NotImplementedError):
            self._refuse(f"{printable(name)} has type {number}, which gguf does not dequantise")
        size = math.prod(shape)
        nbytes = size // block * block_bytes
        if size % block or start + offset + nbytes > self._size:
            self._refuse(
                f"{printable(name)}: {printable(list(shape))} in {kind.name} from byte "
                f"{start + offset} on does not fit the file"
            )
        own = values.get(_ORIGINAL_SHAPE + name, shape)
        if isinstance(own, tuple) and min(own, default=1) >= 0 and math.prod(own) == size:
            shape = own
        if name.endswith("pad_token") and len(shape) == 1:
            shape = (1, *shape)  # ggml drops axes of 1
        if shape and math.prod(shape[1:]) % block:
            self._refuse(f"{printable(name)}: rows of {math.prod(shape[1:])} in blocks of {block}")
        if found := _LLAMA.fullmatch(name):
            layer = f"layers.{found[1]}." if found[1] else ""
            name = f"{layer}{_QWEN3[found[2]]}.weight"
        place = start + offset
        return GGUFTensor(self._path, name, shape, kind.name, place, nbytes, block, block_bytes)

    def _value(self, kind: int, *, keeps_array: bool) -> Any:
        """A value: a string, a number, or a tuple; None for what is passed over."""
        if kind in _NUMBERS:
            return self._unpack(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string(keeps=True)
        if kind != _ARRAY:
            self._refuse(f"a value of type {kind}")
        item, length = self._unpack("IQ")
        if item in _NUMBERS:
            nbytes = length * struct.calcsize("<" + _NUMBERS[item])
            if keeps_array and length <= _MOST_AXES and _NUMBERS[item] in "IiQq":
                return self._unpack(f"{length}{_NUMBERS[item]}")
            self._pass(nbytes)
        elif item == _STRING:
            for _ in range(length):  # each takes 8 bytes or more
                self._string(keeps=False)
        else:
            self._refuse(f"an array of type {item}")
        return None

    def _name(self) -> str:
        name = self._string(keeps=True)
        if name is None:
            self._refuse(f"a name of over {_LONGEST} bytes")
        return name

    def _string(self, keeps: bool) -> str | None:
        """A string; None if it is not kept, or is longer than _LONGEST."""
        (nbytes,) = self._unpack("Q")
        if keeps and nbytes <= _LONGEST:
            return self._take(nbytes).decode()
        self._pass(nbytes)
        return None

    def _unpack(self, form: str) -> tuple:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))

    def _take(self, nbytes: int) -> bytes:
        self._count(nbytes)
        return self._file.read(nbytes)

    def _pass(self, nbytes: int) -> None:
        self._count(nbytes)
        self._file.seek(nbytes, os.SEEK_CUR)

    def _count(self, nbytes: int) -> None:
        self._position += nbytes
        if self._position > self._end:
            self._refuse(f"the header does not end within {self._end} bytes")

    def _refuse(self, why: str) -> NoReturn:
        raise ConversionError(f"{self._path}: not a whole GGUF file ({why}); download it again")
