"""Other programs' files at full size: bytes, seconds and memory of converting them, and of reading them in place.

    python -m scripts.bench.other_files FOLDER [--layout LAYOUT]... [--component transformer|text_encoder]

For each layout one component of Z-Image-Turbo is written with random values, the other two are tiny. It is converted,
then all its units are read once from the native checkpoint, and once in place, by two threads with a buffer each, as a
window of host memory reads them. The page cache is dropped before each, where that is permitted. One JSON line per
layout; what was written is removed (at most 37 GB at once).
"""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import ml_dtypes
import numpy as np

from scripts.bench.convert import (
    CONFIG_FILES,
    SINGLE_FILES,
    Source,
    peak_memory,
    shapes_of,
    sync,
)
from zimage_jax.model.config import TURBO, DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig
from zimage_jax.weights import names as rules
from zimage_jax.weights.components import COMPONENTS
from zimage_jax.weights.in_place import open_model

TOKENIZER = Path(__file__).parent.parent.parent / "zimage_jax/assets/tiny/tokenizer.json"
K_QUANTS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # places of a block's float16 scales
GGUF = ("Q8_0", *K_QUANTS, "Q4_K_M")
LAYOUTS = ("bfloat16", "float32", "scaled_fp8", "int8", "int8_convrot", "nvfp4", *GGUF)
NAMES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
}


class Part(NamedTuple):
    """A tensor of a file: its values repeat a pool's."""

    name: str
    shape: tuple[int, ...]
    pool: np.ndarray


@cache
def pool(kind: str) -> np.ndarray:
    """16 M values of a kind, in the file's dtype; of a GGUF type, the bytes of 65,536 blocks."""
    rng = np.random.default_rng(0)
    if kind in K_QUANTS or kind == "Q8_0":
        return _blocks(kind, rng)
    if kind == "nvfp4":
        return rng.integers(0, 256, 1 << 24, np.uint8)
    if kind == "block scales":
        return rng.uniform(1, 448, 1 << 20).astype(ml_dtypes.float8_e4m3fn)
    normal = rng.standard_normal(1 << 24, np.float32)
    if kind == "int8":
        return np.rint(normal * 30).clip(-127, 127).astype(np.int8)
    if kind == "scaled_fp8":
        return (normal * 60).astype(ml_dtypes.float8_e4m3fn)
    return (normal * 0.02).astype(np.float32 if kind == "float32" else ml_dtypes.bfloat16)


def _blocks(kind: str, rng: np.random.Generator) -> np.ndarray:
    import gguf

    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = rng.integers(0, 256, (1 << 16, size), np.uint8)
    for place in K_QUANTS.get(kind, (0,)):
        scales = rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """The matrices of blocks, as ComfyUI's and llama.cpp's files have them in fewer bits."""
    is_in_block = "layers." in name or "_refiner." in name
    return is_in_block and len(shape) == 2 and shape[1] % 256 == 0


