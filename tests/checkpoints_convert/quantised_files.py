"""ComfyUI's quantised layouts, written from their formulas with NumPy alone, and what they mean."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32",
    E4M3: "F8_E4M3",
    E5M2: "F8_E5M2",
}
LAYOUTS = ("scaled_fp8", "fp8", "fp8_e5m2", "int8", "int8_rows", "int8_convrot", "nvfp4")
KINDS = {
    "scaled_fp8": "F8_E4M3 scaled",
    "fp8": "F8_E4M3 scaled",
    "fp8_e5m2": "F8_E5M2 scaled",
    "int8": "int8",
    "int8_rows": "int8",
    "int8_convrot": "int8 convrot 16",
    "nvfp4": "nvfp4",
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)


def write(file: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    """A safetensors file, of dtypes that NumPy lacks too."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, array in tensors.items():
        offsets = [end, end + array.nbytes]
        shape = list(array.shape)
        header[name] = {"dtype": NAMES[array.dtype], "shape": shape, "data_offsets": offsets}
        end += array.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return file


def told(config: dict) -> np.ndarray:
    """The bytes of a `comfy_quant` tensor."""
    return np.frombuffer(json.dumps(config).encode(), np.uint8)


def hadamard(group: int) -> np.ndarray:
    made = H4
    while len(made) < group:
        made = np.kron(made, H4)
    return made / math.sqrt(group)


def quantise(layer: str, w: np.ndarray, layout: str) -> tuple[dict, np.ndarray]:
    """What lies in a file for the matrix `<layer>.weight`, and the float32 matrix that it means."""
    largest = np.abs(w).max()
    if layout in ("scaled_fp8", "fp8", "fp8_e5m2"):
        dtype = E5M2 if layout == "fp8_e5m2" else E4M3
        scale = np.float32(largest / float(ml_dtypes.finfo(dtype).max))
        q = (w / scale).astype(dtype)
        meaning = q.astype(np.float32) * scale
        if layout == "scaled_fp8":
            beside = {"scale_weight": scale, "scale_input": np.float32(1)}
        else:
            name = "float8_e5m2" if dtype == E5M2 else "float8_e4m3fn"
            config = told({"format": name, "full_precision_matrix_mult": True})
            beside = {
                "weight_scale": scale,
                "input_scale": np.float32(1),
                "comfy_quant": config,
            }
    elif layout.startswith("int8"):
        group = 16 if layout == "int8_convrot" and w.shape[1] % 16 == 0 else 0
        turned = w
        if group:
            turned = (w.reshape(-1, group) @ hadamard(group)).reshape(w.shape)
        rows = np.abs(turned).max(1, keepdims=True)
        scale = np.float32(largest / 127) if layout == "int8" else (rows / 127).astype(np.float32)
        q = np.rint(turned / scale).astype(np.int8)
        meaning = q.astype(np.float32) * scale
        if group:
            meaning = (meaning.reshape(-1, group) @ hadamard(group)).reshape(w.shape)
        config = {"format": "int8_tensorwise"}
        config |= {"convrot": True, "convrot_groupsize": group} if group else {}
        beside = {"weight_scale": scale, "comfy_quant": told(config)}
    else:
        if w.shape[1] % 16:
            return {f"{layer}.weight": w}, w
        q, beside, meaning = nvfp4(w)
    return {f"{layer}.weight": q} | {f"{layer}.{n}": np.asarray(a) for n, a in beside.items()}, (
        meaning.astype(np.float32)
    )


def nvfp4(w: np.ndarray) -> tuple[np.ndarray, dict, np.ndarray]:
    rows, columns = w.shape
    blocks = w.reshape(rows, -1, 16)
    scale_2 = np.float32(np.abs(w).max() / (6 * 448))
    scale = (np.abs(blocks).max(-1) / 6 / scale_2).astype(E4M3)
    total = scale.astype(np.float32) * scale_2
    safe = np.where(total == 0, np.float32(1), total)
    nearest = np.abs(np.abs(blocks / safe[..., None])[..., None] - E2M1).argmin(-1)
    codes = (nearest | (blocks < 0) << 3).reshape(rows, columns).astype(np.uint8)
    meaning = np.where(blocks < 0, -E2M1[nearest], E2M1[nearest]) * total[..., None]
    # one scale after another to its place in the tiles
    tiles = -(-scale.shape[1] // 4)
    swizzled = np.zeros(-(-rows // 128) * tiles * 512, E4M3)
    for r in range(rows):
        for c in range(scale.shape[1]):
            tile = (r // 128) * tiles + c // 4
            swizzled[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    beside = {
        "weight_scale": swizzled.reshape(-(-rows // 128) * 128, tiles * 4),
        "weight_scale_2": scale_2,
        "comfy_quant": told({"format": "nvfp4"}),
    }
    return codes[:, ::2] << 4 | codes[:, 1::2], beside, meaning.reshape(rows, columns)


def is_quantised(name: str, array: np.ndarray) -> bool:
    """The matrices that ComfyUI's own files have in fewer bits, and one beyond the blocks."""
    return name.endswith(".weight") and array.ndim == 2 and "pad" not in name and "norm" not in name


def quantised(tensors: dict[str, np.ndarray], layout: str, marker: str = "") -> tuple[dict, dict]:
    """The tensors of a file in a layout, and the float32 tensors that they mean."""
    stored: dict = {}
    meaning: dict = {}
    for name, array in tensors.items():
        if is_quantised(name, array):
            part, meaning[name] = quantise(name.removesuffix(".weight"), array, layout)
            stored |= part
        else:
            stored[name] = meaning[name] = array
    if layout == "scaled_fp8":
        stored[f"{marker}scaled_fp8"] = np.zeros(2, E4M3)
    return stored, meaning
