"""What each K/V policy costs a picture and saves of memory, on the tiny model: PSNR against float32
K and V, accuracy by program, bytes of K and V, seconds.

    python -m scripts.measure.kv -o runs/kv --scenes 24     every combination, two held-out prompts a scene, 256x256
    python -m scripts.measure.kv -o runs/kv --set main      200 prompts, the policies of scripts/results/kv.md
    python -m scripts.measure.kv -o runs/kv --set packed    200 prompts, packed K and V among others

Every batch of prompts is drawn under all policies in turn, so that their seconds compare; what is
drawn is kept in RESULTS.jsonl in the folder, and a second run goes on from there. Writes table.md,
plot.svg and frontier.svg beside it."""

import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import click
import matplotlib
import numpy as np
from tqdm import tqdm

from scripts.tiny.evaluate import held_out
from scripts.tiny.judge import judge
from zimage_jax import KVPolicy, Memory, ZImage
from zimage_jax.cli import use_compile_cache

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "zimage_jax"}
BATCH = 16
REFERENCE = {"dtype": "float32"}
GROUPS = ("1", "2", "4", "2:1", "4:1", "1:2", "1:4")  # early:late, one for both
DTYPES = ("bf16", "fp16", "fp8:fp16")


def policies() -> list[dict]:
    """The words of every policy, the reference first."""
    precision = [
        {"dtype": "bf16:fp16"},
        {"dtype": "bf16:fp16", "group": "2:1"},
        {"dtype": "fp8:bf16"},
    ]
    alone = [{"dtype": "float32", "group": group} for group in GROUPS[1:3]] + [
        {"dtype": "float32", "reuse": 2}
    ]
    every = [{"dtype": d, "group": g, "reuse": r} for d, g, r in product(DTYPES, GROUPS, (1, 2))]
    return [REFERENCE, *alone, *precision, *every]


MAIN = [
    {"dtype": "bf16"},
    {"dtype": "fp16"},
    {"dtype": "bf16:fp16"},
    {"dtype": "fp8:fp16"},
    {"dtype": "fp16", "group": "1:2"},
    {"dtype": "fp16", "group": "2:1"},
    {"dtype": "fp16", "group": "2"},
    {"dtype": "fp16", "reuse": 2},
]
PACKED = [
    {"dtype": "bf16"},
    {"dtype": "fp8:bf16"},
    *({"dtype": f"int{bits}"} for bits in (8, 6)),
    *({"dtype": f"k{k}v{v}"} for k, v in ((6, 6), (5, 6), (6, 5), (5, 5), (5, 4), (4, 4))),
    {"dtype": "bf16", "group": "2:1"},
    {"dtype": "k5v6", "reuse": 2},
]
SETS = {"every": policies(), "main": [REFERENCE, *MAIN], "packed": [REFERENCE, *PACKED]}


def name(words: dict) -> str:
    group, reuse = words.get("group", "1"), words.get("reuse", 1)
    return f"{words['dtype']}, group {group}" + (f", reuse {reuse}" if reuse > 1 else "")


def draw(
    pipe: ZImage, prompts: list, first: int, words: dict, size: int
) -> tuple[np.ndarray, dict]:
    """Pictures of a batch, and what they cost."""
    captions, seeds = [caption for *_, caption in prompts], list(range(first, first + len(prompts)))
    result = pipe.generate(
        captions, seed=seeds, width=size, height=size, kv=KVPolicy.parse(**words)
    )
    of_block = result.report["kv_bytes_of_a_block_by_nfe"]
    return np.stack([p.pixels for p in result.pictures]), {
        "pictures": len(prompts),
        "kv_bytes": result.report["kv_bytes"],
        "kv_bytes_of_a_block_and_picture": sum(of_block) / len(of_block) / len(prompts),
        "most_kv_bytes_of_a_block_and_picture": max(of_block) / len(prompts),
        "denoise_seconds": result.ledger.seconds["denoise"],
    }


def rows(pipe: ZImage, prompts: list, size: int, chosen: list[dict], done: set) -> Iterator[dict]:
    """A row per batch and policy. The reference is drawn anew for what is missing of a batch: its
    seconds are of that time."""
    for first in tqdm(range(0, len(prompts), BATCH), unit="batch"):
        group = prompts[first : first + BATCH]
        missing = [words for words in chosen if (first, name(words)) not in done]
        if missing:
            draw(pipe, group, first, REFERENCE, size)  # warms up
            reference, cost = draw(pipe, group, first, REFERENCE, size)
            whole = {"reference_seconds": cost["denoise_seconds"]}
        for words in missing:
            pixels, cost = draw(pipe, group, first, words, size)
            error = np.square((pixels.astype(np.float64) - reference) / 255).mean((1, 2, 3))
            verdicts: dict[str, list[int]] = {}
            for picture, (scene, *_) in zip(pixels, group, strict=True):
                for attribute, right in judge(picture, scene).items():
                    verdicts.setdefault(attribute, []).append(int(right))
            row = {"first": first, "policy": name(words), **words, **cost, **whole}
            yield row | {"mse": error.tolist(), "verdicts": verdicts}


