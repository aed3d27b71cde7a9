"""What fits every stage of the tiny model: optimiser, rates, the loop with its checkpoints and log."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from tqdm import tqdm

Params = dict[str, Array]


def optimizer(params: Params, rate, adam_rate) -> optax.GradientTransformation:
    """Muon on the matrices and convolutions inside blocks; AdamW on embeddings, modulation, ends
    and vectors."""

    def numbers(path: str, leaf: Array):
        inner = not any(
            name in path for name in ("stem.", "modulation", "embed_tokens", "conv_in", "conv_out")
        )
        if inner and path.endswith(".kernel"):
            return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
        return None

    table = {path: numbers(path, leaf) for path, leaf in params.items()}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rate, adam_learning_rate=adam_rate, adam_b2=0.99, muon_weight_dimension_numbers=table
        ),
    )


def schedule(peak: float, steps: int):
    """Warm up, stay, and fall to zero over the last 40 %."""
    warm, fall = min(200, steps // 10), int(0.4 * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0, peak, warm),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0, fall),
        ],
        [warm, steps - fall],
    )


def fit(
    folder: Path,
    params: Params,
    tx,
    loss: Callable,
    batches: Callable[[int], tuple],
    steps: int,
    every: int,
    decay: float,
    evaluate: Callable[[Params], dict],
) -> Params:
    """Minimise `loss(params, key, *batch)`; returns the averaged parameters. Resumes from
    `folder`."""
    state = {
        "params": params,
        "average": params,
        "opt": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    manager = ocp.CheckpointManager(
        folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))

    @jax.jit
    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(0), state["step"])
        value, grads = jax.value_and_grad(loss)(state["params"], key, *batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        keep = jnp.minimum(decay, (1 + state["step"]) / (10 + state["step"]))
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state["average"], params)
        return {"params": params, "average": average, "opt": opt, "step": state["step"] + 1}, value

    first, log = int(state["step"]), folder / "log.jsonl"
    recent, began = [], time.monotonic()
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=steps, initial=first, desc=folder.name, unit="step") as bar,
    ):
        pending = pool.submit(batches, first)
        for n in range(first, steps):
            batch = pending.result()
            pending = pool.submit(batches, n + 1)
            state, value = step(state, batch)
            recent.append(float(value))
            bar.update()
            if (n + 1) % every == 0 or n + 1 == steps:
                # saved before it is judged, so that a fault in judging loses nothing
                manager.save(n + 1, args=ocp.args.StandardSave(state))
                row = {
                    "step": n + 1,
                    "loss": float(np.mean(recent)),
                    "seconds": time.monotonic() - began,
                }
                row |= evaluate(state["average"])
                with log.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                bar.set_postfix(
                    {k: f"{v:.4g}" for k, v in row.items() if k not in ("step", "seconds")}
                )
                plot(log)
                recent = []
    manager.wait_until_finished()
    manager.close()
    return state["average"]


def average_of(folder: Path, like: Params) -> Params:
    """The averaged parameters of a stage's last checkpoint."""
    manager = ocp.CheckpointManager(folder.absolute())
    if manager.latest_step() is None:
        raise click.ClickException(
            f"{folder}: no checkpoint here; run the stage {folder.name!r} first"
        )
    restored = manager.restore(manager.latest_step())
    manager.close()
    return {path: jnp.asarray(restored["average"][path], leaf.dtype) for path, leaf in like.items()}


def plot(log: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    names = [n for n in rows[-1] if n not in ("step", "seconds")]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([r["step"] for r in rows], [r[name] for r in rows])
        axis.set_xlabel("step")
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(log.with_suffix(".svg"))
    plt.close(figure)
