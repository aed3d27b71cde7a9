"""Train the tiny Z-Image that the package embeds, from nothing, on pictures drawn by tiny_data.

    python -m scripts.tiny.train all            every stage in turn, each resumed where it was left
    python -m scripts.tiny.train vae --steps 6000

Stages: glyphs (once, from a font), tokenizer, vae, latents, dit, export. Runs and their checkpoints
lie in --runs. A stage is seeded by (seed, step), so a resumed run sees the data it would have seen.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from tqdm import tqdm

from scripts.tiny import data as tiny_data
from scripts.tiny.fitting import Params, average_of, fit, optimizer, schedule
from scripts.tiny.judge import judge
from scripts.tiny.tokenizer import train_tokenizer
from zimage_jax.model import dit, kv, sampling, text_encoder, vae
from zimage_jax.model.attention import Attend
from zimage_jax.model.config import (
    DiTConfig,
    ModelConfig,
    SigmasConfig,
    TextEncoderConfig,
    VAEConfig,
)
from zimage_jax.model.kv import Phase
from zimage_jax.model.layers import initialise, named_arrays, with_arrays
from zimage_jax.model.prompt import Prompts, batch_ids
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline import picture as image
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import save

VOCABULARY = 576
CONFIG = ModelConfig(
    transformer=DiTConfig(
        dim=192,
        n_layers=8,
        n_refiner_layers=1,
        n_heads=6,
        cap_feat_dim=128,
        axes_dims=(8, 12, 12),
        axes_lens=(640, 64, 64),
    ),
    text_encoder=TextEncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10000.0,
    ),
    vae=VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8),
    scheduler=SigmasConfig(),
)
CAPTION_BUCKET = 32
# width, height and share of the DiT's training pictures
SIZES = [
    ((128, 128), 0.7),
    ((96, 96), 0.06),
    ((160, 96), 0.05),
    ((96, 160), 0.05),
    ((192, 128), 0.04),
    ((128, 192), 0.04),
    ((192, 192), 0.04),
    ((256, 256), 0.02),
]
SHARD = 512  # pictures a shard of latents holds
# of one shape, pairs and texts: a shape alone has more to tell (place, size) and is learned last
SHARES = (0.4, 0.25, 0.35)


def pixels(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float32) / 127.5 - 1


# -- VAE -------------------------------------------------------------------------------------------


def vae_loss(spec) -> Callable:
    def loss(params: Params, key: Array, pictures: Float[Array, "B H W 3"]) -> Array:
        model = with_arrays(spec, lambda path, _: params[path])
        mean, log_variance = jnp.split(model.encoder(pictures), 2, -1)
        log_variance = jnp.clip(log_variance, -20, 10)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        error = model.decoder(z) - pictures
        divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return jnp.mean(jnp.abs(error)) + 2 * jnp.mean(error**2) + 1e-3 * divergence

    return loss


def drawings(rng: np.random.Generator, count: int, width: int, height: int) -> np.ndarray:
    """Training pictures in [-1, 1], B H W 3."""
    return pixels(
        np.stack(
            [tiny_data.draw(tiny_data.random_scene(rng), width, height, rng) for _ in range(count)]
        )
    )


def vae_batch(seed: int, n: int, steps: int) -> tuple[np.ndarray]:
    """16 crops of 64 x 64; for the last quarter of the steps, 4 whole pictures of 128 x 128."""
    rng = np.random.default_rng([seed, 1, n])
    if n >= 0.75 * steps:
        return (drawings(rng, 4, 128, 128),)
    corners = rng.integers(0, 65, (16, 2))
    pictures = drawings(rng, 16, 128, 128)
    return (
        np.stack([p[y : y + 64, x : x + 64] for p, (y, x) in zip(pictures, corners, strict=True)]),
    )


def train_vae(runs: Path, steps: int, seed: int, rate: float, adam_rate: float) -> None:
    spec = vae.spec(CONFIG.vae)
    params = named_arrays(initialise(spec, jax.random.key(seed)))
    test = drawings(np.random.default_rng([seed, 99]), 32, 128, 128)

    @jax.jit
    def reconstruct(params):
        model = with_arrays(spec, lambda path, _: params[path])
        return vae.decode(model, vae.encode(model, test))

    def evaluate(params):
        error = np.clip(reconstruct(params), -1, 1) - test
        return {"psnr_db": float(np.mean(-10 * np.log10(np.mean(error**2, (1, 2, 3)) / 4)))}

    tx = optimizer(params, schedule(rate, steps), schedule(adam_rate, steps))
    fit(
        runs / "vae",
        params,
        tx,
        vae_loss(spec),
        lambda n: vae_batch(seed, n, steps),
        steps,
        250,
        0.998,
        evaluate,
    )


# -- latents ---------------------------------------------------------------------------------------


def make_latents(runs: Path, seed: int, shards: int) -> None:
    """Encode pictures once: shards of latents (the posterior's mean, float16) with four captions
    for each picture."""
    spec = vae.spec(CONFIG.vae)
    params = average_of(runs / "vae", named_arrays(spec))
    model = with_arrays(spec, lambda path, _: params[path])
    encode = jax.jit(lambda x: jnp.split(model.encoder(x, Attend()), 2, -1)[0])
    folder = runs / "latents"
    folder.mkdir(exist_ok=True)
    sizes = [size for size, share in SIZES for _ in range(max(1, round(share * shards)))]
    for index, (width, height) in enumerate(tqdm(sizes, desc="latents", unit="shard")):
        file = folder / f"{index:04d}.npz"
        if file.exists():
            continue
        rng = np.random.default_rng([seed, 2, index])
        scenes = [tiny_data.random_scene(rng, shares=SHARES) for _ in range(SHARD)]
        captions = [
            [tiny_data.caption(s, language, rng) for language in ("en", "en", "zh", "zh")]
            for s in scenes
        ]
        pictures = [pixels(tiny_data.draw(s, width, height, rng)) for s in scenes]
        means = np.concatenate(
            [encode(np.stack(pictures[i : i + 16])) for i in range(0, SHARD, 16)]
        )
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as f:
            np.savez(f, latents=means.astype(np.float16), captions=np.array(captions))
        temporary.rename(file)


def latent_statistics(runs: Path) -> tuple[float, float]:
    """(scaling factor, shift) that give the sampler latents of mean 0 and variance 1; computed once
    for a run."""
    file = runs / "statistics.json"
    if not file.exists():
        files = sorted((runs / "latents").glob("*.npz"))[:40]
        sample = np.concatenate([np.load(f)["latents"][:64].ravel() for f in files]).astype(
            np.float64
        )
        file.write_text(json.dumps([round(1 / sample.std(), 4), round(sample.mean(), 4)]))
    return tuple(json.loads(file.read_text()))


# -- DiT and text encoder --------------------------------------------------------------------------


class Batches:
    """Step -> latents, stratified noise levels, token ids and lengths. One size of picture a
    step."""

    def __init__(self, runs: Path, seed: int, prompts: Prompts, scaling: float, shift: float):
        self._seed, self._prompts, self._scaling, self._shift = seed, prompts, scaling, shift
        self._shards: dict[tuple[int, int], list] = {}
        for file in tqdm(
            sorted((runs / "latents").glob("*.npz")), desc="read latents", leave=False
        ):
            data = np.load(file)
            latents = data["latents"]
            self._shards.setdefault(latents.shape[1:3], []).append((latents, data["captions"]))

    def __call__(self, n: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([self._seed, 3, n])
        sizes = list(self._shards)
        weights = np.array([len(self._shards[s]) for s in sizes], float)
        h, w = sizes[rng.choice(len(sizes), p=weights / weights.sum())]
        count = max(8, min(32, 32 * 256 // (h * w)))  # about as many image tokens at every size
        latents, captions = self._shards[h, w][rng.integers(len(self._shards[h, w]))]
        rows = rng.choice(SHARD, count, replace=False)
        x = (latents[rows].astype(np.float32) - self._shift) * self._scaling
        texts = [str(captions[row, rng.integers(4)]) for row in rows]
        encoded = [self._prompts.encode(t, CAPTION_BUCKET) for t in texts]
        ids = np.zeros((count, CAPTION_BUCKET), np.int32)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e.ids)] = e.ids
        u = (rng.permutation(count) + rng.random(count)) / count
        sigma = (3 * u / (1 + 2 * u)).astype(np.float32)
        return x, sigma, ids, np.array([len(e.ids) for e in encoded], np.int32)


def split(params: Params) -> tuple[dit.DiT, text_encoder.TextEncoder]:
    """The two modules trained together, from their one table of parameters."""
    transformer = with_arrays(
        dit.spec(CONFIG.transformer), lambda path, _: params["transformer." + path]
    )
    text = with_arrays(
        text_encoder.spec(CONFIG.text_encoder), lambda path, _: params["text_encoder." + path]
    )
    return transformer, text


def dit_loss(params: Params, key: Array, x: Float[Array, "B h w C"], sigma, ids, lengths) -> Array:
    """`matching_loss` of the modules in `params`."""
    return matching_loss(*split(params), key, x, sigma, ids, lengths)


def matching_loss(
    transformer: dit.DiT,
    text: text_encoder.TextEncoder,
    key: Array,
    x: Float[Array, "B h w C"],
    sigma,
    ids,
    lengths,
) -> Array:
    """Flow matching: the model's velocity is picture minus noise."""
    count, h, w, _ = x.shape
    sides = dit.inputs(CONFIG.transformer, h, w, np.full(count, CAPTION_BUCKET), CAPTION_BUCKET)
    features = text_encoder.apply_blocks(text.layers, text.embed_tokens[...][ids])
    context = dit.context(transformer, features, lengths, sides.caption._replace(lengths=None))
    noise = jax.random.normal(key, x.shape)
    s = sigma[:, None, None, None]
    time = dit.embed_time(transformer.stem, 1 - sigma)
    sides = sides._replace(joint=sides.joint._replace(lengths=None))
    return jnp.mean(
        jnp.square(
            dit.denoise(transformer, (1 - s) * x + s * noise, time, context, sides) - (x - noise)
        )
    )


def first_parameters(seed: int) -> Params:
    keys = jax.random.split(jax.random.key(seed))
    transformer = named_arrays(initialise(dit.spec(CONFIG.transformer), keys[0]))
    text = named_arrays(initialise(text_encoder.spec(CONFIG.text_encoder), keys[1]))
    params = {f"transformer.{k}": v for k, v in transformer.items()} | {
        f"text_encoder.{k}": v for k, v in text.items()
    }
    # every block and the velocity start at zero
    closed = ("modulation.kernel", "stem.final.kernel")
    return {k: jnp.zeros_like(v) if k.endswith(closed) else v for k, v in params.items()}


def parameters_of(path: Path) -> Params:
    """The DiT and text encoder of a native checkpoint, in float32, to train on from."""
    stored = Checkpoint(path)
    return {
        f"{component}.{name}": jnp.asarray(array, jnp.float32)
        for component in ("transformer", "text_encoder")
        for unit in stored.units(component)
        for name, array in stored.read(component, unit).items()
    }


def train_dit(
    runs: Path, steps: int, seed: int, rate: float, adam_rate: float, start: Path | None
) -> None:
    prompts = Prompts.load(runs / "tokenizer.json")
    scaling, shift = latent_statistics(runs)
    config = replace(CONFIG, vae=replace(CONFIG.vae, scaling_factor=scaling, shift_factor=shift))
    vae_spec = vae.spec(config.vae)
    vae_params = average_of(runs / "vae", named_arrays(vae_spec))
    decoder = with_arrays(vae_spec, lambda path, _: vae_params[path])
    rng = np.random.default_rng([seed, 98])
    scenes = [tiny_data.random_scene(rng, held_out=True) for _ in range(128)]
    captions = [tiny_data.caption(s, "en" if i % 2 else "zh", rng) for i, s in enumerate(scenes)]
    phases = (Phase(kv.plain(jnp.float32), 8),)
    sample = jax.jit(partial(sampling.sample, attend=Attend(), phases=phases))
    decode = jax.jit(vae.decode)

    def evaluate(params: Params) -> dict:
        transformer, text = split(params)
        updates = Trajectory.of(8, config.scheduler.shift).update
        verdicts: dict[str, list[bool]] = {}
        for first in range(0, len(scenes), 32):
            group = slice(first, first + 32)
            encoded = [prompts.encode(c, CAPTION_BUCKET) for c in captions[group]]
            ids, lengths = batch_ids(encoded)
            sides = dit.inputs(config.transformer, 16, 16, lengths, ids.shape[1])
            features = text_encoder.apply_blocks(text.layers, text.embed_tokens[...][ids])
            context = dit.context(transformer, features, lengths, sides.caption)
            noise = np.stack(
                [sampling.noise_torch(i, 16, 16, 16) for i in range(first, first + len(ids))]
            )
            latents = sample(transformer, noise, updates, context, sides, (None,))
            for scene, picture in zip(
                scenes[group], np.asarray(decode(decoder, latents)), strict=True
            ):
                for name, verdict in judge(image.to_uint8(picture), scene).items():
                    verdicts.setdefault(name, []).append(verdict)
        return {name: round(100 * float(np.mean(v)), 1) for name, v in sorted(verdicts.items())}

    params = parameters_of(start) if start else first_parameters(seed)
    tx = optimizer(params, schedule(rate, steps), schedule(adam_rate, steps))
    batches = Batches(runs, seed, prompts, scaling, shift)
    fit(runs / "dit", params, tx, dit_loss, batches, steps, 500, 0.9995, evaluate)


# -- export ----------------------------------------------------------------------------------------


def export(runs: Path, destination: Path) -> None:
    """The averaged parameters, in bfloat16, as a native checkpoint."""
    scaling, shift = latent_statistics(runs)
    config = replace(
        CONFIG, vae=replace(CONFIG.vae, scaling_factor=scaling, shift_factor=shift, sample_size=128)
    )
    vae_spec = vae.spec(config.vae)
    vae_params = average_of(runs / "vae", named_arrays(vae_spec))
    transformer, text = split(average_of(runs / "dit", first_parameters(0)))
    models = {
        "transformer": transformer,
        "text_encoder": text,
        "vae": with_arrays(vae_spec, lambda p, _: vae_params[p]),
    }
    provenance = {
        "made by": "scripts/tiny/train.py",
        "steps": {n: last_step(runs / n) for n in ("vae", "dit")},
    }
    fresh = destination.with_name(destination.name + ".new")
    save(
        fresh,
        uniform(config, "bfloat16"),
        models,
        (runs / "tokenizer.json").read_bytes(),
        provenance,
    )
    card = destination / "README.md"
    if card.exists():  # the model card is written by hand
        shutil.copy(card, fresh)
    shutil.rmtree(destination, ignore_errors=True)
    fresh.rename(destination)


def last_step(folder: Path) -> int:
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"]


# -- commands --------------------------------------------------------------------------------------

runs_option = click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs/tiny"), show_default=True
)
seed_option = click.option("--seed", default=0, show_default=True)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("glyphs")
@click.option(
    "--font", required=True, help="A free font with Latin and Chinese, such as Noto Sans CJK Bold."
)
@click.option("--index", default=2, show_default=True, help="The face in a collection.")
def glyphs_command(font: str, index: int) -> None:
    """Draw the sheet of glyph masks (committed, so that no font is needed afterwards)."""
    tiny_data.make_glyph_sheet(font, index)


