"""The VAE of Flux, decode and encode (diffusers `AutoencoderKL` without quant convs).

Axes: B pictures, H, W pixels, h, w latents (H/8, W/8) or rows and columns at any level, C channels
at any level, i and o a layer's inputs and outputs. All arrays are NHWC.

The sampler's latents z and the VAE's differ by the published scale and shift: the VAE's are
z / scaling_factor + shift_factor.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from . import ops
from .attention import Attend, attention
from .config import VAEConfig
from .layers import Conv, GroupNorm, Linear


class ResnetBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut. (diffusers `ResnetBlock2D`)"""

    def __init__(self, c_in: int, c_out: int, groups: int):
        self.norm1, self.conv1 = GroupNorm(c_in, groups), Conv(c_in, c_out)
        self.norm2, self.conv2 = GroupNorm(c_out, groups), Conv(c_out, c_out)
        self.conv_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, padding="VALID"))


class MiddleAttention(nnx.Module):
    """Attention with one head over all positions. (diffusers `Attention`)"""

    def __init__(self, channels: int, groups: int):
        self.group_norm = GroupNorm(channels, groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(channels, channels) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B h w C"], attend: Attend) -> Float[Array, "B h w C"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = (project(y)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))
        # no kernel takes its one head of 512 channels
        out = attention(q, k, v, attend=replace(attend, wanted="chunks"))
        return x + self.to_out(out[:, :, 0]).reshape(b, h, w, c)


class Middle(nnx.Module):
    """Residual block, attention, residual block. (diffusers `UNetMidBlock2D`)"""

    def __init__(self, channels: int, groups: int):
        self.resnets = nnx.List(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attention = MiddleAttention(channels, groups)

    def __call__(self, x: Float[Array, "B h w C"], attend: Attend) -> Float[Array, "B h w C"]:
        return self.resnets[1](self.attention(self.resnets[0](x), attend))


def upsample(x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
    """Nearest-neighbour upsampling by 2. (diffusers `Upsample2D`)"""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


class UpBlock(nnx.Module):
    """Residual blocks, then upsampling by 2 with a convolution. (diffusers `UpDecoderBlock2D`)"""

    def __init__(self, c_in: int, c_out: int, resnets: int, groups: int, *, upsample: bool):
        self.resnets = nnx.List(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(resnets)
        )
        self.upsampler = Conv(c_out, c_out) if upsample else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsampler is None:
            return x
        return self.upsampler(upsample(x))


class DownBlock(nnx.Module):
    """Residual blocks, then a convolution of stride 2. (diffusers `DownEncoderBlock2D`)"""

    def __init__(self, c_in: int, c_out: int, resnets: int, groups: int, *, downsample: bool):
        self.resnets = nnx.List(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(resnets)
        )
        self.downsampler = Conv(c_out, c_out) if downsample else None

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsampler is None:
            return x
        return self.downsampler(x, stride=2, padding=((0, 1), (0, 1)))


class Decoder(nnx.Module):
    """The VAE's latents to a picture. (diffusers `Decoder`)"""

    def __init__(self, config: VAEConfig):
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, channels[0])
        self.middle = Middle(channels[0], groups)
        self.up_blocks = nnx.List(
            UpBlock(
                c_in, c_out, config.layers_per_block + 1, groups, upsample=i < len(channels) - 1
            )
            for i, (c_in, c_out) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        self.norm_out, self.conv_out = (
            GroupNorm(channels[-1], groups),
            Conv(channels[-1], config.out_channels),
        )

    def __call__(self, x: Float[Array, "B h w C"], attend: Attend) -> Float[Array, "B H W 3"]:
        x = self.middle(self.conv_in(x), attend)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Encoder(nnx.Module):
    """A picture to mean and log-variance, C channels each. (diffusers `Encoder`)"""

    def __init__(self, config: VAEConfig):
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, channels[0])
        self.down_blocks = nnx.List(
            DownBlock(
                c_in, c_out, config.layers_per_block, groups, downsample=i < len(channels) - 1
            )
            for i, (c_in, c_out) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        self.middle = Middle(channels[-1], groups)
        self.norm_out, self.conv_out = (
            GroupNorm(channels[-1], groups),
            Conv(channels[-1], 2 * config.latent_channels),
        )

    def __call__(self, x: Float[Array, "B H W 3"], attend: Attend) -> Float[Array, "B h w C2"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x, attend))))


class VAE(nnx.Module):
    """Both halves, and the map between the sampler's latents and the VAE's. (diffusers
    `AutoencoderKL`)"""

    def __init__(self, config: VAEConfig):
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.scale = config.scale
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor

    def from_sampler(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The sampler's latents to the VAE's."""
        return z / self.scaling_factor + self.shift_factor

    def to_sampler(self, mean: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The VAE's latents to the sampler's."""
        return (mean - self.shift_factor) * self.scaling_factor


def spec(config: VAEConfig) -> VAE:
    """The model with a ShapeDtypeStruct for every parameter: the one list of its tensors."""
    return VAE(config)


def compute_dtype(dtype) -> np.dtype:
    """The VAE's dtype in a job computed in `dtype`: float32 for float16, else `dtype`.

    The published VAE overflows float16 (its config has force_upcast). A decode of 1024 x 1024 is 10
    TFLOP, 2 % of the cost of 8 NFEs.
    """
    return ops.wide(dtype)


def decode(
    vae: VAE, latents: Float[Array, "B h w C"], dtype=jnp.float32, attend: Attend = Attend()
) -> Float[Array, "B H W 3"]:
    """The sampler's latents to a picture in about [-1, 1], float32; computed in `dtype`."""
    return vae.decoder(vae.from_sampler(latents).astype(dtype), attend).astype(jnp.float32)


def encode(
    vae: VAE, picture: Float[Array, "B H W 3"], dtype=jnp.float32, attend: Attend = Attend()
) -> Float[Array, "B h w C"]:
    """A picture in [-1, 1] to the sampler's latents (the posterior's mean), float32; computed in
    `dtype`."""
    mean, _ = jnp.split(vae.encoder(picture.astype(dtype), attend).astype(jnp.float32), 2, -1)
    return vae.to_sampler(mean)