def summary(found: list[dict]) -> list[dict]:
    """A row per policy over its batches."""
    by_policy: dict[str, list[dict]] = {}
    for row in found:
        by_policy.setdefault(row["policy"], []).append(row)
    whole = by_policy[name(REFERENCE)]
    result = []
    for policy, batches in by_policy.items():
        mse = np.concatenate([b["mse"] for b in batches]).mean()
        right = [v for b in batches for verdicts in b["verdicts"].values() for v in verdicts]
        ratios = [b["denoise_seconds"] / b["reference_seconds"] for b in batches]
        result.append(
            {
                "policy": policy,
                "pictures": sum(b["pictures"] for b in batches),
                "psnr_db": float("inf") if mse == 0 else -10 * math.log10(mse),
                "accuracy": 100 * float(np.mean(right)),
                "block_bytes": batches[0]["kv_bytes_of_a_block_and_picture"],
                "share": batches[0]["kv_bytes_of_a_block_and_picture"]
                / whole[0]["kv_bytes_of_a_block_and_picture"],
                "bits": 32
                * batches[0]["most_kv_bytes_of_a_block_and_picture"]
                / whole[0]["most_kv_bytes_of_a_block_and_picture"],
                "seconds": float(np.median(ratios)),
                "reuse": batches[0].get("reuse", 1),
                "dtype": batches[0]["dtype"],
            }
        )
    return sorted(result, key=lambda r: (r["reuse"], -r["psnr_db"]))


def table(result: list[dict]) -> Iterator[str]:
    yield "| policy | K/V bytes of float32's | fewer than bf16's | most bits a value | PSNR dB | accuracy % | seconds of float32's | pictures |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in result:
        yield (
            f"| {r['policy']} | {100 * r['share']:.1f} % | {100 * (1 - 2 * r['share']):.0f} % | {r['bits']:.2f} | {r['psnr_db']:.1f} "
            f"| {r['accuracy']:.1f} | {r['seconds']:.2f} | {r['pictures']} |"
        )


def plot(result: list[dict], file: Path) -> None:
    """Bytes of a block's K and V against PSNR."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for dtype in dict.fromkeys(r["dtype"] for r in result):
        for reuse, marker in ((1, "o"), (2, "x")):
            chosen = [
                r
                for r in result
                if r["dtype"] == dtype and r["reuse"] == reuse and r["psnr_db"] < 1000
            ]
            if chosen:
                label = dtype + (", reuse 2" if reuse == 2 else "")
                axis.scatter(
                    [100 * r["share"] for r in chosen],
                    [r["psnr_db"] for r in chosen],
                    marker=marker,
                    label=label,
                )
    axis.axhline(38.2, color="gray", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("K/V bytes of a block, % of float32's (mean over NFEs)")
    axis.set_ylabel("PSNR against float32 K/V, dB")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def frontier(result: list[dict], file: Path) -> None:
    """The most bits a value takes at once, with scales, against PSNR; a line joins the policies
    that none beats in both."""
    chosen = sorted(
        (r for r in result if r["reuse"] == 1 and math.isfinite(r["psnr_db"])),
        key=lambda r: (r["bits"], -r["psnr_db"]),
    )
    best = [
        r
        for i, r in enumerate(chosen)
        if all(r["psnr_db"] > other["psnr_db"] for other in chosen[:i])
    ]
    figure, axis = plt.subplots(figsize=(7, 4.5))
    axis.plot([r["bits"] for r in best], [r["psnr_db"] for r in best], color="0.6", zorder=1)
    axis.scatter([r["bits"] for r in chosen], [r["psnr_db"] for r in chosen], zorder=2)
    for r in chosen:
        text = r["policy"].removesuffix(", group 1")
        at = (r["bits"], r["psnr_db"])
        axis.annotate(text, at, textcoords="offset points", xytext=(5, -9), fontsize=8)
    axis.axhline(38.2, color="gray", linewidth=0.8, linestyle=":")
    axis.axvline(6.4, color="gray", linewidth=0.8, linestyle=":")
    axis.set_xlabel(
        "bits a value of K and V, with scales, at their peak (dotted: 60 % fewer than 16)"
    )
    axis.set_ylabel("PSNR against float32 K/V, dB (dotted: 38.2)")
    axis.margins(0.12)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


@click.command(help=__doc__)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for results."
)
@click.option("--scenes", default=100, show_default=True, help="Held-out scenes; two prompts each.")
@click.option("--size", default=256, show_default=True)
@click.option(
    "--set", "name_of_set", type=click.Choice(list(SETS)), default="every", help="Policies."
)
def main(output: Path, scenes: int, size: int, name_of_set: str) -> None:
    use_compile_cache()
    chosen = SETS[name_of_set]
    output.mkdir(parents=True, exist_ok=True)
    results = output / "RESULTS.jsonl"
    found = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    pipe, prompts = ZImage.load(memory=Memory(schedule="resident")), list(held_out(scenes, seed=3))
    with results.open("a") as f:
        for row in rows(pipe, prompts, size, chosen, {(r["first"], r["policy"]) for r in found}):
            f.write(json.dumps(row) + "\n")
            f.flush()
            found.append(row)
    result = summary(found)
    text = "\n".join(table(result)) + "\n"
    (output / "table.md").write_text(text)
    plot(result, output / "plot.svg")
    frontier(result, output / "frontier.svg")
    click.echo(text)


if __name__ == "__main__":
    main()
