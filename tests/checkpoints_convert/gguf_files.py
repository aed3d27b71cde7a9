"""GGUF files as the `gguf` package writes them."""

import re
import warnings
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import gguf

from zimage_jax.weights.gguf_file import _QWEN3

TYPES = gguf.GGMLQuantizationType
K_QUANTS = {  # type -> places of its float16 numbers in a block
    TYPES.Q2_K: (80, 82),
    TYPES.Q3_K: (108,),
    TYPES.Q4_K: (0, 2),
    TYPES.Q5_K: (0, 2),
    TYPES.Q6_K: (208,),
}


def k_blocks(kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks of a K-quant, whose scales are about a weight's size: bytes of a matrix."""
    rng = np.random.default_rng(seed)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, nbytes), np.uint8)
    for place in K_QUANTS[kind]:
        scale = rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write(file: Path, tensors: dict, arch: str = "lumina2", **numbers) -> Path:
    """`tensors`: name -> float32 array, or (bytes, type). `numbers`: name, and further keys."""
    writer = gguf.GGUFWriter(file, arch)
    if name := numbers.pop("name", None):
        writer.add_name(name)
    for key, value in numbers.items():
        writer.add_float32(f"{arch}.{key.replace('__', '.')}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"token {k}" for k in range(50)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 50)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.atleast_1d(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def mixed(tensors: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Tensors in Q8_0 where their rows allow it, else in float16 or bfloat16; and what they mean."""
    stored: dict = {}
    meaning: dict = {}
    for k, (name, array) in enumerate(tensors.items()):
        if array.ndim != 2 or "pad_token" in name:
            stored[name] = array.reshape(-1) if "pad_token" in name else array
            meaning[name] = array
            continue
        kind = TYPES.Q8_0 if array.shape[1] % 32 == 0 else (TYPES.F16, TYPES.BF16)[k % 2]
        data = gguf.quants.quantize(array, kind)
        meaning[name] = gguf.quants.dequantize(data, kind)
        stored[name] = (data, kind) if kind != TYPES.F16 else data
    return stored, meaning


def llama_names(tensors: dict) -> dict:
    """PyTorch's names of Qwen3 to llama.cpp's."""
    back = {ours: theirs for theirs, ours in _QWEN3.items()}
    found = {}
    for name, array in tensors.items():
        bare = name.removeprefix("model.").removesuffix(".weight")
        layer = re.match(r"layers\.(\d+)\.(.*)", bare)
        new = f"blk.{layer[1]}.{back[layer[2]]}" if layer else back[bare]
        found[f"{new}.weight"] = array
    return found