def parts(layout: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[Part]:
    """The tensors of a file in one of ComfyUI's layouts: matrices of blocks quantised, the rest in bfloat16."""
    scale = np.full(1 << 16, 2e-4, np.float32)
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layout in ("bfloat16", "float32") or not is_quantised(name, shape):
            yield Part(name, shape, pool("float32" if layout == "float32" else "bfloat16"))
            continue
        if layout == "scaled_fp8":
            yield Part(name, shape, pool(layout))
            yield Part(f"{layer}.scale_weight", (), scale)
            continue
        config: dict = {"format": "nvfp4" if layout == "nvfp4" else "int8_tensorwise"}
        if layout == "int8_convrot":
            config |= {"convrot": True, "convrot_groupsize": 256}
        told = np.frombuffer(json.dumps(config).encode(), np.uint8)
        yield Part(f"{layer}.comfy_quant", told.shape, told)
        if layout == "nvfp4":
            rows, columns = -(-shape[0] // 128) * 128, -(-shape[1] // 64) * 4
            yield Part(name, (shape[0], shape[1] // 2), pool("nvfp4"))
            yield Part(f"{layer}.weight_scale", (rows, columns), pool("block scales"))
            yield Part(f"{layer}.weight_scale_2", (1,), scale[:1] / 100)
        else:
            yield Part(name, shape, pool("int8"))
            yield Part(f"{layer}.weight_scale", (shape[0], 1), scale)


def tiles(values: np.ndarray, count: int) -> Iterator[np.ndarray]:
    while count > 0:
        yield values[:count]
        count -= len(values)


def write_safetensors(file: Path, layout: str, shapes: dict[str, tuple[int, ...]]) -> None:
    found, header, end = list(parts(layout, shapes)), {}, 0
    for name, shape, values in found:
        offsets = [end, end := end + math.prod(shape) * values.itemsize]
        header[name] = {
            "dtype": NAMES[values.dtype.name],
            "shape": list(shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, shape, values in found:
            for run in tiles(values, math.prod(shape)):
                f.write(run.view(np.uint8).data)


def write_gguf(file: Path, layout: str, shapes: dict[str, tuple[int, ...]], arch: str) -> None:
    """As llama.cpp's tools quantise: vectors in float32, matrices in the type; of Q4_K_M every second w2 in Q6_K."""
    import gguf

    types, quantised = gguf.GGMLQuantizationType, {}
    writer = gguf.GGUFWriter(file, arch)
    for k, (name, shape) in enumerate(shapes.items()):
        kind = layout if is_quantised(name, shape) else "BF16" if len(shape) == 2 else "F32"
        if kind == "Q4_K_M":
            kind = "Q6_K" if name.endswith(("w2.weight", "down_proj.weight")) and k % 2 else "Q4_K"
        size, nbytes = gguf.GGML_QUANT_SIZES[types[kind]]
        stored = (*shape[:-1], shape[-1] // size * nbytes)
        quantised[name] = kind, math.prod(stored)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, nbytes in quantised.values():
        values = pool({"F32": "float32", "BF16": "bfloat16"}.get(kind, kind)).view(np.uint8)
        writer.write_tensor_data(np.resize(values, nbytes))
    writer.close()


def config_of(component: str, layers: int | None) -> ModelConfig:
    """Turbo's component, of all blocks or only so many, and two small ones that fit it."""
    text = TextEncoderConfig(1024, 2560, 64, 2, 2, 1, 16)
    dit = DiTConfig(dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, axes_dims=(8, 8, 8))
    small = replace(
        TURBO, text_encoder=text, transformer=dit, vae=VAEConfig(block_out_channels=(32, 32))
    )
    full = getattr(TURBO, component)
    if layers is not None:
        field = "n_layers" if component == "transformer" else "num_hidden_layers"
        full = replace(full, **{field: layers})
    return replace(small, **{component: full})


def write_source(folder: Path, component: str, layout: str, layers: int | None) -> Path:
    """A folder in diffusers layout with the component's file, as the converter takes it. Returns the file."""
    config = config_of(component, layers)
    for name in COMPONENTS:
        (folder / name).mkdir(parents=True)
        source = SINGLE_FILES[name]
        own = layout if name == component else "bfloat16"
        if own == "float32" and name == "transformer":
            source = Source(rules.DIT_DIFFUSERS, source.stem, 1, "F32")
        shapes = shapes_of(source, config, name)
        file = folder / name / f"{source.stem}.safetensors"
        if own not in GGUF:
            write_safetensors(file, own, shapes)
        elif name == component:
            # PyTorch's names of Qwen3 are read in GGUF too: only the header's seconds differ
            write_gguf(file := folder / f"{name}.gguf", own, shapes, "lumina2")
        if name == component:
            written = file
    for name, place in CONFIG_FILES.items():
        target = folder / place
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(config.to_json()[name]))
    (folder / "tokenizer").mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer")
    return written


def read_all(path: str, component: str) -> None:
    """Read every unit of a component once, into a buffer for each thread; print the seconds and the bytes, and the
    CPU seconds of one block read again, from the page cache."""
    model, own = open_model(path), threading.local()

    def read(unit: str) -> int:
        nbytes = model.buffer_bytes(component, unit)
        if getattr(own, "buffer", np.empty(0)).nbytes < nbytes:
            own.buffer = np.empty(nbytes, np.uint8)
        return sum(a.nbytes for a in model.read(component, unit, own.buffer).values())

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        nbytes = sum(pool.map(read, model.units(component)))
    seconds = time.monotonic() - began

    def block() -> float:
        began = time.process_time()
        read("layers.0")
        return time.process_time() - began

    warm = min(block() for _ in range(4))
    found = {"seconds": round(seconds, 1), "bytes": nbytes, "block_cpu_seconds": round(warm, 3)}
    click.echo(json.dumps(found))


def timed(*words: str) -> tuple[dict, int, float]:
    """A command's JSON line, its peak of own memory in bytes, and its seconds."""
    sync()
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    (peak,) = peak_memory(process)
    seconds = time.monotonic() - began
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"error: {' '.join(words)} failed with exit code {process.returncode}")
    return json.loads(output.splitlines()[-1]), peak["own"], seconds


def measure(folder: Path, component: str, layout: str, layers: int | None) -> dict:
    source, native = folder / "source", folder / "native"
    try:
        file = write_source(source, component, layout, layers)
        flag = {"transformer": "--dit", "text_encoder": "--text-encoder"}[component]
        given = [flag, str(file)] if file.suffix == ".gguf" else []
        made, own, _ = timed("checkpoints_convert", str(source), str(native), *given, "--json")
        os.sync()
        path = f"{source},{file}" if given else str(source)
        reading = [
            timed("scripts.bench.other_files", "read", "--component", component, "--model", name)
            for name in (str(native), path)
        ]
        (by_native, _, _), (in_place, own_in_place, _) = reading
        return {
            "component": component,
            "layout": layout,
            "file_bytes": file.stat().st_size,
            "format": made["format"],
            "native_bytes": by_native["bytes"],
            "convert_seconds": made["seconds"],
            "convert_own_bytes": own,
            "read_native_seconds": by_native["seconds"],
            "read_in_place_seconds": in_place["seconds"],
            "read_in_place_own_bytes": own_in_place,
            "block_native_cpu_seconds": by_native["block_cpu_seconds"],
            "block_in_place_cpu_seconds": in_place["block_cpu_seconds"],
        }
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(native, ignore_errors=True)
        shutil.rmtree(folder / "native.partial", ignore_errors=True)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layout", "layouts", multiple=True, type=click.Choice(LAYOUTS), default=LAYOUTS)
@click.option(
    "--component", type=click.Choice(["transformer", "text_encoder"]), default="transformer"
)
@click.option("--layers", type=int, help="So many blocks only.  [default: all]")
@click.option("--model", help="With FOLDER 'read': read this model's component once.")
def main(
    folder: Path, layouts: tuple[str, ...], component: str, layers: int | None, model: str | None
) -> None:
    if model:
        return read_all(model, component)
    folder.mkdir(parents=True, exist_ok=True)
    for layout in layouts:
        click.echo(json.dumps(measure(folder, component, layout, layers)))
    return None


if __name__ == "__main__":
    main()
