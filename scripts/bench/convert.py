"""Convert a checkpoint of the published layout at full size (random values): memory, seconds, and
the ratio to cp.

    python -m scripts.bench.convert FOLDER [--preset turbo] [--keep]

Writes FOLDER/sources (33 GB for turbo: the DiT in float32, the rest as published), times cp of its
files, one component at a time, converts it to FOLDER/native (20 GB, which stays), and removes what
it wrote beside that. With --keep the sources are one bfloat16 file per component (20 GB) and stay
too: what scripts/compare/program.py runs on."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import ml_dtypes
import numpy as np
from tqdm import tqdm

from zimage_jax.model.config import PRESETS, ModelConfig
from zimage_jax.weights import names as rules
from zimage_jax.weights.components import COMPONENTS, spec


class Source(NamedTuple):
    """How a component is written: which names, in how many files."""

    table: list
    stem: str
    shards: int
    dtype: str
    prefix: str = ""  # of every name


PUBLISHED = {
    "transformer": Source(rules.DIT_DIFFUSERS, "diffusion_pytorch_model", 3, "F32"),
    "text_encoder": Source(rules.TEXT_ENCODER, "model", 3, "BF16"),
    "vae": Source(rules.VAE_DIFFUSERS, "diffusion_pytorch_model", 1, "BF16"),
}
# a file per component in names that diffusers, stable-diffusion.cpp and our converter all read
SINGLE_FILES = {
    "transformer": Source(rules.DIT_COMFY, "diffusion_pytorch_model", 1, "BF16"),
    "text_encoder": Source(rules.TEXT_ENCODER, "model", 1, "BF16", "model."),
    "vae": Source(rules.VAE_DIFFUSERS, "diffusion_pytorch_model", 1, "BF16"),
}
CONFIG_FILES = {"scheduler": "scheduler/scheduler_config.json"} | {
    c: f"{c}/config.json" for c in COMPONENTS
}
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}


def shapes_of(source: Source, config: ModelConfig, component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a component's tensors, the text encoder's unused last layer and norm
    among them."""
    shapes = {n: e.shape for n, e in rules.expected(source.table, spec(config, component)).items()}
    if component == "text_encoder":
        last = f"layers.{config.text_encoder.n_layers}."
        shapes |= {
            n.replace("layers.0.", last): s for n, s in shapes.items() if n.startswith("layers.0.")
        }
        shapes["norm.weight"] = (config.text_encoder.hidden_size,)
    return {source.prefix + name: shape for name, shape in shapes.items()}


def write_random(
    file: Path, shapes: dict[str, tuple[int, ...]], dtype: str, noise: np.ndarray, bar: tqdm
) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                run = noise[: min(left, noise.size)]
                f.write(run.data)
                bar.update(run.nbytes)
                left -= run.size


def write_sources(folder: Path, config: ModelConfig, layout: dict[str, Source]) -> None:
    values = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02
    every = {
        component: shapes_of(source, config, component) for component, source in layout.items()
    }
    total = sum(
        math.prod(s) * DTYPES[layout[c].dtype].itemsize
        for c, shapes in every.items()
        for s in shapes.values()
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc="write sources") as bar:
        for component, (_, stem, shards, dtype, _) in layout.items():
            (folder / component).mkdir(parents=True)
            names, index = list(every[component]), {}
            noise = values.astype(DTYPES[dtype]).view(np.uint16 if dtype == "BF16" else np.uint32)
            for k in range(shards):
                part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
                name = (
                    f"{stem}-{k + 1:05d}-of-{shards:05d}.safetensors"
                    if shards > 1
                    else f"{stem}.safetensors"
                )
                write_random(
                    folder / component / name,
                    {n: every[component][n] for n in part},
                    dtype,
                    noise,
                    bar,
                )
                index |= dict.fromkeys(part, name)
            if shards > 1:
                (folder / component / f"{stem}.safetensors.index.json").write_text(
                    json.dumps({"weight_map": index})
                )
    for name, place in CONFIG_FILES.items():
        part, file = config.to_json()[name], folder / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(part | (_vae_blocks(part) if name == "vae" else {})))
    (folder / "tokenizer").mkdir()
    shutil.copy(
        Path(__file__).parent.parent.parent / "zimage_jax/assets/tiny/tokenizer.json",
        folder / "tokenizer",
    )


def _vae_blocks(config: dict) -> dict:
    """What AutoencoderKL's published config says besides numbers."""
    levels = len(config["block_out_channels"])
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def peak_memory(process: subprocess.Popen) -> Iterator[dict[str, int]]:
    """Highest anonymous and highest total resident bytes of a process, sampled until it ends."""
    peak = {"own": 0, "resident": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                fields = dict(
                    line.split(":", 1)
                    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                )
            except OSError:
                break
            for key, field in (("own", "RssAnon"), ("resident", "VmRSS")):
                if field in fields:
                    peak[key] = max(peak[key], int(fields[field].split()[0]) * 1024)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    process.wait()
    thread.join()
    yield peak


def sync() -> None:
    """Bring everything to disk and, where permitted, forget what is cached, so that both sides
    start cold."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        click.echo(
            "the page cache cannot be dropped here: reads may be served from memory", err=True
        )


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), default="turbo", show_default=True)
@click.option("--keep", is_flag=True, help="One bfloat16 file per component, which stays.")
def main(folder: Path, preset: str, keep: bool) -> None:
    source, native, copy = folder / "sources", folder / "native", folder / "copy"
    folder.mkdir(parents=True, exist_ok=True)
    write_sources(source, PRESETS[preset], SINGLE_FILES if keep else PUBLISHED)
    copy_seconds = 0.0
    for component in COMPONENTS:
        sync()
        began = time.monotonic()
        subprocess.run(["cp", "-r", str(source / component), str(copy)], check=True)
        os.sync()
        copy_seconds += time.monotonic() - began
        shutil.rmtree(copy)
    sync()
    began = time.monotonic()
    command = [sys.executable, "-m", "checkpoints_convert", str(source), str(native), "--quiet"]
    process = subprocess.Popen(command)
    (peak,) = peak_memory(process)
    os.sync()
    convert_seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(f"error: the conversion failed with exit code {process.returncode}")
    read = sum(f.stat().st_size for f in source.rglob("*") if f.is_file())
    written = sum(f.stat().st_size for f in native.rglob("*") if f.is_file())
    if not keep:
        shutil.rmtree(source)
    result = {
        "preset": preset,
        "source_bytes": read,
        "native_bytes": written,
        "convert_seconds": round(convert_seconds, 1),
        "cp_seconds": round(copy_seconds, 1),
        "convert_over_cp": round(convert_seconds / copy_seconds, 2),
        "peak_own_bytes": peak["own"],
        "peak_resident_bytes": peak["resident"],
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
