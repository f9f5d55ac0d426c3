"""Originals at a small size with random weights, and how far the ports are from them."""

import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.networks.text_encoders.clip import byte_symbols


def library(name: str) -> Any:
    """An original library, untyped: type checkers cannot follow how their modules are made."""
    return importlib.import_module(name)


def relative_difference(found: Any, expected: Any) -> float:
    """Largest difference over largest value; NaN if a value is not finite.

    Args:
        found, expected: two of an mx array, a numpy array and a torch tensor, of one shape.
    """

    def array(value: Any) -> np.ndarray:
        if hasattr(value, "detach"):
            return value.detach().float().numpy()
        return np.array(value.astype(mx.float32) if isinstance(value, mx.array) else value)

    a, b = array(found), array(expected)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} is compared with {b.shape}")
    return float(np.abs(a - b).max() / np.abs(b).max())


def fill(network: Any) -> Any:
    """Random weights everywhere in a torch network, of the size of trained ones."""
    network.eval().requires_grad_(False)
    for name, p in network.named_parameters():
        if p.ndim == 1 or name.endswith("gamma"):
            p.normal_("norm" in name and not name.endswith("bias"), 0.1)
        else:
            p.normal_(0, p[0].numel() ** -0.5)
    return network


def _made(package: str, network: str, config: str | None = None, **sizes: Any) -> Any:
    """A network of a library with the weights that it starts with; some take a config object."""
    library("torch").manual_seed(0)
    module = library(package)
    if config is None:
        return getattr(module, network)(**sizes)
    return getattr(module, network)(getattr(module, config)(**sizes))


def clip() -> Any:
    """transformers' CLIPTextModel."""
    return _made(
        "transformers",
        "CLIPTextModel",
        "CLIPTextConfig",
        vocab_size=514,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=17,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def clip_towers() -> Any:
    """transformers' CLIPModel, with the text tower of `clip`."""
    vision = {
        "hidden_size": 48,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
    }
    text = clip().config.to_dict()
    config = {"text_config": text, "vision_config": vision, "projection_dim": 40}
    return _made("transformers", "CLIPModel", "CLIPConfig", **config)


def gemma() -> Any:
    """transformers' Gemma3TextModel, for the tokens of `write_byte_tokenizer`."""
    return _made(
        "transformers",
        "Gemma3TextModel",
        "Gemma3TextConfig",
        vocab_size=260,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
    )


def qwen_image_vae() -> Any:
    """diffusers' AutoencoderKLQwenImage."""
    return _made(
        "diffusers",
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.9, 1.1, 2.0],
    )


def kl_vae() -> Any:
    """diffusers' AutoencoderKL, as in Flux."""
    return _made(
        "diffusers",
        "AutoencoderKL",
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        latent_channels=4,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def qwen_image(**changes: Any) -> Any:
    """diffusers' QwenImageTransformer2DModel: `QWEN_IMAGE` with `changes`."""
    return _made("diffusers", "QwenImageTransformer2DModel", **QWEN_IMAGE | changes)


Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [600, 64, 64],
}


def z_image(**changes: Any) -> Any:
    """diffusers' ZImageTransformer2DModel: `Z_IMAGE` with `changes`."""
    return _made("diffusers", "ZImageTransformer2DModel", **Z_IMAGE | changes)


FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}


def flux2(**changes: Any) -> Any:
    """diffusers' Flux2Transformer2DModel: `FLUX2` with `changes`."""
    return _made("diffusers", "Flux2Transformer2DModel", **FLUX2 | changes)


def flux2_vae() -> Any:
    """diffusers' AutoencoderKLFlux2, with statistics as after training."""
    vae = _made(
        "diffusers",
        "AutoencoderKLFlux2",
        block_out_channels=(32, 32, 64, 64),
        latent_channels=4,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.3, 3)
    return vae


