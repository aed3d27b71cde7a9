"""Quantised tensors as ComfyUI stores them: a weight and, beside it, its scales.

    layout                    weight        beside `<layer>.weight`              the matrix is
    fp8, old (`scaled_fp8`)   F8_E4M3/E5M2  scale_weight                         q * scale
    fp8, comfy_quant          F8_E4M3/E5M2  weight_scale                         q * scale
    int8_tensorwise           I8            weight_scale, one or one per row     q * scale
    the same with convrot     I8            weight_scale                         (q * scale) H
    nvfp4                     U8            weight_scale, weight_scale_2         e2m1 * scale * scale_2

Which it is, a JSON object says: the bytes of a tensor `<layer>.comfy_quant`, or the header's
`_quantization_metadata`. H rotates each group of inputs (model.encoded.rotation). `input_scale` and
`scale_input` concern activations and are left out. (ComfyUI `comfy/ops.py`, comfy-kitchen)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32
from jaxtyping import Int8 as Int8Array

from ..errors import ConversionError
from ..files import parse_json, printable
from ..model.encoded import rotation
from .tensors import READABLE, Tensor

_SCALES = ("weight_scale", "weight_scale_2", "scale_weight")
_LEFT_OUT = ("input_scale", "scale_input")
_CONFIG, _MARKER = "comfy_quant", "scaled_fp8"
_LARGEST_CONFIG = 4096  # bytes; comfy_quant has under 100
_GROUPS = (4, 16, 64, 256, 1024)  # powers of 4
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])  # bit 3 is the sign
# byte -> its two inputs, as the 64 bits of two float32
_PAIRS = np.stack([_E2M1.repeat(16), np.tile(_E2M1, 16)], 1).view(np.uint64)[:, 0]
_NVFP4_BLOCK = 16  # inputs that share a scale


@dataclass(frozen=True)
class ScaledTensor(Tensor):
    """8-bit values with one scale, or one per row; `group` inputs are rotated together, 0 for
    none."""

    scale: Tensor
    group: int = 0

    @property
    def kind(self) -> str:
        if self.dtype == "I8":
            return f"int8 convrot {self.group}" if self.group else "int8"
        return f"{self.dtype} scaled"

    @property
    def is_readable(self) -> bool:
        return True

    def int8(
        self, first: int, last: int
    ) -> tuple[Int8Array[np.ndarray, "o i"], Float32[np.ndarray, "o"]]:
        """Rows of a tensor in I8 as values and scales.

        A scale of 0, which makes zeros, comes as 1 with zeros. Raises ConversionError for a scale
        below 0, infinite or NaN.
        """
        values, scales = self._stored(first, last, np.dtype(np.int8)), self._scales(first, last)
        if not bool((np.isfinite(scales) & (scales >= 0)).all()):
            raise ConversionError(
                f"{self.file}: {printable(self.scale.name)}: expected finite numbers of 0 and above"
            )
        if (scales == 0).any():
            values, scales = values * (scales > 0)[:, None], np.where(scales == 0, 1, scales)
        return values, scales.astype(np.float32, copy=False)

    def _widened(self, first: int, last: int) -> np.ndarray:
        if self.dtype == "I8":
            values = self._stored(first, last, np.dtype(np.int8)).astype(np.float32)
        else:
            values = super()._widened(first, last).astype(np.float32, copy=False)
        values *= self._scales(first, last).reshape(-1, *[1] * (values.ndim - 1))
        if not self.group:
            return values
        turned = values.reshape(-1, self.group) @ rotation(self.group)
        return turned.reshape(values.shape)

    def _scales(self, first: int, last: int) -> Float32[np.ndarray, "o"]:
        if math.prod(self.scale.shape) == 1:
            return np.full(last - first, self.scale.number())
        return self.scale.rows(first, last, np.dtype(np.float32)).reshape(-1)


@dataclass(frozen=True)
class NVFP4Tensor(Tensor):
    """e2m1 in four bits, the even input in the high ones, with an e4m3 scale for 16 inputs and a
    float32 scale for all.

    Block scales are in tiles of 128 rows x 4, as cuBLAS reads them.
    """

    scale: Tensor  # weight_scale
    scale_2: Tensor

    @property
    def kind(self) -> str:
        return "nvfp4"

    @property
    def is_readable(self) -> bool:
        return True

    def _widened(self, first: int, last: int) -> np.ndarray:
        rows, columns = last - first, self.shape[1]
        data = self._bytes(first * columns // 2, rows * columns // 2)
        blocks = _PAIRS[data].view(np.float32).reshape(rows, -1, _NVFP4_BLOCK)
        blocks *= (self._block_scales(first, last) * self.scale_2.number())[..., None]
        return blocks.reshape(rows, columns)

    def _block_scales(self, first: int, last: int) -> Float32[np.ndarray, "o b"]:
        """(row, column) lies at ((row // 128) * tiles + column // 4) * 512 + row % 32 * 16
        + row % 128 // 32 * 4 + column % 4, with as many tiles as a row has quartets of columns."""
        blocks = self.shape[1] // _NVFP4_BLOCK
        tiles = -(-blocks // 4)
        top, bottom = first // 128, -(-last // 128)
        data = self.scale._bytes(top * tiles * 512, (bottom - top) * tiles * 512)
        data = data.reshape(-1, tiles, 32, 4, 4).transpose(0, 3, 2, 1, 4)
        rows = data.reshape((bottom - top) * 128, tiles * 4)[first - top * 128 : last - top * 128]
        return rows[:, :blocks].view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def merged(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors by name, each weight joined with what lies beside it.

    `layers`: layer -> its JSON object, or its format's name, of `_quantization_metadata`. Raises
    ConversionError for a format that is not read, and for scales that do not fit their weight.
    """
    found = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        if last == _MARKER and len(tensor.shape) == 1:
            continue
        if last in (*_SCALES, *_LEFT_OUT, _CONFIG) and f"{layer}.weight" in tensors:
            continue
        if last != "weight":
            found[name] = tensor
            continue
        scales = {s: tensors[f"{layer}.{s}"] for s in _SCALES if f"{layer}.{s}" in tensors}
        config = tensors.get(f"{layer}.{_CONFIG}")
        given = (layers or {}).get(layer) if config is None else _config(config)
        found[name] = _joined(tensor, scales, _checked(tensor, given))
    return found


def layers_of(metadata: Mapping[str, str], file: Any) -> dict[str, Any]:
    """The layers of a header's `_quantization_metadata`; none if it has none. Raises
    ConversionError."""
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    layers = parse_json(text, f"{file}: _quantization_metadata", ConversionError).get("layers")
    if not isinstance(layers, dict):
        raise ConversionError(f"{file}: _quantization_metadata: expected an object 'layers'")
    return layers


def _config(tensor: Tensor) -> dict[str, Any]:
    where = f"{tensor.file}: {printable(tensor.name)}"
    if tensor.dtype != "U8" or not 0 < tensor.nbytes <= _LARGEST_CONFIG:
        raise ConversionError(f"{where}: expected at most {_LARGEST_CONFIG} bytes of JSON as U8")
    return parse_json(tensor._bytes(0, tensor.nbytes).tobytes(), where, ConversionError)


def _checked(weight: Tensor, given: Any) -> dict[str, Any]:
    """What is said of a weight, as an object. Raises ConversionError for a format that is not read."""
    if given is None:
        return {}
    config = {"format": given} if isinstance(given, str) else given
    where = f"{weight.file}: {printable(weight.name)}"
    if not isinstance(config, dict):
        raise ConversionError(
            f"{where}: expected a JSON object of its format, got {printable(given)}"
        )
    expected = {"I8": "int8_tensorwise", "U8": "nvfp4"} | _FP8
    if weight.dtype in expected and config.get("format") != expected[weight.dtype]:
        raise ConversionError(
            f"{where}: {weight.dtype} of format {printable(config.get('format'), 40)!r}, expected "
            f"{expected[weight.dtype]}; this format is not read"
        )
    return config


def _joined(weight: Tensor, scales: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """A weight with its scales. One that has no format and no scale stays as it is."""
    where = f"{weight.file}: {printable(weight.name)}"
    if weight.dtype == "U8" and config:
        return _nvfp4(weight, scales, where)
    if not scales or (weight.dtype == "I8" and not config):
        if config and weight.dtype == "I8":
            raise ConversionError(f"{where}: has no weight_scale")
        return weight  # of I8 and U8 without a format, the check of the source says that
    scale = scales.get("weight_scale", scales.get("scale_weight"))
    rows = weight.shape[0] if weight.shape else 1
    if scale is None or scale.dtype not in ("F32", "BF16", "F16"):
        raise ConversionError(f"{where}: expected a weight_scale in F32, BF16 or F16")
    if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise ConversionError(
            f"{where}: expected one scale or {rows}, got {printable(list(scale.shape))}"
        )
    group = 0
    if config.get("convrot"):
        group = config.get("convrot_groupsize", 256)
        if group not in _GROUPS or len(weight.shape) != 2 or weight.shape[1] % group:
            raise ConversionError(
                f"{where}: convrot in groups of {printable(group, 40)}: expected one of "
                f"{', '.join(map(str, _GROUPS))} that divides the inputs"
            )
        if weight.dtype != "I8":
            raise ConversionError(f"{where}: convrot of {weight.dtype}; it is read of I8 only")
    if weight.dtype != "I8" and weight.dtype not in READABLE:
        return weight
    return ScaledTensor(**_own(weight, scale), scale=scale, group=int(group))


def _nvfp4(weight: Tensor, scales: Mapping[str, Tensor], where: str) -> Tensor:
    scale, scale_2 = scales.get("weight_scale"), scales.get("weight_scale_2")
    if scale is None or scale_2 is None or len(weight.shape) != 2:
        raise ConversionError(f"{where}: nvfp4 needs a matrix, weight_scale and weight_scale_2")
    rows, columns = weight.shape[0], weight.shape[1] * 2
    tiles = -(-rows // 128), -(-columns // (4 * _NVFP4_BLOCK))
    wanted = math.prod(tiles) * 512
    if columns % _NVFP4_BLOCK or scale.dtype != "F8_E4M3" or scale.nbytes != wanted:
        raise ConversionError(
            f"{where}: nvfp4 of {rows} x {columns} needs {wanted} block scales in F8_E4M3, got "
            f"{scale.nbytes} bytes in {scale.dtype}"
        )
    if scale_2.dtype != "F32" or math.prod(scale_2.shape) != 1:
        raise ConversionError(f"{where}: expected one weight_scale_2 in F32")
    own = _own(weight, scale, scale_2) | {"shape": (rows, columns)}
    return NVFP4Tensor(**own, scale=scale, scale_2=scale_2)


def _own(weight: Tensor, *scales: Tensor) -> dict[str, Any]:
    """A weight's fields, its bytes with those of its scales."""
    own = {f.name: getattr(weight, f.name) for f in fields(Tensor)}
    return own | {"nbytes": weight.nbytes + sum(s.nbytes for s in scales)}
