"""The PyTorch classes of diffusers and transformers, with the weights of `small.random_tensors`.
Needs torch.

`outputs` is what goldens hold and live tests compute anew.
"""

import importlib

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.small import (
    CASES,
    CONFIGS,
    CONTROLLED,
    CONTROLS,
    control_inputs,
    control_tensors,
    inputs,
    random_tensors,
    tokenizer,
)
from zimage_jax.model.config import ControlConfig, ModelConfig

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def transformer(config: ModelConfig, tensors) -> ZImageTransformer2DModel:
    c = config.transformer
    model = ZImageTransformer2DModel(
        dim=c.dim,
        n_layers=c.n_layers,
        n_refiner_layers=c.n_refiner_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_heads,
        in_channels=c.in_channels,
        cap_feat_dim=c.cap_feat_dim,
        axes_dims=list(c.axes_dims),
        axes_lens=list(c.axes_lens),
        rope_theta=c.rope_theta,
        t_scale=c.t_scale,
        norm_eps=c.norm_eps,
    )
    return _filled(model, tensors["transformer"])


def text_encoder(config: ModelConfig, tensors) -> Qwen3Model:
    c = config.text_encoder
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"},
            attn_implementation="sdpa",
        )
    )
    return _filled(model, tensors["text_encoder"], left_out=(f"layers.{c.n_layers}.", "norm."))