def dc_ae() -> Any:
    """diffusers' AutoencoderDC, as in SANA."""
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    return _made(
        "diffusers",
        "AutoencoderDC",
        latent_channels=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 16, 16, 32, 64, 64),
        decoder_block_out_channels=(8, 16, 32, 32, 64, 64),
        encoder_layers_per_block=(1, 2, 1, 1, 1, 2),
        decoder_layers_per_block=(1, 2, 1, 2, 1, 1),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def _byte_tokenizer(marks: Sequence[str]) -> dict[str, Any]:
    """Content of a tokenizer.json whose tokens are the marks and all bytes."""
    vocabulary = {symbol: i for i, symbol in enumerate([*marks, *byte_symbols()])}
    added = [
        {
            "id": i,
            "content": mark,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, mark in enumerate(marks)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": True},
        "post_processor": None,
        "decoder": level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def write_byte_tokenizer(folder: Path) -> None:
    """Write Hugging Face's files of a tokenizer with 260 tokens: marks and bytes."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>"]
    (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer(marks)))
    settings = {f"{mark[1:-1]}_token": mark for mark in marks}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


MINIT2I = {
    "image_size": 64,
    "patch_size": 8,
    "in_channels": 3,
    "txt_input_size": 24,
    "hidden_size": 48,
    "txt_hidden_size": 48,
    "cond_vec_size": 48,
    "depth_double": 2,
    "txt_preamble_depth": 1,
    "num_heads": 4,
    "head_dim": 12,
    "mlp_ratio": 2.7,
    "pca_channels": 16,
    "prompt_length": 16,
    "n_T": 100,
    "prediction": "x",
    "sampler": "euler",
    "cfg_channels": 3,
    "cfg_interval": [0.0, 1.0],
    "llm": "google/flan-t5-large",
}
"""config.json of a small MiniT2I."""

SPIECE_TEXT = (
    "A red apple on a table; two cats, a green car. A photo of the moon over snow, "
    "with 12 stars & Ünïted étoiles!"
)


def write_spiece(path: Path, text: str = SPIECE_TEXT) -> None:
    """Write a small sentencepiece model with the special tokens of T5."""
    sentencepiece, model = library("sentencepiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 10),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def t5(**changes: Any) -> Any:
    """transformers' T5EncoderModel, as in FLAN-T5."""
    sizes = {"vocab_size": 128, "d_model": 24, "d_kv": 8, "num_heads": 4, "d_ff": 40}
    sizes |= {"num_layers": 3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return _made("transformers", "T5EncoderModel", "T5Config", **sizes | changes)


# --- pipelines --------------------------------------------------------------------------------


QWEN3_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""How Qwen3's chat template formats a message of the user."""

QWEN_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 272,
    "max_position_embeddings": 2048,
}


def _qwen_tokenizer(**settings: Any) -> Any:
    """transformers' tokenizer of bytes and the marks of Qwen's templates."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=library("tokenizers").Tokenizer.from_str(
            json.dumps(_byte_tokenizer(marks))
        ),
        pad_token=marks[0],
        eos_token=marks[2],
        **settings,
    )


def qwen_image_pipeline() -> Any:
    """diffusers' QwenImagePipeline."""
    diffusers = library("diffusers")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    text_encoder = _made(
        "transformers",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config=QWEN_TEXT | {"rope_parameters": rope},
        vision_config=vision | {"out_hidden_size": 32, "fullatt_block_indexes": [0]},
        tie_word_embeddings=False,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    return diffusers.QwenImagePipeline(
        scheduler=scheduler,
        vae=fill(qwen_image_vae()),
        text_encoder=fill(text_encoder),
        tokenizer=_qwen_tokenizer(),
        transformer=fill(qwen_image(joint_attention_dim=32)),
    )


def z_image_pipeline(*, shift: float = 3.0) -> Any:
    """diffusers' ZImagePipeline, of Z-Image-Turbo; of Z-Image with a shift of 6."""
    diffusers = library("diffusers")
    rope = {"rope_type": "default", "rope_theta": 1e6}
    text_encoder = _made(
        "transformers",
        "Qwen3Model",
        "Qwen3Config",
        **QWEN_TEXT,
        head_dim=16,
        rope_parameters=rope,
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=fill(kl_vae()),
        text_encoder=fill(text_encoder),
        tokenizer=_qwen_tokenizer(chat_template=QWEN3_TEMPLATE),
        transformer=fill(z_image(cap_feat_dim=32)),
    )


def flux2_klein_pipeline(*, is_distilled: bool = False) -> Any:
    """diffusers' Flux2KleinPipeline, of klein base or of klein."""
    diffusers = library("diffusers")
    text_encoder = _made(
        "transformers",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        # The pipeline takes the states of layers 9, 18 and 27.
        **QWEN_TEXT | {"num_hidden_layers": 28},
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=fill(flux2_vae()),
        text_encoder=fill(text_encoder),
        tokenizer=_qwen_tokenizer(chat_template=QWEN3_TEMPLATE),
        transformer=fill(flux2(joint_attention_dim=96)),
        is_distilled=is_distilled,
    )