@main.command("tokenizer")
@runs_option
def tokenizer_command(runs: Path) -> None:
    """Learn the byte-level BPE."""
    runs.mkdir(parents=True, exist_ok=True)
    train_tokenizer(VOCABULARY).save(str(runs / "tokenizer.json"))


@main.command("vae")
@runs_option
@seed_option
@click.option("--steps", default=3000, show_default=True)
@click.option("--rate", default=0.01, show_default=True)
@click.option("--adam-rate", default=2e-3, show_default=True)
def vae_command(runs: Path, seed: int, steps: int, rate: float, adam_rate: float) -> None:
    """Train the VAE."""
    (runs / "vae").mkdir(parents=True, exist_ok=True)
    train_vae(runs, steps, seed, rate, adam_rate)


@main.command("latents")
@runs_option
@seed_option
@click.option("--shards", default=110, show_default=True, help=f"Of {SHARD} pictures each.")
def latents_command(runs: Path, seed: int, shards: int) -> None:
    """Encode the DiT's training pictures."""
    make_latents(runs, seed, shards)


@main.command("dit")
@runs_option
@seed_option
@click.option("--steps", default=7000, show_default=True)
@click.option("--rate", default=0.015, show_default=True)
@click.option("--adam-rate", default=2e-3, show_default=True)
@click.option(
    "--start", type=click.Path(path_type=Path), help="A native checkpoint to train on from."
)
def dit_command(
    runs: Path, seed: int, steps: int, rate: float, adam_rate: float, start: Path | None
) -> None:
    """Train the DiT and the text encoder together."""
    (runs / "dit").mkdir(parents=True, exist_ok=True)
    train_dit(runs, steps, seed, rate, adam_rate, start)


@main.command("export")
@runs_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("zimage_jax/assets/tiny"),
    show_default=True,
)
def export_command(runs: Path, output: Path) -> None:
    """Write the native checkpoint."""
    export(runs, output)


@main.command("all")
@runs_option
@seed_option
@click.pass_context
def all_command(context: click.Context, runs: Path, seed: int) -> None:
    """Every stage that is not finished."""
    context.invoke(tokenizer_command, runs=runs)
    for stage in (vae_command, latents_command, dit_command):
        context.invoke(stage, runs=runs, seed=seed)
    context.invoke(export_command, runs=runs)


if __name__ == "__main__":
    main()
