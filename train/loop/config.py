"""Settings of the training loop, and what messages call the settings of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_snapgen.cli.options import option_of
from mlx_snapgen.errors import UserError

NAMES = {
    "data": "data",
    "samples": "pictures or captions",
    "pictures": "pictures or captions",
    "files": "files of pictures",
    "sources": "sources of pictures",
    "weights": "weights of the sources",
    "index": "prepared pictures",
    "buckets": "shapes of pictures",
    "captions": "captions",
    "prompts": "prompts",
    "prompts_digest": "prompts",
    "filter": "filter of pictures",
    "autoencoder": "sizes of the autoencoder",
    "autoencoders": "autoencoder",
    "autoencoder_digest": "weights of the autoencoder",
    "tokenizer_digests": "tokenizers",
    "frozen_text_encoders": "files of public text encoders",
    "model_digest": "files of the model",
    "teacher": "teacher",
    "teacher_digest": "files of the teacher",
    "few_step": "few-step settings",
    "few_step_digest": "few-step LoRA",
    "networks": "settings of the networks to train",
    "layers": "palettes",
    "average_bits": "--quantize",
    "bits": "--quantize",
    "widths": "--model-widths",
    "model_width": "--model-widths",
    "lora_rank": "--rank",
    "records_in_shard": "--shard-size",
    # These are options of some commands, and follow from others of the rest; the last three are
    # fixed.
    "final_learning_rate": "final learning rate",
    "warmup_steps": "warm-up steps",
    "betas": "betas",
    "weight_decay": "weight decay",
    "max_grad_norm": "largest norm of the gradients",
}
"""Setting in a record -> what messages call it; others have the name of their option."""


def name_of(setting: str) -> str:
    """What messages call a setting."""
    return NAMES.get(setting) or option_of(setting)


def changed(then: Mapping[str, Any], now: Mapping[str, Any], among: Iterable[str]) -> list[str]:
    """What messages call the settings `among` some that differ between two records."""
    return list(dict.fromkeys(name_of(name) for name in among if then.get(name) != now[name]))


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings of two records that differ, with both values, such as "--steps 3 -> 4"."""
    return ", ".join(
        f"{name_of(name)} {shown(then[name])} -> {shown(now[name])}"
        for name in now
        if name in then and then[name] != now[name]
    )


def shown(value: Any) -> str:
    """A value as the user gives it."""
    if isinstance(value, (list, tuple)):
        # A list in a list is a size.
        return " ".join("x".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return "not given" if value is None else str(value)


@dataclass(frozen=True)
class TrainingConfig:
    """Loop settings; sizes in samples and steps.

    Args:
        batch_size: samples in a micro-batch, which must fit in memory.
        accumulate: micro-batches of each process in a step.
        optimizer: "adamw", or "muon": matrices and convolutions inside the blocks by Muon at
            `MUON_RATE` times the learning rate, all else by AdamW.
        keep_checkpoints: older ones are deleted; 0 keeps all.
    """

    steps: int
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 50

    def __post_init__(self):
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f"--optimizer '{self.optimizer}' is not one of adamw, muon")
        for name in ("batch_size", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{option_of(name)} must be at least 1, not {getattr(self, name)}")

    @property
    def dtype(self) -> mx.Dtype:
        """The type that gradients are computed in; weights, averages and optimizer are float32.

        It is bfloat16 on a GPU and float32 on the CPU, where float32 is faster.
        """
        gpu = mx.default_device().type == mx.DeviceType.gpu
        return mx.bfloat16 if gpu else mx.float32


def warmup_of(steps: int, most: int) -> int:
    """Steps of warm-up: `most`, or a sixth of a short run."""
    return min(most, max(1, steps // 6))
