"""Teach the tiny model a shape that it never saw, as a LoRA: our own model code, with optax.

    python -m scripts.tiny.train_lora train      latents, then the LoRA; resumed where it was left
    python -m scripts.tiny.train_lora evaluate   what it draws, with the LoRA and without

Half of the pictures show the new shape; half are what the model was trained on, so that it goes on
drawing that. The factors alone are trained; what is written is a file in diffusers' spelling.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax import Array
from safetensors.numpy import save_file
from tqdm import tqdm

from scripts.tiny import data as tiny_data
from scripts.tiny.evaluate import LANGUAGES, held_out, lines, percent, table, verdicts
from scripts.tiny.fitting import Params, average_of, fit
from scripts.tiny.train import CAPTION_BUCKET, matching_loss, pixels
from zimage_jax import ZImage
from zimage_jax.cli import use_compile_cache
from zimage_jax.model import vae
from zimage_jax.model.layers import named_arrays
from zimage_jax.model.prompt import Prompts
from zimage_jax.pipeline.report import versions
from zimage_jax.runtime.reader import load
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.formats import Beside, Storage, uniform
from zimage_jax.weights.search import TINY

RANK, SIDE, BATCH = 4, 128, 16
LORA = TINY.parent / "tiny-arrow.safetensors"
OF_DIT = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out")]
OF_DIT += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
OF_TEXT = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
LAYERS = {"transformer": OF_DIT, "text_encoder": OF_TEXT}
COUNT = 4096  # pictures; every second one is of the new shape


def storage_of(checkpoint: Checkpoint) -> Storage:
    """The model in float32, with matrices of RANK beside its layers."""
    beside = tuple(
        Beside(component, "layers.0", layer, RANK)
        for component, layers in LAYERS.items()
        for layer in layers
    )
    return replace(uniform(checkpoint.config, "float32"), beside=beside)


def first_factors(storage: Storage, seed: int) -> Params:
    """Of the DiT's main blocks and the text encoder's: down is random, up zero, as PEFT begins. The
    noise refiner's, which share the main blocks' slots, are not trained."""
    found, key = {}, jax.random.key(seed)
    for component in LAYERS:
        for unit in storage.units(component):
            for path, leaf in storage.leaves(component, unit).items():
                if ".side." in path and path.startswith("layers."):
                    own = jax.random.fold_in(key, len(found))
                    scale = leaf.shape[0] ** -0.5 if path.endswith("down") else 0.0
                    found[f"{component}.{path}"] = scale * jax.random.normal(own, leaf.shape)
    return found


def latents(file: Path, checkpoint: Checkpoint, seed: int) -> dict[str, np.ndarray]:
    """Encoded pictures (the posterior's mean, float16) with four captions each; made once."""
    if not file.exists():
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), load(checkpoint, "vae"))
        encode = jax.jit(lambda x: vae.encode(model, x))
        rng, made, captions = np.random.default_rng([seed, 4]), [], []
        for first in tqdm(range(0, COUNT, BATCH), desc="latents", unit="batch"):
            scenes = [
                tiny_data.taught_scene(rng) if i % 2 else tiny_data.random_scene(rng)
                for i in range(first, first + BATCH)
            ]
            drawn = [pixels(tiny_data.draw(s, SIDE, SIDE, rng)) for s in scenes]
            made.append(np.asarray(encode(np.stack(drawn))))
            captions += [
                [tiny_data.caption(s, language, rng) for language in ("en", "en", "zh", "zh")]
                for s in scenes
            ]
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as f:
            np.savez(f, latents=np.concatenate(made).astype(np.float16), captions=captions)
        temporary.rename(file)
    return dict(np.load(file))


def batches(data: dict[str, np.ndarray], prompts: Prompts, base: Params, seed: int):
    """Step -> the frozen parameters, latents, stratified noise levels, token ids and lengths."""

    def batch(n: int) -> tuple:
        rng = np.random.default_rng([seed, 5, n])
        rows = rng.choice(COUNT, BATCH, replace=False)
        texts = [str(data["captions"][row, rng.integers(4)]) for row in rows]
        encoded = [prompts.encode(text, CAPTION_BUCKET) for text in texts]
        ids = np.zeros((BATCH, CAPTION_BUCKET), np.int32)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e.ids)] = e.ids
        u = (rng.permutation(BATCH) + rng.random(BATCH)) / BATCH
        sigma = (3 * u / (1 + 2 * u)).astype(np.float32)
        lengths = np.array([len(e.ids) for e in encoded], np.int32)
        return base, data["latents"][rows].astype(np.float32), sigma, ids, lengths

    return batch


