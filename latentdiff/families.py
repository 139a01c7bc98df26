"""The Stable Diffusion families: what their published repositories say in JSON beside the weights.

A single file in CompVis layout holds tensors alone; these are the configurations that go with it.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("sd1", "sd1_inpaint", "sd2", "sd2_inpaint", "sdxl", "sdxl_inpaint", "sdxl_refiner")

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1_inpaint": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2_inpaint": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
}
"""diffusers' pipeline for each family."""

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd1_inpaint": "stable-diffusion-v1/inpaint",
    "sd2": "stable-diffusion-v2-512",
    "sd2_inpaint": "stable-diffusion-v2-512/inpaint",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl_inpaint": "stable-diffusion-xl-v1-base/inpaint",
    "sdxl_refiner": "stable-diffusion-xl-v1-refiner",
}
"""Their names in the metadata key modelspec.architecture."""

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: SD 2.x attends to the penultimate layer
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
END_TOKEN, PAD_BY_BANG = "<|endoftext|>", "!"


def family_index(family: str) -> dict[str, Any]:
    """The model_index.json of a family."""
    towers = {"text_encoder": ["transformers", "CLIPTextModel"]}
    if family.startswith("sdxl"):
        towers["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    if family == "sdxl_refiner":
        del towers["text_encoder"]
    tokenizers = {
        name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]
        for name in towers
    }
    return {
        "_class_name": PIPELINES[family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **towers,
        **tokenizers,
        "force_zeros_for_empty_prompt": family in ("sdxl", "sdxl_inpaint"),
        "requires_aesthetics_score": family == "sdxl_refiner",
    }


def family_configs(family: str, prediction_type: str) -> dict[str, dict[str, Any]]:
    """The config.json, tokenizer_config.json or scheduler_config.json of each part of a family.

    `prediction_type` is "epsilon" or "v_prediction"; of SD 2.x it also says the size trained at,
    512 or 768 pixels.
    """
    xl, second = family.startswith("sdxl"), family.startswith("sd2")
    pixels = 1024 if xl else 768 if second and prediction_type == "v_prediction" else 512
    configs = {
        "unet": _unet(family, pixels // 8),
        "vae": _vae(0.13025 if xl else 0.18215, pixels) | ({"force_upcast": True} if xl else {}),
        "scheduler": _scheduler(xl, prediction_type),
    }
    if family != "sdxl_refiner":
        configs["text_encoder"] = _clip(**(_OPEN_CLIP_H if second else _CLIP_L))
        configs["tokenizer"] = {"pad_token": PAD_BY_BANG if second else END_TOKEN}
    if xl:
        configs["text_encoder_2"] = _clip(**_OPEN_CLIP_BIG_G)
        configs["tokenizer_2"] = {"pad_token": PAD_BY_BANG}
    return configs


def _unet(family: str, sample_size: int) -> dict[str, Any]:
    config = {
        "sample_size": sample_size,
        "in_channels": 9 if family.endswith("inpaint") else 4,
        "out_channels": 4,
    }
    if family.startswith("sdxl"):
        return config | _unet_xl(refiner=family == "sdxl_refiner")
    second = family.startswith("sd2")
    return config | {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 1024 if second else 768,
        "attention_head_dim": [5, 10, 20, 20] if second else 8,
        "use_linear_projection": second,
    }


def _unet_xl(refiner: bool) -> dict[str, Any]:
    common = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
    }
    if refiner:
        return common | {
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "cross_attention_dim": 1280,
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        }
    return common | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "projection_class_embeddings_input_dim": 2816,
    }


def _vae(scaling_factor: float, sample_size: int) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
    }


def _clip(**sizes: Any) -> dict[str, Any]:
    """End token 2 is that of the published files, by which transformers pools at the largest id."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **sizes,
    }


def _scheduler(xl: bool, prediction_type: str) -> dict[str, Any]:
    return {
        "_class_name": "EulerDiscreteScheduler" if xl else "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
