"""Public teachers of random weights and tiny sizes, as diffusers writes them, and as ours."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from convert.parity import originals
from convert.parity.originals import fill
from mlx_snapgen.config import to_dict
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.text_encoders.qwen import QWEN_IMAGE
from mlx_snapgen.teachers.config import TeacherConfig
from mlx_snapgen.teachers.folder import CONFIG, FORMAT_VERSION, NETWORKS
from tests.tiny import randomize

TEXT_DIMS = 32
SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9}
SCHEDULER |= {"base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def libraries():
    """(torch, diffusers, transformers), or a skipped test."""
    why = "parity with diffusers needs torch, diffusers and mlx-lm: pip install -e '.[parity]'"
    pytest.importorskip("mlx_lm", reason=why)
    return tuple(
        pytest.importorskip(name, reason=why) for name in ("torch", "diffusers", "transformers")
    )


def byte_tokenizer(transformers, **settings):
    """A token for each byte, and the marks of Qwen's templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(marks + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[2], **settings
    )


def text_sizes(**more):
    return {
        "hidden_size": TEXT_DIMS,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 272,
        "max_position_embeddings": 2048,
        **more,
    }


def qwen_image_pipeline():
    """diffusers' QwenImagePipeline."""
    torch, diffusers, transformers = libraries()
    torch.manual_seed(0)
    text = text_sizes(
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 1e6,
        }
    )
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": TEXT_DIMS, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=fill(originals.qwen_image_vae()),
        text_encoder=fill(transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=byte_tokenizer(transformers),
        transformer=fill(originals.qwen_image(TEXT_DIMS)),
    )


QWEN3_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""What Qwen3's chat template makes of one user's message."""


def z_image_pipeline():
    """diffusers' ZImagePipeline."""
    torch, diffusers, transformers = libraries()
    torch.manual_seed(0)
    text = text_sizes(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=fill(originals.kl_vae()),
        text_encoder=fill(transformers.Qwen3Model(transformers.Qwen3Config(**text))),
        tokenizer=byte_tokenizer(transformers, chat_template=QWEN3_TEMPLATE),
        transformer=fill(originals.z_image(TEXT_DIMS)),
    )


class Reader:
    """Stands for a language model: states out of the prompt's letters."""

    reading = QWEN_IMAGE

    def __call__(self, prompts):
        count = max(map(len, prompts))
        states = np.zeros((len(prompts), count, TEXT_DIMS), np.float32)
        for state, prompt in zip(states, prompts, strict=True):
            for i, letter in enumerate(prompt):
                state[i] = np.random.default_rng(ord(letter)).normal(size=TEXT_DIMS)
        mask = [[i < len(prompt) for i in range(count)] for prompt in prompts]
        return mx.array(states), mx.array(mask)


def write_teacher(folder, config: TeacherConfig, seed=0):
    """A teacher's folder of random weights, without a language model."""
    folder.mkdir(parents=True)
    values = {"format_version": FORMAT_VERSION} | to_dict(config)
    (folder / CONFIG).write_text(json.dumps(values))
    parts = {
        "transformer-00001": NETWORKS[config.kind](config.transformer),
        "autoencoder": make_autoencoder(config.autoencoder),
    }
    for name, module in parts.items():
        randomize(module, seed)
        weights = dict(tree_flatten(module.parameters()))
        mx.save_safetensors(str(folder / f"{name}.safetensors"), weights)
    return folder
