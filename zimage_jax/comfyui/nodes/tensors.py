"""LATENT, CONDITIONING, IMAGE and MASK to and from what the engine is sent."""

import json
from typing import Any

import torch
from comfy.utils import reshape_mask
from safetensors.torch import load, save

CHANNELS = 16  # of Z-Image's latents
PIXELS = 8  # of a latent


def job(keys: dict[str, Any], **tensors: torch.Tensor | None) -> bytes:
    """A job's safetensors: its keys in the metadata, and the tensors that there are."""
    given = {  # copies: safetensors refuses one CONDITIONING as both positive and negative
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    return save(given, {"job": json.dumps(keys)})


def picture(image: torch.Tensor) -> torch.Tensor:
    """An IMAGE or MASK in bytes, to which the engine rounds it anyway."""
    return (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)


def noise_mask(latent: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The noise mask of a LATENT, of any size, at its samples' [B, h, w]."""
    if latent.get("noise_mask") is None:
        return None
    return reshape_mask(latent["noise_mask"], latent["samples"].shape)[:, 0]


def tensors(data: bytes) -> dict[str, torch.Tensor]:
    return load(data)


def features(conditioning: list, name: str) -> torch.Tensor:
    """The features of a CONDITIONING [1, T, E]. Raises ValueError for several at once."""
    if len(conditioning) != 1:
        raise ValueError(
            f"{name}: expected one conditioning, got {len(conditioning)}; Z-Image draws with one "
            "(ConditioningConcat joins texts)"
        )
    found = conditioning[0][0]
    if found.ndim != 3 or found.shape[0] != 1:
        raise ValueError(f"{name}: expected features [1, tokens, width], got {list(found.shape)}")
    return found


def size_of(latent: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Pictures, width and height of a LATENT."""
    samples = latent["samples"]
    return samples.shape[0], samples.shape[-1] * PIXELS, samples.shape[-2] * PIXELS


def begins_from(latent: dict[str, torch.Tensor]) -> bool:
    """Whether a LATENT holds a picture: that of an empty one says the size alone."""
    return bool(latent["samples"].any())


def check_latent(latent: dict[str, torch.Tensor]) -> None:
    """Raises ValueError for latents of another model."""
    shape = list(latent["samples"].shape)
    if len(shape) != 4 or (shape[1] != CHANNELS and begins_from(latent)):
        raise ValueError(
            f"latent_image: expected [pictures, {CHANNELS}, height / 8, width / 8] as "
            f"EmptySD3LatentImage or the Flux VAE gives it, got {shape}"
        )


def one_of(batch: torch.Tensor | None, number: int) -> torch.Tensor | None:
    """A batch's picture for one job; a batch of one serves all."""
    if batch is None:
        return None
    return batch[number : number + 1] if batch.shape[0] > 1 else batch
