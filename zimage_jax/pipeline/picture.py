"""Writes PNGs with metadata, and reads the metadata.

A picture has three text chunks: `parameters` as AUTOMATIC1111 writes it, for other tools;
`zimage_jax` with our own JSON, which `read_metadata` reads; and XMP that marks the picture as made
by a model (IPTC DigitalSourceType).
"""

import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from .. import checks
from ..errors import UsageError
from ..files import open_regular, parse_json, printable
from ..model import emphasis
from ..model.choices import LARGEST_LORA_WEIGHT
from ..model.samplers import SAMPLERS, SCHEDULES, STRENGTH_RULES
from .canvas import FITS
from .opened import decode

KEY = "zimage_jax"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_LARGEST_FILE = 256 << 20  # bytes
# AUTOMATIC1111's names of samplers and schedules
A1111 = {
    "euler": "Euler",
    "dpmpp_2m": "DPM++ 2M",
    "res_multistep": "Res Multistep",
    "heun": "Heun",
    "euler_ancestral": "Euler a",
    "simple": "Simple",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",
    "linear_quadratic": "Linear Quadratic",
}


def to_uint8(picture: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """Map [-1, 1] to 0..255, clipped and rounded as by diffusers' `VaeImageProcessor`."""
    return np.round((np.clip(picture, -1, 1) + 1) * 127.5).astype(np.uint8)


def encode_png(picture: UInt8[np.ndarray, "H W 3"], metadata: dict | None = None) -> bytes:
    """The bytes of a PNG. `read_metadata` returns its `metadata`."""
    texts = {}
    if metadata is not None:
        texts = {"parameters": parameters(metadata), KEY: json.dumps(metadata, ensure_ascii=False)}
    return encode_png_with(picture, texts)


def encode_png_with(picture: UInt8[np.ndarray, "H W 3"], texts: dict[str, str]) -> bytes:
    """The bytes of a PNG with text chunks, and if there are any, the mark of a model's picture."""
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    if texts:
        info.add_itxt("XML:com.adobe.xmp", _XMP)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def parameters(metadata: dict) -> str:
    """The text chunk of AUTOMATIC1111: prompt, negative prompt, one line of settings."""

    def quoted(v):
        return json.dumps(v, ensure_ascii=False) if re.search(r'[,:\n"]', str(v)) else str(v)

    fields = {
        "Steps": metadata["steps"],
        "Sampler": A1111[metadata.get("sampler", "euler")],
        "Schedule type": A1111[metadata.get("sigmas", "simple")],
        "CFG scale": metadata["guidance"] + 1,
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Model": metadata["model"],
        "Shift": metadata.get("shift"),
        "Denoising strength": metadata.get("image", {}).get("strength"),
        "RNG": "CPU" if metadata["noise"] == "torch" else "JAX",
        "Version": f"zimage_jax {metadata['versions']['zimage_jax']}",
    }
    negative = (
        f"Negative prompt: {metadata['negative_prompt']}\n" if metadata["negative_prompt"] else ""
    )
    return f"{metadata['prompt']}\n{negative}" + ", ".join(
        f"{k}: {quoted(v)}" for k, v in fields.items() if v is not None
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of one of our pictures, checked by FIELDS. Raises UsageError."""
    where, text, _ = read_png(path, KEY)
    return _checked(text, where)


def metadata_in(data: bytes, where: str, most_pixels: int) -> dict[str, Any]:
    """As `read_metadata`, of the bytes of a file. Also refuses more than `most_pixels`."""
    decode(data, where, most_pixels)  # what is no whole picture is refused
    if not data.startswith(b"\x89PNG"):
        raise UsageError(f"{where}: expected a PNG of ours, which keeps its settings")
    return _checked(texts_in(data).get(KEY), where)


def texts_in(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG that can be decoded."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.load()  # they may come after the pixels
        return {str(key): text for key, text in image.info.items() if isinstance(text, str)}


def _checked(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        raise UsageError(
            f"{where}: no zimage_jax metadata in this picture "
            "(made elsewhere, or with --no-metadata)"
        )
    metadata = parse_json(text, f"{where}: metadata")
    check_metadata(f"{where}: metadata", metadata, FIELDS)
    return metadata


def read_png(path: Path, key: str) -> tuple[str, str | None, UInt8[np.ndarray, "H W 3"]]:
    """The path for messages, the text chunk `key`, and the pixels of a PNG. Raises UsageError."""
    where = printable(path)
    with open_regular(path) as file:
        nbytes = path.stat().st_size
        if nbytes > _LARGEST_FILE:
            raise UsageError(f"{where}: {nbytes >> 20} MiB is too large for a picture of ours")
        try:
            with Image.open(file, formats=["PNG"]) as image:
                image.load()  # text chunks may come after the pixels
                text = image.info.get(key)
                pixels = np.array(image.convert("RGB"))
        except UnidentifiedImageError:
            raise UsageError(f"{where}: cannot be read as a PNG (not a PNG)") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
            raise UsageError(f"{where}: a damaged PNG ({printable(fault)})") from None
    return where, text if isinstance(text, str) else None, pixels


_PIXELS = partial(checks.whole, low=1, high=65536)
KV_FIELDS: dict[str, Callable] = {
    "dtype?": lambda name, value: value is None or checks.text(name, value),
    "switch_t?": partial(checks.real, low=0, high=1000),
    "group?": checks.text,
    "reuse?": partial(checks.whole, low=1, high=1000),
}
_IMAGE_FIELDS: dict[str, Callable] = {
    "image?": lambda name, value: value is None or checks.text(name, value),
    "mask?": lambda name, value: value is None or checks.text(name, value),
    "pick?": partial(checks.whole, low=0, high=checks.LARGEST_SEED),
    "sha256": checks.text,
    "fit": partial(checks.one_of, choices=FITS),
    "mask_blur": partial(checks.real, low=0, high=512),
    "mask_grow": partial(checks.whole, low=0, high=512),
    "crop_mask?": lambda n, v: v is None or checks.whole(n, v, 0, 4096),
    "strength": partial(checks.real, low=0, high=1),
    "strength_rule": partial(checks.one_of, choices=tuple(STRENGTH_RULES)),
    "noise_level": partial(checks.real, low=0, high=1),
    "differential": lambda name, value: checks.instance(name, value, bool),
}
_CONTROL_FIELDS: dict[str, Callable] = {
    "model": checks.text,
    "image": lambda name, value: value is None or checks.text(name, value),
    "fit": partial(checks.one_of, choices=FITS),
    "sha256": checks.text,
    "scale": partial(checks.real, low=0, high=10),
}
_LORA_FIELDS: dict[str, Callable] = {
    "name": checks.text,
    "weight": partial(checks.real, low=-LARGEST_LORA_WEIGHT, high=LARGEST_LORA_WEIGHT),
    "sha256": checks.text,
    "merged?": partial(checks.instance, kind=bool),
}


def _loras(name: str, value: object) -> None:
    if not isinstance(value, list):
        checks.refuse(name, "a list", value)
    for row in value:
        check_metadata(name, row, _LORA_FIELDS)


# a "?" marks a key that older pictures lack; unknown keys are ignored
FIELDS: dict[str, Callable] = {
    "prompt": checks.text,
    "negative_prompt": checks.text,
    "seed": partial(checks.whole, low=0, high=checks.LARGEST_SEED),
    "width": _PIXELS,
    "height": _PIXELS,
    "steps": partial(checks.whole, low=1, high=1000),
    "guidance": partial(checks.real, low=0, high=100),
    "noise": partial(checks.one_of, choices=("torch", "jax")),
    "prompt_weights?": partial(checks.instance, kind=bool),
    "text_weight?": partial(checks.real, low=0, high=emphasis.LARGEST_WEIGHT),
    "variance?": partial(checks.real, low=0, high=1),
    "attention?": checks.text,
    "sampler?": partial(checks.one_of, choices=tuple(SAMPLERS)),
    "sigmas?": partial(checks.one_of, choices=tuple(SCHEDULES)),
    "shift?": partial(checks.real, low=0, high=100, above=True),
    "cfg_normalization?": partial(checks.real, low=0, high=100),
    "cfg_truncation?": partial(checks.real, low=0, high=1),
    "region?": _PIXELS,
    "image?": lambda name, value: check_metadata(name, value, _IMAGE_FIELDS),
    "control?": lambda name, value: check_metadata(name, value, _CONTROL_FIELDS),
    "lora?": _loras,
    "model": checks.text,
    "kv?": lambda name, value: check_metadata(name, value, KV_FIELDS, only_these=True),
    "versions": lambda name, value: check_metadata(name, value, {"zimage_jax": checks.text}),
}


def check_metadata(
    name: str, found: object, fields: dict[str, Callable], *, only_these: bool = False
) -> None:
    """Raises UsageError for a value that is missing, of another type or out of bounds.

    `only_these`: also for a key that is not in `fields`.
    """
    if not isinstance(found, dict):
        checks.refuse(name, "an object", found)
    for field, check in fields.items():
        key = field.removesuffix("?")
        if key in found:
            check(f"{name} {key}", found[key])
        elif key == field:
            raise UsageError(f"{name} lacks {key}")
    if only_these and (unknown := [key for key in found if f"{key}?" not in fields]):
        raise UsageError(f"{name} has an unknown key, {checks.shown(unknown[0])}")