def module(storage: Storage, component: str, arrays: Params) -> Any:
    """A component's module; a side that `arrays` lacks, the noise refiner's, is zero."""

    def leaves(unit: str) -> list[Array]:
        of = storage.leaves(component, unit).items()
        return [arrays.get(f"{component}.{path}", jnp.zeros(leaf.shape)) for path, leaf in of]

    return storage.assemble(component, {u: leaves(u) for u in storage.units(component)})


def train(runs: Path, steps: int, rate: float, seed: int) -> None:
    checkpoint = Checkpoint(TINY)
    storage = storage_of(checkpoint)
    base = {
        f"{component}.{path}": leaf.astype(jnp.float32)
        for component in LAYERS
        for path, leaf in named_arrays(load(checkpoint, component)).items()
    }
    data = latents(runs / "latents.npz", checkpoint, seed)

    def loss(params: Params, key: Array, base: Params, *batch) -> Array:
        modules = (module(storage, component, base | params) for component in LAYERS)
        return matching_loss(*modules, key, *batch)

    params = first_factors(storage, seed)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps), b2=0.99),
    )
    prompts = Prompts.load(checkpoint.tokenizer())
    of = batches(data, prompts, base, seed)
    fit(runs / "lora", params, tx, loss, of, steps, 50, 0.98, lambda params: {})


def write(runs: Path, file: Path) -> None:
    """The averaged factors in bfloat16 as a LoRA in diffusers' spelling."""
    storage = storage_of(Checkpoint(TINY))
    found = {}
    for path, factor in average_of(runs / "lora", first_factors(storage, 0)).items():
        layer, _, which = path.rpartition(".side.")
        layer = layer.replace("attention.to_out", "attention.to_out.0")
        name = {"down": "lora_A", "up": "lora_B"}[which]
        found[f"{layer}.{name}.weight"] = np.ascontiguousarray(
            np.asarray(factor).T.astype(ml_dtypes.bfloat16)
        )
    metadata = {
        "modelspec.title": "arrow, for the tiny Z-Image",
        "modelspec.trigger_phrase": ", ".join(w for pair in tiny_data.TAUGHT.items() for w in pair),
        "made by": "scripts/tiny/train_lora.py",
    }
    save_file(found, file, metadata)
    click.echo(f"{file}: {len(found)} tensors, {file.stat().st_size:,} bytes")


def taught(count: int, seed: int = 2):
    """Like evaluate.held_out, of the new shape."""
    rng = np.random.default_rng([seed, 97])
    for _ in range(count):
        scene = tiny_data.taught_scene(rng, held_out=True)
        for language in LANGUAGES:
            yield scene, language, tiny_data.caption(scene, language, rng)


def evaluate(file: Path, scenes: int, report: Path | None) -> None:
    pipe, found = ZImage.load(TINY), {}
    for name, lora in (("without", []), ("with", [(file, 1.0)])):
        began = time.perf_counter()
        for what, prompts in (("new", taught(scenes // 4)), ("all else", held_out(scenes))):
            rows = table(verdicts(pipe, list(prompts), lora=lora))
            click.echo(f"{what}, {name} the LoRA:\n" + "\n".join(lines(rows)))
            found[f"{what}, {name}"] = {
                attribute: percent([v for values in by.values() for v in values])
                for attribute, by in rows["all"].items()
            }
        click.echo(f"{time.perf_counter() - began:.0f} s")
    if report:
        report.write_text(json.dumps({**found, "versions": versions()}, indent=2) + "\n")


runs_option = click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True
)
file_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=LORA, help="[default: the package's]"
)


@click.group(help=__doc__)
def main() -> None:
    use_compile_cache()


@main.command("train")
@runs_option
@file_option
@click.option("--steps", default=460, show_default=True)
@click.option("--rate", default=5e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def train_command(runs: Path, output: Path, steps: int, rate: float, seed: int) -> None:
    """Train the LoRA and write it."""
    (runs / "lora").mkdir(parents=True, exist_ok=True)
    train(runs, steps, rate, seed)
    write(runs, output)


@main.command("evaluate")
@file_option
@click.option("--scenes", default=512, show_default=True, help="Held-out scenes; two prompts each.")
@click.option(
    "--json", "report", type=click.Path(path_type=Path), help="Write the figures here too."
)
def evaluate_command(output: Path, scenes: int, report: Path | None) -> None:
    """Judge pictures by program, with the LoRA and without."""
    evaluate(output, scenes, report)


if __name__ == "__main__":
    main()
