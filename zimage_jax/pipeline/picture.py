"""PNG in and out, with its metadata.

A picture carries three chunks: `parameters` as AUTOMATIC1111 writes it (other tools read it),
`zimage_jax` with our own JSON (we read it back), and XMP with the mark that the picture was made by
a model (IPTC DigitalSourceType)."""

import io
import json
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..errors import UsageError

KEY = "zimage_jax"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_LARGEST_FILE = 256 << 20


def to_uint8(picture: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """[-1, 1] to 0..255, rounded, as diffusers' `VaeImageProcessor` does."""
    return np.round((np.clip(picture, -1, 1) + 1) * 127.5).astype(np.uint8)


def encode_png(picture: UInt8[np.ndarray, "H W 3"], metadata: dict | None = None) -> bytes:
    """The bytes of a PNG; `metadata` is what `read_metadata` gives back."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt("parameters", parameters(metadata))
        info.add_itxt(KEY, json.dumps(metadata, ensure_ascii=False))
        info.add_itxt("XML:com.adobe.xmp", _XMP)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def parameters(metadata: dict) -> str:
    """The text AUTOMATIC1111 and the tools around it read: prompt, negative prompt, one line of
    settings."""

    def quoted(v):
        return json.dumps(v, ensure_ascii=False) if re.search(r'[,:\n"]', str(v)) else str(v)

    fields = {
        "Steps": metadata["steps"],
        "Sampler": "Euler",
        "CFG scale": metadata["guidance"] + 1,
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Model": metadata["model"],
        "RNG": "CPU" if metadata["noise"] == "torch" else "JAX",
        "Version": f"zimage_jax {metadata['versions']['zimage_jax']}",
    }
    negative = (
        f"Negative prompt: {metadata['negative_prompt']}\n" if metadata["negative_prompt"] else ""
    )
    return f"{metadata['prompt']}\n{negative}" + ", ".join(
        f"{k}: {quoted(v)}" for k, v in fields.items()
    )


def read_metadata(path: Path) -> dict:
    """What a picture of ours says of its making. Raises UsageError for any other file."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(
                f"{path}: {path.stat().st_size >> 20} MiB is too large for a picture of ours"
            )
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text may stand behind the pixels
            text = image.info.get(KEY)
    except OSError as fault:
        reason = (
            "not a PNG" if isinstance(fault, UnidentifiedImageError) else (fault.strerror or fault)
        )
        raise UsageError(f"{path}: cannot be read as a PNG ({reason})") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        raise UsageError(f"{path}: a damaged PNG ({fault})") from None
    try:
        metadata = json.loads(text or "")
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UsageError(
            f"{path}: no zimage_jax metadata in this picture (made elsewhere, or with --no-metadata)"
        )
    return metadata
