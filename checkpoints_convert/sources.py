"""The source of a conversion: a folder in diffusers layout, or single files as ComfyUI has them.

Every source is a set of safetensors files. Opening a file reads only its header; the safetensors
library refuses a header with wrong sizes or offsets. Pickles are never opened: they can run code.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from zimage_jax.errors import ConfigError, ConversionError, ForeignError, UsageError
from zimage_jax.files import kind_of, open_regular, parse_json, printable, read_json
from zimage_jax.model.config import (
    PRESETS,
    ControlConfig,
    DefaultsConfig,
    DiTConfig,
    ModelConfig,
    SigmasConfig,
    TextEncoderConfig,
    VAEConfig,
)
from zimage_jax.model.control import Branch
from zimage_jax.weights import components
from zimage_jax.weights import names as rules
from zimage_jax.weights.checkpoint import Checkpoint

COMPONENTS = ("transformer", "text_encoder", "vae")
CONFIGS: dict[str, tuple[Any, str]] = {
    "transformer": (DiTConfig, "transformer/config.json"),
    "text_encoder": (TextEncoderConfig, "text_encoder/config.json"),
    "vae": (VAEConfig, "vae/config.json"),
    "scheduler": (SigmasConfig, "scheduler/scheduler_config.json"),
}
_FLAGS = {"transformer": "--dit", "text_encoder": "--text-encoder", "vae": "--vae"}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
# prefixes of tensor names in files that may have all three models
_PREFIXES = {
    "transformer": re.compile(r"^((model\.)?diffusion_model\.)?"),
    "text_encoder": re.compile(r"^(text_encoders\.qwen3_4b\.transformer\.)?(model\.)?"),
    "vae": re.compile(r"^((first_stage_model|vae)\.)?"),
}
_OF_OTHER_MODELS = {
    "transformer": ("text_encoders.", "first_stage_model.", "vae."),
    "text_encoder": ("model.diffusion_model.", "first_stage_model.", "vae."),
    "vae": ("model.diffusion_model.", "text_encoders."),
}
_NUMPY = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    # as cast without scales; a file with scales has tensors that no model has, and is refused
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_LARGEST_INDEX = 64 << 20
_SHOWN = 3  # tensors listed per kind of fault
# tensors that a source may have and the model never uses
_LEFT_OUT = {
    "transformer": re.compile(r"norm_final\.weight"),
    "text_encoder": re.compile(r"norm\.weight|lm_head\.weight"),
    "vae": re.compile(r"(?!)"),
}
# Union 2.0's own refiner was not trained: its authors' code runs the control layers instead
_LEFT_OUT_OF_CONTROL = re.compile(r"control_noise_refiner\..*")
_CONTROL = re.compile(r"control_(layers|noise_refiner|all_x_embedder)\..*")
# other models, recognised by a tensor name that only they have
_OTHERS = {
    r".*[._]lora_(A|B|up|down|a|b)\..*": "a LoRA, which is not a whole model",
    _CONTROL.pattern: "a Z-Image ControlNet, which is converted alone: SRC DST",
    r"siglip_.*": "Z-Image Omni or Edit, which are not supported",
    r"dec_net\..*": "Z-Image in pixel space, which is not supported",
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
    """One tensor of a source, from its file's header."""

    file: Path
    name: str  # in the file, with prefix
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, a key of _NUMPY if it is supported
    offset: int  # of its first byte in the file

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` (exclusive) of the first axis; float16 and float8 are widened to
        float32.

        The file is read and not memory-mapped: mapped pages count as this process's memory, and
        are read in small pieces.
        """
        dtype = _NUMPY[self.dtype]
        width = math.prod(self.shape[1:])
        values = np.fromfile(
            self.file,
            dtype,
            (last - first) * width,
            offset=self.offset + first * width * dtype.itemsize,
        )
        values = values.reshape(last - first, *self.shape[1:])
        is_kept = self.dtype in ("F32", "BF16")
        return values if is_kept else values.astype(np.float32)


@dataclass
class Component:
    """One component of a source: its layout, and its tensors by name without prefix."""

    name: str
    layout: str  # "diffusers", "comfy" or "flux"; "control" of a ControlNet
    tensors: dict[str, Tensor] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """The files of its tensors, sorted."""
        return sorted({t.file for t in self.tensors.values()})


def table(config: ModelConfig, component: str, layout: str) -> list:
    """The rules (weights.names) for a component in this layout."""
    if layout == "control":
        return rules.CONTROL
    if layout == "flux":
        return rules.vae_flux(len(config.vae.block_out_channels))
    return {
        ("transformer", "diffusers"): rules.DIT_DIFFUSERS,
        ("transformer", "comfy"): rules.DIT_COMFY,
        ("text_encoder", "diffusers"): rules.TEXT_ENCODER,
        ("vae", "diffusers"): rules.VAE_DIFFUSERS,
    }[component, layout]


@functools.cache  # takes 0.3 s for some hundred tensors, and is called twice per component
def _entries(config: ModelConfig, component: str, layout: str) -> dict[str, rules.Entry]:
    spec = components.spec(config, component)
    if layout == "control":
        assert config.control is not None
        spec = Branch(config.transformer, config.control)
    return rules.expected(table(config, component, layout), spec)


@dataclass
class Source:
    """All that a conversion reads: components by name, config and tokenizer."""

    components: dict[str, Component]
    config: ModelConfig
    tokenizer: Path | None  # None for a ControlNet

    def entries(self, component: str) -> dict[str, rules.Entry]:
        """Name -> entry of every tensor that the component must have."""
        return _entries(self.config, component, self.components[component].layout)

    def check(self) -> None:
        """Raises ConversionError, which lists the faults of all components: unknown, missing,
        duplicate and misshapen tensors, and unsupported dtypes."""
        groups: dict[tuple[str, str], list[str]] = {}
        for component in self.components:
            for kind, what in self._faults(component):
                groups.setdefault((component, kind), []).append(what)
        if not groups:
            return
        lines = []
        for (component, kind), faults in groups.items():
            more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            lines.append(f"  {component}: {kind} {', '.join(faults[:_SHOWN])}{more}")
        kinds = list(dict.fromkeys(kind for _, kind in groups))
        counts = [sum(len(f) for (_, k), f in groups.items() if k == kind) for kind in kinds]
        raise ConversionError(
            "the tensors are not exactly those of the configured Z-Image"
            f"{'' if self.config.control is None else chr(39) + 's ControlNet'} "
            f"({', '.join(f'{n} {kind}' for n, kind in zip(counts, kinds, strict=True))}); "
            "nothing was written:\n" + "\n".join(lines)
        )

    def _left_out(self, component: str) -> re.Pattern:
        """The tensors that are not used."""
        control = self.config.control
        if control is not None and control.refiner == "control_layers":
            return _LEFT_OUT_OF_CONTROL
        return _LEFT_OUT[component]

    def _faults(self, component: str) -> Iterator[tuple[str, str]]:
        """(kind, tensor) of each fault."""
        found, expected = self.components[component].tensors, self.entries(component)
        last = f"layers.{self.config.text_encoder.n_layers}."  # the layer that never runs
        for name in self.components[component].duplicates:
            yield "duplicate", f"{printable(name)} (in {found[name].file.name} and elsewhere)"
        for name in sorted(expected.keys() - found.keys()):
            yield "missing", f"{name} {list(expected[name].shape)}"
        for name, tensor in sorted(found.items()):
            if name in expected:
                if tensor.shape != expected[name].shape:
                    wanted, got = list(expected[name].shape), printable(list(tensor.shape))
                    yield "misshapen", f"{name}: expected {wanted}, got {got}"
                if tensor.dtype not in _NUMPY:
                    yield f"{tensor.dtype}, not {', '.join(_NUMPY)}:", name
                continue
            is_last_layer = component == "text_encoder" and name.startswith(last)
            if not is_last_layer and not self._left_out(component).fullmatch(name):
                yield "unknown", f"{printable(name)} {printable(list(tensor.shape))}"


# -- opening ---------------------------------------------------------------------------------------


def open_source(
    path: Path | None,
    files: dict[str, Path],
    config_folder: Path | None,
    tokenizer: Path | None,
    variant: str | None = None,
) -> Source:
    """The source in `path` and `files`; only headers, configs and indexes are read.

    `path`: a folder in diffusers layout, or one file with all models. `files`: component -> file,
    instead of those in `path`. `variant`: a name in PRESETS, for files without configs. Raises
    UsageError for missing or contradictory arguments, ForeignError for another model's files,
    ConversionError for damaged files, ConfigError for an unsupported config.
    """
    parts = {c: open_file(c, file) for c, file in files.items()}
    missing = [c for c in COMPONENTS if c not in files]
    kind = path and kind_of(path)
    if path is not None and kind == "folder":
        parts |= {c: open_component_folder(c, path / c) for c in missing}
    elif path is not None and kind:
        parts |= {c: open_file(c, path) for c in missing}
    elif path is not None:
        raise ForeignError(f"{path}: no such file or folder")
    elif missing:
        flags = ", ".join(_FLAGS[c] for c in missing)
        raise UsageError(f"without SRC every component needs a file: {flags} missing")
    configs = config_folder or (path if kind == "folder" else None)
    if configs is not None:
        if variant:
            raise UsageError(
                f"--variant is for single files without configs: {configs} has configs"
            )
        config = read_configs(configs)
        tokenizer = tokenizer or configs / "tokenizer" / "tokenizer.json"
    elif tokenizer is None:
        raise UsageError(
            "single files have no tokenizer: give --config FOLDER, or --tokenizer FILE for the "
            "published model"
        )
    else:
        config = PRESETS[variant or "turbo"]
    if not kind_of(tokenizer):
        raise ConversionError(
            f"{tokenizer}: the tokenizer is missing; Z-Image's folder has it as "
            "tokenizer/tokenizer.json"
        )
    return Source({c: parts[c] for c in COMPONENTS}, config, tokenizer)


def is_control(path: Path) -> bool:
    """Whether a file is a ControlNet's. Raises as `read_header`."""
    return any(_CONTROL.fullmatch(tensor.name) for tensor in read_header(path))


def open_control(file: Path, model: Path | None = None, variant: str | None = None) -> Source:
    """A ControlNet's safetensors file, as its authors and diffusers have it.

    `model`: the model that it controls, a native checkpoint or a folder in diffusers layout; by
    default the published one. Raises ConversionError for a file that is no such ControlNet,
    ConfigError, and as Checkpoint.
    """
    if model is None:
        config = PRESETS[variant or "turbo"]
    elif kind_of(model / "manifest", ForeignError):
        config = Checkpoint(model).config
    else:
        config = read_configs(model)
    found = Component("transformer", "control", {t.name: t for t in read_header(file)})
    names, tensors = list(found.tensors), found.tensors
    layers = {m[1] for name in names if (m := re.fullmatch(r"control_layers\.(\d+)\..*", name))}
    embedder = tensors.get("control_all_x_embedder.2-1.weight")
    if embedder is None or len(embedder.shape) != 2 or embedder.shape[1] % 4 or not layers:
        raise ConversionError(
            f"{file}: expected a ControlNet Union of Z-Image, with control_layers and a matrix "
            "control_all_x_embedder.2-1.weight of 4 inputs per channel"
        )
    parts = {
        "layers": len(layers),
        "in_channels": embedder.shape[1] // 4,
        "refiner": _refiner(tensors),
    }
    try:
        config = replace(config, control=ControlConfig.from_json(parts))
    except ConfigError as fault:
        raise ConfigError(f"{file}: {fault}") from None
    return Source({"transformer": found}, config, None)


def _refiner(tensors: dict[str, Tensor]) -> str:
    """Which of config.REFINERS a ControlNet has. Union 2.0 has 2.1's tensors, but its refiner's
    maps were never trained: they are 0 (as diffusers and ComfyUI tell them apart)."""
    if not any(name.startswith("control_noise_refiner.") for name in tensors):
        return "control_layers"  # diffusers leaves them out
    first = "control_noise_refiner.0."
    maps = [tensors.get(f"{first}{name}_proj.weight") for name in ("before", "after")]
    if maps == [None, None]:
        return "none"
    for tensor in maps:
        is_matrix = tensor is not None and len(tensor.shape) == 2 and tensor.dtype in _NUMPY
        if tensor is None or (is_matrix and not tensor.rows(0, tensor.shape[0]).any()):
            return "control_layers"
    return "control_noise_refiner"


def read_configs(folder: Path) -> ModelConfig:
    """The configs of a folder in diffusers layout. Raises ConfigError."""
    parts = {}
    for name, (kind, path) in CONFIGS.items():
        data = read_json(folder / path, fault=ConfigError)
        parts[name] = kind.from_json(data, str(folder / path))
    try:
        return ModelConfig(**parts, defaults=DefaultsConfig.of(parts["scheduler"]))
    except ConfigError as fault:
        raise ConfigError(f"{folder}: {fault}") from None


def open_component_folder(component: str, folder: Path) -> Component:
    """A component from its folder: the shards listed in the index, or one file.

    Raises ConversionError if there are neither or they are damaged, ForeignError if the tensors are
    another model's.
    """
    stem = WEIGHTS[component]
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if kind_of(index, ConversionError):
        return open_files(component, [folder / shard for shard in shard_names(index)])
    if kind_of(single, ConversionError):
        return open_files(component, [single])
    pickles = [p.name for p in folder.glob("*.bin")]
    hint = (
        f"{printable(pickles[0])} is a pickle and is not opened; save as safetensors"
        if pickles
        else "is this the whole folder?"
    )
    raise ConversionError(f"{folder}: expected {single.name} or {index.name}; {hint}")


def shard_names(index: Path) -> list[str]:
    """The names of the files beside an index that it lists, sorted. Raises ConversionError."""
    names = read_json(index, _LARGEST_INDEX, ConversionError).get("weight_map")
    files = list(names.values()) if isinstance(names, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise ConversionError(f"{index}: expected a weight_map from tensor names to shard files")
    shards = sorted(set(files))
    for shard in shards:
        is_name = Path(shard).name == shard and shard.isprintable() and len(shard) <= 200
        if not is_name or not shard.endswith(".safetensors"):
            raise ConversionError(
                f"{index}: '{printable(shard)}' is not the name of a safetensors file beside it"
            )
    return shards


def open_file(component: str, path: Path) -> Component:
    """A component from one file, which may have the others too. Raises as open_component_folder."""
    return open_files(component, [path])


def open_files(
    component: str, files: list[Path], read: Callable[[Path], list["Tensor"]] | None = None
) -> Component:
    """A component from its files; tensors of other components in the same files are skipped.

    `read`: gives a file's tensors instead of `read_header`. Raises as open_component_folder.
    """
    tensors = [tensor for file in files for tensor in (read or read_header)(file)]
    own = [t for t in tensors if not t.name.startswith(_OF_OTHER_MODELS[component])]
    result = Component(component, "")
    for tensor in own:
        bare = _PREFIXES[component].sub("", tensor.name, count=1)
        if bare in result.tensors:
            result.duplicates.append(bare)
        result.tensors[bare] = tensor
    names = list(result.tensors) or [t.name for t in tensors]
    result.layout = _layout(component, names, files[0])
    return result


def read_header(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file. The library checks sizes and offsets against the file.

    Raises ForeignError for a GGUF file, ConversionError for a file that is not a whole safetensors
    file.
    """
    # opened here first, because the library would wait for a FIFO
    with open_regular(file, ConversionError, buffering=-1) as f:
        start = f.read(8)
        if start.startswith(b"GGUF"):
            raise ForeignError(f"{file}: a GGUF file; only safetensors files are read")
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as fault:
            raise ConversionError(
                f"{file}: not a whole safetensors file ({printable(fault)}); download it again"
            ) from None
        except OSError as fault:
            raise ConversionError(
                f"{file}: cannot be read ({fault.strerror or printable(fault)})"
            ) from None
        size = int.from_bytes(start, "little")
        header = parse_json(f.read(size), str(file), ConversionError)
    header.pop("__metadata__", None)
    return [
        Tensor(
            file, name, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    ]


def _layout(component: str, names: list[str], file: Path) -> str:
    """The layout that these tensor names have. Raises ForeignError if none."""

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    layouts = {
        "transformer": {
            "comfy": r"layers\.\d+\.attention\.qkv\.weight",
            "diffusers": r"layers\.\d+\.attention\.to_q\.weight",
        },
        "text_encoder": {"diffusers": r"layers\.\d+\.self_attn\.q_norm\.weight"},
        "vae": {"flux": r"decoder\.up\.\d+\..*", "diffusers": r"decoder\.up_blocks\.\d+\..*"},
    }[component]
    other = next((model for pattern, model in _OTHERS.items() if has(pattern)), None)
    if other is None:
        for layout, pattern in layouts.items():
            if has(pattern):
                return layout
    found = ", ".join(printable(name, 60) for name in sorted(names)[:2])
    what = f"these are tensors of {other}" if other else f"found {found or 'no tensors'}"
    raise ForeignError(f"{file}: not Z-Image's {component.replace('_', ' ')}; {what}")


# -- checksums -------------------------------------------------------------------------------------


def published_md5() -> dict[str, str]:
    """File name -> MD5 of the published Z-Image-Turbo folder."""
    lines = Path(__file__).with_name("published.md5").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def hash_file(file: Path, digest: Any, seen: Callable[[int], Any] = id) -> str:
    """The hex digest of a file's bytes, added to `digest` (hashlib's). `seen` is called with every
    number of bytes read. Raises UsageError for anything but a regular file."""
    with open_regular(file) as f:
        while run := f.read(1 << 22):
            digest.update(run)
            seen(len(run))
    return digest.hexdigest()


def verify(folder: Path, *, quiet: bool = False) -> None:
    """Compare a folder's files with the published MD5 sums. Raises ConversionError, which lists all
    files that differ or are missing."""
    published = published_md5()
    present = [name for name in published if kind_of(folder / name) == "file"]
    wrong = [f"{name} is missing" for name in published if name not in present]
    total = sum((folder / name).stat().st_size for name in present)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet) as bar:
        for name in present:
            digest = hashlib.md5(usedforsecurity=False)
            found = hash_file(folder / name, digest, bar.update)
            if found != published[name]:
                wrong.append(f"{name} has MD5 {found}, published is {published[name]}")
    if wrong:
        raise ConversionError(
            f"{folder}: not the published files:\n" + "\n".join(f"  {w}" for w in wrong)
        )
