"""One DiT block of the published width in float32 and bfloat16, and a whole small pipeline in
float32, against diffusers: same CPU and threads.

    python -m scripts.bench.pytorch [--runs 7] [--tokens 1056] [--size 256]

The two sides run in turn in one process; printed are medians and the ratio ours / theirs. Needs the
reference extra."""

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import jax
import numpy as np

warnings.simplefilter("ignore")

import torch  # noqa: E402
from diffusers.models.transformers.transformer_z_image import RopeEmbedder, ZImageTransformerBlock  # noqa: E402

from tests import reference, small  # noqa: E402
from zimage_jax import ZImage  # noqa: E402
from zimage_jax.model import dit, ops  # noqa: E402
from zimage_jax.model.attention import Attend  # noqa: E402
from zimage_jax.model.config import TURBO  # noqa: E402
from zimage_jax.model.layers import with_arrays  # noqa: E402
from zimage_jax.weights import names as rules  # noqa: E402
from zimage_jax.weights.formats import uniform  # noqa: E402
from zimage_jax.weights.writer import save  # noqa: E402

# about the embedded model's size: what "small" means here
SMALL = small.small_config(
    dim=192,
    heads=6,
    axes=(8, 12, 12),
    layers=8,
    features=128,
    text_layers=4,
    text_heads=(4, 2),
    text_width=32,
    channels=(16, 32, 64, 64),
)


def in_turn(ours: Callable, theirs: Callable, runs: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for k in range(runs + 1):
        for name, call in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            call()
            if k:  # the first of each compiles and warms up
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ours_sec": round(median["ours"], 4),
        "diffusers_sec": round(median["theirs"], 4),
        "ratio": round(median["ours"] / median["theirs"], 3),
    }


def block(tokens: int, runs: int, dtype: str) -> dict[str, float]:
    config = TURBO.transformer
    theirs = ZImageTransformerBlock(
        0, config.dim, config.n_heads, config.n_heads, config.norm_eps, True
    ).eval()
    theirs.requires_grad_(False)
    tensors = {f"layers.0.{n}": t.numpy() for n, t in theirs.state_dict().items()}
    entries = rules.expected(rules.DIT_DIFFUSERS, dit.spec(config))
    arrays = {
        e.paths[0].removeprefix("layers.0."): np.ascontiguousarray(
            rules.to_native(tensors[name], e.transform)
        )
        for name, e in entries.items()
        if name in tensors
    }
    ours = with_arrays(dit.Block(config), lambda path, _: jax.numpy.asarray(arrays[path], dtype))
    theirs = theirs.to(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    x, time = (
        rng.standard_normal((1, *shape), np.float32) for shape in ((tokens, config.dim), (256,))
    )
    positions = rng.integers(0, 64, (1, tokens, 3))
    cos, sin = ops.rope_table(positions, config.axes_dims, config.rope_theta)
    freqs = RopeEmbedder(config.rope_theta, list(config.axes_dims), list(config.axes_lens))(
        torch.from_numpy(positions[0])
    )[None]
    run = jax.jit(lambda m, x, inputs: dit.apply_blocks([m], x, inputs, Attend()))
    x_jax, time_jax = (jax.numpy.asarray(a, dtype) for a in (x, time))
    x_torch, time_torch = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in (x, time))
    inputs = dit.BlockInputs(*map(jax.numpy.asarray, (cos, sin)), None, time_jax)

    def by_torch():
        return theirs(x_torch, None, freqs, time_torch)

    expected, got = by_torch().float().numpy(), np.asarray(run(ours, x_jax, inputs), np.float32)
    assert (
        np.linalg.norm(got - expected) / np.linalg.norm(expected)
        < {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    )
    return in_turn(lambda: jax.block_until_ready(run(ours, x_jax, inputs)), by_torch, runs)


def diffusers_pipeline():
    """diffusers' pipeline of the small random model."""
    return reference.pipeline(SMALL, small.random_tensors(SMALL))


def our_pipeline(folder: Path) -> ZImage:
    """Ours of the same, from a checkpoint written into `folder`."""
    tensors = small.random_tensors(SMALL)
    models = {c: small.our_model(c, SMALL, tensors[c]) for c in small.MODELS}
    tokenizer = small.tokenizer().to_str().encode()
    return ZImage.load(save(folder / "m", uniform(SMALL, "float32"), models, tokenizer, {}))


def pipeline(size: int, runs: int) -> dict[str, float]:
    theirs = diffusers_pipeline()
    prompt, job = "a red circle above a blue square", {"width": size, "height": size}
    with tempfile.TemporaryDirectory() as folder:
        ours = our_pipeline(Path(folder))
        return in_turn(
            lambda: ours.generate(prompt, seed=1, **job),
            lambda: theirs(
                prompt,
                num_inference_steps=8,
                guidance_scale=0.0,
                generator=torch.Generator().manual_seed(1),
                **job,
            ),
            runs,
        )


@click.command(help=__doc__)
@click.option("--runs", default=7, show_default=True)
@click.option("--tokens", default=1056, show_default=True)
@click.option("--size", default=256, show_default=True)
@torch.no_grad()
def main(runs: int, tokens: int, size: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    result = {
        "threads": torch.get_num_threads(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        **{
            f"block_{tokens}_tokens_{dtype}": block(tokens, runs, dtype)
            for dtype in ("float32", "bfloat16")
        },
        f"pipeline_{size}": pipeline(size, runs),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
