"""What a conversion reads: a folder as diffusers saves it, or single files as ComfyUI keeps them.

Every source is a set of safetensors files. Opening one reads headers alone; the safetensors library
refuses a header that lies about sizes or offsets. Pickles are never opened: they run code."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from zimage_jax.errors import ConfigError, ConversionError, ForeignError, UsageError
from zimage_jax.model import dit, text_encoder, vae
from zimage_jax.model.config import (
    TURBO,
    DiTConfig,
    ModelConfig,
    SigmasConfig,
    TextEncoderConfig,
    VAEConfig,
)
from zimage_jax.weights import names as rules

COMPONENTS = ("transformer", "text_encoder", "vae")
_CONFIGS: dict[str, tuple[Any, str]] = {
    "transformer": (DiTConfig, "transformer/config.json"),
    "text_encoder": (TextEncoderConfig, "text_encoder/config.json"),
    "vae": (VAEConfig, "vae/config.json"),
    "scheduler": (SigmasConfig, "scheduler/scheduler_config.json"),
}
_WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "model.",
    "vae": "first_stage_model.",
}
_NUMPY = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_LARGEST_JSON = 64 << 20
# tensors a source may carry and the model never uses
_LEFT_OUT = {
    "transformer": re.compile(r"norm_final\.weight"),
    "text_encoder": re.compile(r"norm\.weight|lm_head\.weight"),
    "vae": re.compile(r"(?!)"),
}
# other models, by a tensor name that only they have
_OTHERS = {
    r"double_blocks\.\d+\.img_attn\.qkv\.weight": "Flux",
    r"transformer_blocks\.\d+\.attn\.add_k_proj\.weight": "Flux or SD3 (diffusers)",
    r"joint_blocks\.\d+\..*": "SD3",
    r"(input_blocks|down_blocks)\.\d+\..*(transformer_blocks|attentions)\..*": "SDXL or another Stable Diffusion UNet",
    r"conditioner\.embedders\..*": "SDXL",
    r"layers\.\d+\.attention\.wqkv\.weight": "Lumina",
    r"text_model\.encoder\..*": "a CLIP text encoder",
    r"encoder\.block\.\d+\.layer\..*": "a T5 text encoder",
    r"visual\..*": "a Qwen vision-language model",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a source: where it lies and what its header says of it."""

    file: Path
    name: str  # as the file has it
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, F16
    offset: int  # of its first byte in the file

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows of the first axis, read (not mapped: what is mapped counts as this process's memory,
        and is read in small pieces). float16 is widened to float32, from where it is rounded to
        what is wanted."""
        dtype = _NUMPY[self.dtype]
        width = math.prod(self.shape[1:])
        values = np.fromfile(
            self.file,
            dtype,
            (last - first) * width,
            offset=self.offset + first * width * dtype.itemsize,
        )
        values = values.reshape(last - first, *self.shape[1:])
        return values.astype(np.float32) if dtype == np.float16 else values


@dataclass
class Component:
    """One model of a source: its layout, and its tensors by name without prefix."""

    name: str
    layout: str  # "diffusers", "comfy" or "flux"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        return sorted({t.file for t in self.tensors.values()})

    def table(self, config: ModelConfig) -> list:
        if self.layout == "flux":
            return rules.vae_flux(len(config.vae.block_out_channels))
        return {
            ("transformer", "diffusers"): rules.DIT_DIFFUSERS,
            ("transformer", "comfy"): rules.DIT_COMFY,
            ("text_encoder", "diffusers"): rules.TEXT_ENCODER,
            ("vae", "diffusers"): rules.VAE_DIFFUSERS,
        }[self.name, self.layout]


@dataclass
class Source:
    components: dict[str, Component]
    config: ModelConfig
    tokenizer: Path

    def entries(self, component: str) -> dict[str, rules.Entry]:
        """The tensors this component must have, by name."""
        model = {"transformer": dit, "text_encoder": text_encoder, "vae": vae}[component]
        spec = model.spec(getattr(self.config, component))
        return rules.expected(self.components[component].table(self.config), spec)

    def check(self) -> None:
        """Raises ConversionError with every unknown, missing, duplicate and misshapen tensor of all
        components."""
        faults = [fault for component in COMPONENTS for fault in self._faults(component)]
        if faults:
            kinds = ", ".join(
                f"{sum(kind in f for f in faults)} {kind}"
                for kind in _KINDS
                if any(kind in f for f in faults)
            )
            raise ConversionError(
                f"the tensors are not exactly those of the configured Z-Image ({kinds}); nothing was written:\n"
                + "\n".join(f"  {f}" for f in faults)
            )

    def _faults(self, component: str) -> Iterator[str]:
        found, expected = self.components[component].tensors, self.entries(component)
        last = f"layers.{self.config.text_encoder.n_layers}."  # the layer behind the features
        for name in self.components[component].duplicates:
            yield f"{component}: duplicate {name} (in {found[name].file.name} and elsewhere)"
        for name in sorted(expected.keys() - found.keys()):
            yield f"{component}: missing {name} {list(expected[name].shape)}"
        for name, tensor in sorted(found.items()):
            if name in expected:
                if tensor.shape != expected[name].shape:
                    yield f"{component}: misshapen {name}: expected {list(expected[name].shape)}, got {list(tensor.shape)}"
                if tensor.dtype not in _NUMPY:
                    yield f"{component}: unsupported dtype {tensor.dtype} of {name} (F32, BF16 or F16 is read; not quantised files)"
            elif not _LEFT_OUT[component].fullmatch(name) and not (
                component == "text_encoder" and name.startswith(last)
            ):
                yield f"{component}: unknown {name} {list(tensor.shape)}"


_KINDS = ("missing", "unknown", "duplicate", "misshapen", "unsupported dtype")


# -- opening ---------------------------------------------------------------------------------------


def open_source(
    folder: Path | None, files: dict[str, Path], config_folder: Path | None, tokenizer: Path | None
) -> Source:
    """`folder` as diffusers saves it; `files` take the place of its components, or are all there
    is."""
    components = {c: open_file(c, path) for c, path in files.items()}
    missing = [c for c in COMPONENTS if c not in files]
    if folder is not None:
        if not folder.is_dir():
            raise ForeignError(
                f"{folder}: expected a folder as diffusers saves it; single files go with --dit, --vae, …"
            )
        components |= {c: open_component_folder(c, folder / c) for c in missing}
    elif missing:
        flags = ", ".join(
            "--dit" if c == "transformer" else "--" + c.replace("_", "-") for c in missing
        )
        raise UsageError(f"without a source folder every component needs a file: {flags} missing")
    configs = config_folder or folder
    if configs is not None:
        config = read_configs(configs)
        tokenizer = tokenizer or configs / "tokenizer" / "tokenizer.json"
    elif tokenizer is None:
        raise UsageError(
            "single files hold no tokenizer: give --config FOLDER, or --tokenizer FILE for the published model"
        )
    else:
        config = TURBO
    if not tokenizer.is_file():
        raise ConversionError(
            f"{tokenizer}: the tokenizer is missing; Z-Image's folder has it as tokenizer/tokenizer.json"
        )
    return Source({c: components[c] for c in COMPONENTS}, config, tokenizer)


def read_configs(folder: Path) -> ModelConfig:
    parts = {}
    for name, (kind, path) in _CONFIGS.items():
        parts[name] = kind.from_json(read_json(folder / path), str(folder / path))
    try:
        return ModelConfig(**parts)
    except ConfigError as fault:
        raise ConfigError(f"{folder}: {fault}") from None


def read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ConfigError(f"{path}: too large for a JSON file of this kind")
        return json.loads(path.read_text("utf-8"))
    except OSError as fault:
        raise ConfigError(
            f"{path}: cannot be read ({fault.strerror}); is this the whole folder?"
        ) from None
    except ValueError as fault:
        raise ConfigError(f"{path}: not JSON ({fault})") from None


def open_component_folder(component: str, folder: Path) -> Component:
    """The shards an index names, or the one file there is."""
    stem = _WEIGHTS[component]
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise ConversionError(
                f"{index}: expected a weight_map from tensor names to shard files"
            )
        shards = sorted(set(names.values()))
        if bad := [s for s in shards if Path(s).name != s]:
            raise ConversionError(f"{index}: {bad[0]!r} is not the name of a file beside it")
        files = [folder / s for s in shards]
    elif single.is_file():
        files = [single]
    else:
        pickles = [p.name for p in folder.glob("*.bin")] if folder.is_dir() else []
        hint = (
            f"{pickles[0]} is a pickle and is not opened; save as safetensors"
            if pickles
            else "is this the whole folder?"
        )
        raise ConversionError(f"{folder}: expected {single.name} or {index.name}; {hint}")
    return _collect(component, files)


def open_file(component: str, path: Path) -> Component:
    return _collect(component, [path])


def _collect(component: str, files: list[Path]) -> Component:
    tensors = [tensor for file in files for tensor in read_header(file)]
    prefix = _PREFIXES[component]
    prefixed = any(t.name.startswith(prefix) for t in tensors)
    result = Component(component, "diffusers")
    for tensor in tensors:
        bare = tensor.name.removeprefix(prefix) if prefixed else tensor.name
        if bare in result.tensors:
            result.duplicates.append(bare)
        result.tensors[bare] = tensor
    result.layout = _layout(component, result.tensors, files)
    return result


def read_header(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file. The library has checked that its sizes and offsets are
    those of the file."""
    try:
        with safe_open(file, "numpy"):
            pass
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except SafetensorError as fault:
        raise ConversionError(
            f"{file}: not a whole safetensors file ({fault}); download it again"
        ) from None
    except OSError as fault:
        raise ConversionError(f"{file}: cannot be read ({fault.strerror or fault})") from None
    header.pop("__metadata__", None)
    return [
        Tensor(
            file, name, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    ]


def _layout(component: str, tensors: dict[str, Tensor], files: list[Path]) -> str:
    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    layouts = {
        "transformer": {
            "comfy": r"layers\.\d+\.attention\.qkv\.weight",
            "diffusers": r"layers\.\d+\.attention\.to_q\.weight",
        },
        "text_encoder": {"diffusers": r"layers\.\d+\.self_attn\.q_norm\.weight"},
        "vae": {"flux": r"decoder\.up\.\d+\..*", "diffusers": r"decoder\.up_blocks\.\d+\..*"},
    }[component]
    for layout, pattern in layouts.items():
        if has(pattern):
            return layout
    other = next((model for pattern, model in _OTHERS.items() if has(pattern)), None)
    what = (
        f"these are tensors of {other}" if other else f"found names such as {sorted(tensors)[:2]}"
    )
    raise ForeignError(f"{files[0]}: not Z-Image's {component.replace('_', ' ')}; {what}")


# -- checksums -------------------------------------------------------------------------------------


def published_md5() -> dict[str, str]:
    lines = Path(__file__).with_name("published.md5").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def verify(folder: Path, *, quiet: bool = False) -> None:
    """Compare the published folder's files with their published MD5. Raises ConversionError naming
    all that differ."""
    published = published_md5()
    wrong = [f"{name} is missing" for name in published if not (folder / name).is_file()]
    present = [name for name in published if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in present)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet) as bar:
        for name in present:
            digest = hashlib.md5(usedforsecurity=False)
            with (folder / name).open("rb") as f:
                while run := f.read(1 << 22):
                    digest.update(run)
                    bar.update(len(run))
            if digest.hexdigest() != published[name]:
                wrong.append(f"{name} has MD5 {digest.hexdigest()}, published is {published[name]}")
    if wrong:
        raise ConversionError(
            f"{folder}: not the published files:\n" + "\n".join(f"  {w}" for w in wrong)
        )
