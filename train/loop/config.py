"""Settings of the training loop."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_snapgen.errors import UserError


@dataclass(frozen=True)
class TrainingConfig:
    """Loop settings; sizes in samples and steps.

    Args:
        batch_size: samples in a micro-batch, which must fit in memory.
        accumulate: micro-batches of each process in a step.
        optimizer: "adamw", or "muon": matrices inside the blocks by Muon at `MUON_RATE` times the
            learning rate, all else by AdamW.
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
            raise UserError(f"optimizer '{self.optimizer}' is not one of adamw, muon")
        for name in ("batch_size", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")

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
