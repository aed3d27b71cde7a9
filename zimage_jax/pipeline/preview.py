"""Small pictures from latents while a job runs.

Axes: B pictures, h, w latent rows and columns, C latent channels.
"""

import threading

import jax
import numpy as np
from jaxtyping import Float, UInt8

from ..model import vae
from ..runtime.placement import DEVICE, Placement
from ..runtime.reader import read_units
from ..weights.checkpoint import ModelFiles
from . import picture


class Preview:
    """A linear map from latents to colours, fitted to the VAE's decodes of constant latents.

    It is fitted once, on the CPU, because no plan has device memory for a decode between NFEs.
    """

    def __init__(self, checkpoint: ModelFiles):
        self._checkpoint, self._lock = checkpoint, threading.Lock()
        self._basis: tuple[np.ndarray, np.ndarray] | None = None

    def pixels(self, latents: Float[np.ndarray, "B h w C"]) -> UInt8[np.ndarray, "B h w 3"]:
        with self._lock:
            if self._basis is None:
                self._basis = self._measure(latents.shape[-1])
        slopes, zero = self._basis
        return picture.to_uint8(latents @ slopes + zero)

    def _measure(self, channels: int) -> tuple[Float[np.ndarray, "C 3"], Float[np.ndarray, "3"]]:
        """The colour that one unit of each channel adds, and the colour of zeros."""
        cpu = Placement.on_host()
        probes = np.concatenate([np.zeros((1, channels)), np.eye(channels), -np.eye(channels)])
        flat = np.tile(probes.astype(np.float32)[:, None, None], (1, 4, 4, 1))
        with jax.default_device(cpu.device):
            leaves = read_units(self._checkpoint, "vae", ["decoder"], cpu, DEVICE)
            decoder = self._checkpoint.storage.assemble("vae", leaves)
            colours = np.asarray(jax.jit(vae.decode)(decoder, flat)).mean((1, 2))
        zero, plus, minus = colours[0], colours[1 : channels + 1], colours[channels + 1 :]
        return (plus - minus) / 2, zero
