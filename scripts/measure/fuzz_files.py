"""Mutate the files that a checkpoint is read, converted or resumed from: every fault must end in one line.

    python -m scripts.measure.fuzz_files [--count 2000] [--seed 0]

The tiny model's files serve; its manifest as version 1, which no checksum guards; and small files in ComfyUI's
quantised layouts and in GGUF, which are read whole (--only quantised). A traceback is a finding.
"""

import argparse
import collections
import json
import random
import re
import shutil
import tempfile
from pathlib import Path

from checkpoints_convert.inspect import inspect
from zimage_jax.errors import ZImageError
from zimage_jax.model.prompt import Prompts
from zimage_jax.weights import sources
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.search import TINY
from zimage_jax.weights.writer import Writer

TOKENS = re.compile(r'"[^"]*"|-?\d[\d.e+-]*|true|false|null|\[[^][]*\]|\{[^{}]*\}')
HOSTILE = (
    *("null", "true", "0", "-1", "1.5", "1e308", "1" * 400, '""', '"\\u001b[31m\\n\\u0000"', '"y"'),
    *('"\\ud800"', '"../../a"', "[]", "[[]]", "{}", '{"a": {}}', "[null]", '["float32"]', "[9, 9]"),
    *(json.dumps("x" * 9999), json.dumps([1] * 999), "[" * 90 + "]" * 90, "[" * 50_000, "NaN"),
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut out, doubled, replaced, or the deepest JSON put in their place."""
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 4, 1000)))
    new = (b"", data[at:end] * 2, rng.randbytes(end - at), b"[" * 50_000, b"\0" * (end - at))
    return data[:at] + rng.choice(new) + data[end:]


def spoilt(rng: random.Random, data: bytes) -> bytes:
    """A key or a value somewhere in a JSON text replaced."""
    text = data.decode()
    token = rng.choice(list(TOKENS.finditer(text)))
    return (text[: token.start()] + rng.choice(HOSTILE) + text[token.end() :]).encode()


def changed(rng: random.Random, data: bytes, kind: str) -> bytes:
    """A mutation of a safetensors or GGUF file, in its header more often than its share."""
    end = 8 + int.from_bytes(data[:8], "little") if kind == ".safetensors" else 8000
    if kind == ".safetensors" and rng.random() < 0.6:
        text = spoilt(rng, data[8:end])
        return len(text).to_bytes(8, "little") + text + data[end:]
    return mutated(rng, data[:end]) + data[end:] if rng.random() < 0.7 else mutated(rng, data)


def quantised(folder: Path) -> dict:
    """File -> what reads it, of quantised files."""
    from tests.checkpoints_convert import test_hostile

    return dict.fromkeys(test_hostile.files(folder).values(), test_hostile.read)


def targets(folder: Path) -> dict:
    """File -> what reads it."""
    tiny, vae, dst = shutil.copytree(TINY, folder / "tiny"), folder / "vae", folder / "dst"
    storage, found = Checkpoint(tiny).storage, {}
    for part, (_, place) in sources.CONFIGS.items():
        (folder / place).parent.mkdir()
        (folder / place).write_text(json.dumps(storage.config.to_json()[part]))
        found[folder / place] = lambda _: sources.read_configs(folder)
    index = vae / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "decoder.safetensors"}}))
    shutil.copy(tiny / "vae" / "decoder.safetensors", vae)
    manifest = tiny / "manifest" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    Writer(dst, storage).close()
    return found | {
        tiny / "vae" / "decoder.safetensors": lambda file: sources.open_file("vae", file),
        manifest: lambda _: inspect(tiny),
        tiny / "tokenizer.json": Prompts.load,
        index: lambda _: sources.open_component_folder("vae", vae),
        folder / "dst.partial" / "plan.json": lambda _: Writer(dst, storage).close(),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--count", 2000), ("--seed", 0)):
        options.add_argument(name, type=int, default=default)
    options.add_argument("--only", choices=["quantised"])
    given = options.parse_args()
    rng, tally = random.Random(given.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        readers = quantised(Path(name)) | ({} if given.only else targets(Path(name)))
        originals = {file: file.read_bytes() for file in readers}
        for _ in range(given.count):
            file = rng.choice(list(readers))
            data, outcome = originals[file], "read"
            is_json = file.suffix == ".json" and rng.random() < 0.7
            if is_json:
                data = spoilt(rng, data)
            else:
                data = (
                    mutated(rng, data)
                    if file.suffix == ".json"
                    else changed(rng, data, file.suffix)
                )
            file.write_bytes(data)
            try:
                readers[file](file)
            except ZImageError as fault:
                outcome, line = type(fault).__name__, str(fault)
                if not line.replace("\n", "").isprintable() or len(line) > 5000:
                    raise AssertionError(f"no short line for {data[:2000]!r}") from fault
            file.write_bytes(originals[file])
            tally[file.name, outcome] += 1
    for (name, outcome), count in sorted(tally.items()):
        print(f"{count:6d} {name} {outcome}")


if __name__ == "__main__":
    main()