def vae(config: ModelConfig, tensors) -> AutoencoderKL:
    c = config.vae
    levels = len(c.block_out_channels)
    model = AutoencoderKL(
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=c.latent_channels,
        norm_num_groups=c.norm_num_groups,
        scaling_factor=c.scaling_factor,
        shift_factor=c.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _filled(model, tensors["vae"])


def scheduler(config: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=config.scheduler.shift)


def _filled(model, tensors: dict[str, np.ndarray], left_out: tuple[str, ...] = ()):
    missing, unknown = model.load_state_dict(
        {n: torch.from_numpy(a.copy()) for n, a in tensors.items()}, strict=False
    )
    assert not unknown
    assert not [n for n in missing if not (left_out and n.startswith(left_out))]
    return model.eval().requires_grad_(False)


def pipeline(config: ModelConfig, tensors) -> ZImagePipeline:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    pipe = ZImagePipeline(
        scheduler=scheduler(config),
        vae=vae(config, tensors),
        text_encoder=text_encoder(config, tensors),
        tokenizer=fast,
        transformer=transformer(config, tensors),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outputs(name: str) -> dict[str, np.ndarray]:
    """Everything a test compares for one configuration: each model alone, in float32 and bfloat16,
    and the pipeline."""
    config = CONFIGS[name]
    tensors, given = random_tensors(config), inputs(config)
    found = {}
    with torch.no_grad():
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
            for key, value in _models(config, tensors, given, dtype).items():
                found[key + suffix] = value.float().numpy()
        found |= _pipeline(name, config, tensors)
    return found


def controlled() -> dict[str, np.ndarray]:
    """The velocity of the small DiT under each ControlNet, in float32 and bfloat16."""
    return {
        name + suffix: _controlled(of, dtype).float().numpy()
        for name, of in CONTROLS.items()
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16"))
    }


def control_net(config: ModelConfig, of: ControlConfig) -> ZImageControlNetModel:
    """diffusers' ControlNet, without what it has of the transformer."""
    c = config.transformer
    model = ZImageControlNetModel(
        control_layers_places=list(of.places(c.n_layers)),
        control_refiner_layers_places=list(range(c.n_refiner_layers)),
        control_in_dim=of.in_channels,
        add_control_noise_refiner=None if of.refiner == "none" else of.refiner,
        dim=c.dim,
        n_refiner_layers=c.n_refiner_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_heads,
        norm_eps=c.norm_eps,
    )
    return _filled(model, control_tensors(config, of))


def controlled_latents(
    of: ControlConfig, picture, prompt, seed, scale, *, steps, guidance
) -> np.ndarray:
    """Latents that diffusers' pipeline draws from a control image of the size to draw."""
    parts = pipeline(CONTROLLED, random_tensors(CONTROLLED)).components
    pipe = ZImageControlNetPipeline(controlnet=control_net(CONTROLLED, of), **parts)
    pipe.set_progress_bar_config(disable=True)
    height, width = picture.shape[:2]
    found = pipe(
        prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        control_image=Image.fromarray(picture),
        controlnet_conditioning_scale=scale,
        negative_prompt="" if guidance else None,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images
    return found.permute(0, 2, 3, 1).numpy()


def _controlled(of: ControlConfig, dtype) -> torch.Tensor:
    config, given = CONTROLLED, inputs(CONTROLLED)
    latents, image, scale = control_inputs(config, of)
    dit = transformer(config, random_tensors(config)).to(dtype)
    net = ZImageControlNetModel.from_transformer(control_net(config, of).to(dtype), dit)

    def listed(array):
        return [x[:, None] for x in torch.from_numpy(array.transpose(0, 3, 1, 2)).to(dtype)]

    features = [
        torch.from_numpy(f[:n]).to(dtype)
        for f, n in zip(given["features"], given["lengths"], strict=True)
    ]
    t = torch.from_numpy(given["t"])
    with torch.no_grad():
        added = net(listed(latents), t, features, listed(image), conditioning_scale=scale)
        found = dit(
            listed(latents), t, features, controlnet_block_samples=added, return_dict=False
        )[0]
    return torch.stack(found)[:, :, 0].permute(0, 2, 3, 1)


def _models(config, tensors, given, dtype) -> dict[str, torch.Tensor]:
    text, dit = text_encoder(config, tensors).to(dtype), transformer(config, tensors).to(dtype)
    auto = vae(config, tensors).to(dtype)
    put = lambda a: torch.from_numpy(a).to(dtype)  # noqa: E731
    ids = torch.from_numpy(given["ids"])
    latents, picture = (
        put(given["latents"].transpose(0, 3, 1, 2)),
        put(given["picture"].transpose(0, 3, 1, 2)),
    )
    features = [put(f[:n]) for f, n in zip(given["features"], given["lengths"], strict=True)]
    t = torch.from_numpy(given["t"])
    velocity = dit([x[:, None] for x in latents], t, features, return_dict=False)[0]
    scale, shift = config.vae.scaling_factor, config.vae.shift_factor
    return {
        "text": text(ids, output_hidden_states=True).hidden_states[-2],
        "time": dit.t_embedder(t * config.transformer.t_scale),
        "velocity": torch.stack(velocity)[:, :, 0].permute(0, 2, 3, 1),
        "decode": auto.decode(latents / scale + shift).sample.permute(0, 2, 3, 1),
        "encode": ((auto.encode(picture).latent_dist.mean - shift) * scale).permute(0, 2, 3, 1),
    }


def _pipeline(name, config, tensors) -> dict[str, np.ndarray]:
    case, pipe = CASES[name], pipeline(config, tensors)
    width, height = case.size(config)

    def run(kind):
        return pipe(
            list(case.prompts),
            width=width,
            height=height,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            negative_prompt=[case.negative_prompt] * len(case.prompts) if case.guidance else None,
            output_type=kind,
            generator=[torch.Generator().manual_seed(seed) for seed in case.seeds],
        ).images

    return {
        "latents": run("latent").permute(0, 2, 3, 1).numpy(),
        "pictures": np.round(run("np") * 255).astype(np.uint8),
    }


# -- from pictures ---------------------------------------------------------------------------------


def from_pictures(kind: str, config: ModelConfig):
    """diffusers' ZImage`kind`Pipeline, which takes the posterior's mean and not a sample of it."""
    made = pipeline(config, random_tensors(config))
    module = importlib.import_module(f"diffusers.pipelines.z_image.pipeline_z_image_{kind.lower()}")
    module.retrieve_latents = lambda encoded, **_: encoded.latent_dist.mode()
    found = getattr(module, f"ZImage{kind}Pipeline")(**made.components)
    found.set_progress_bar_config(disable=True)
    return found


def latents_from(
    pipe, picture, mask, strength, prompt, seed, *, steps, guidance, negative_prompt
) -> np.ndarray:
    """Latents that a pipeline of `from_pictures` draws."""
    more = {} if mask is None else {"mask_image": Image.fromarray(mask)}
    found = pipe(
        prompt,
        image=Image.fromarray(picture),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative_prompt if guidance else None,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **more,
    ).images
    return found.permute(0, 2, 3, 1).numpy()


def limited(
    config, prompt, seed, side, *, steps, guidance, cfg_normalization, cfg_truncation
) -> np.ndarray:
    """Latents of a text-to-image job with limits of its guidance."""
    found = pipeline(config, random_tensors(config))(
        prompt,
        width=side,
        height=side,
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt="",
        cfg_normalization=cfg_normalization,
        cfg_truncation=cfg_truncation,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images
    return found.permute(0, 2, 3, 1).numpy()
