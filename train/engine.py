"""The training loop that every trainer here shares.

A run is a folder: `log.jsonl`, and `step_N/` checkpoints that hold all a resumed run needs. The
step is compiled over explicit state. Nothing random is carried along: batch `k` and its noise
depend on the run's seed and `k` alone, so a resumed run continues as if it had never stopped.
"""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from mlx_snapgen.errors import UserError


@dataclass(frozen=True)
class TrainingConfig:
    """Loop settings; sizes in samples and steps."""

    steps: int
    batch_size: int = 64
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


Batch = dict[str, mx.array]
GradientFunction = Callable[..., tuple[dict, dict[str, mx.array]]]
"""(model, batch, key, *static) -> (gradients, metrics); `static` comes from `Trainer.static`."""


class Trainer:
    """Trains `model` in place and keeps an exponential moving average of it in `ema`.

    Args:
        model: module with the trainable parameters.
        gradients: computes gradients and scalar metrics of one batch; compiled.
        batches: number -> batch; must depend on the number (and its own seed) alone. With several
            processes, process r of n takes batch step * n + r.
        config: loop settings.
        run_dir: folder of the run; created, or resumed from when it holds a checkpoint.
        static: step -> hashable arguments passed on to `gradients` (one compilation for each).
        validate: called with (trainer) after every checkpoint; returns metrics to log.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: GradientFunction,
        batches: Callable[[int], Batch],
        config: TrainingConfig,
        run_dir: Path,
        static: Callable[[int], tuple] = lambda step: (),
        validate: Callable[["Trainer"], dict[str, float]] | None = None,
    ):
        self.model, self.batches, self.config = model, batches, config
        self.run_dir, self.static, self.validate = Path(run_dir), static, validate
        self.group = mx.distributed.init()
        self.step = 0
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate_schedule(config),
            betas=list(config.betas),
            weight_decay=config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(model.trainable_parameters())
        self.ema = tree_map(lambda p: mx.array(p), model.trainable_parameters())
        self._stop = False
        if mx.default_device() == mx.cpu:
            # The CPU backend's default cache of freed buffers is too small for a training step.
            mx.set_cache_limit(4 << 30)

        # mx.compile captures the containers, so the averages live in one dict for good.
        self._averages = {"ema": self.ema}
        state = [model.state, self.optimizer.state, self._averages]

        def train_step(batch: Batch, key: mx.array, *static):
            grads, metrics = gradients(model, batch, key, *static)
            if self.group.size() > 1:
                grads = nn.average_gradients(grads, self.group)
            grads, norm = optim.clip_grad_norm(grads, config.max_grad_norm)
            self.optimizer.update(model, grads)
            # A short memory at first, so that the average is never dominated by the start.
            count = self.optimizer.state["step"].astype(mx.float32)
            decay = mx.minimum(config.ema_decay, (1 + count) / (10 + count))
            self._averages["ema"] = tree_map(
                lambda a, p: decay * a + (1 - decay) * p,
                self._averages["ema"],
                model.trainable_parameters(),
            )
            return metrics | {"grad_norm": norm}

        self._state = state
        self._train_step = mx.compile(train_step, inputs=state, outputs=state)

    def run(self) -> bool:
        """Train to the last step, resuming when the run has a checkpoint.

        Returns:
            True when the last step was reached, False after Ctrl-C (state saved).
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = latest_checkpoint(self.run_dir)
        if checkpoint:
            self.load(checkpoint)
        main = self.group.rank() == 0
        previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not main)
        sums: dict[str, mx.array] = {}
        started = time.perf_counter()
        try:
            while self.step < self.config.steps and not self._stop:
                key = mx.random.key(self.config.seed * 1_000_003 + self.step)
                if self.group.size() > 1:
                    key = mx.random.split(key, self.group.size())[self.group.rank()]
                batch = self.batches(self.step * self.group.size() + self.group.rank())
                metrics = self._train_step(batch, key, *self.static(self.step))
                for name, value in metrics.items():
                    sums.setdefault(name, []).append(value)
                mx.eval(self._state, metrics)
                self.step += 1
                bar.update()
                if self.step % self.config.log_every == 0:
                    means = {k: float(mx.mean(mx.stack(v))) for k, v in sums.items()}
                    sums = {}
                    seconds = (time.perf_counter() - started) / self.config.log_every
                    started = time.perf_counter()
                    bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
                    if not all(math.isfinite(v) for v in means.values()):
                        raise UserError(
                            f"the loss is not finite at step {self.step}: lower the learning rate "
                            f"and resume from {latest_checkpoint(self.run_dir)}"
                        )
                    if main:
                        self._log(means | {"seconds_per_step": seconds})
                if main and self.step % self.config.checkpoint_every == 0:
                    self.save()
                    if self.validate:
                        self._log(self.validate(self))
                    started = time.perf_counter()
            if main and not (self.run_dir / f"step_{self.step}").exists():
                self.save()
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.step >= self.config.steps

    @property
    def ema_parameters(self) -> dict:
        """The averaged parameters, shaped like `model.trainable_parameters()`."""
        return self._averages["ema"]

    def save(self) -> Path:
        """Write `step_N` whole or not at all, then prune old checkpoints."""
        final = self.run_dir / f"step_{self.step}"
        partial = self.run_dir / f".step_{self.step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        trees = {
            "model": self.model.trainable_parameters(),
            "ema": self._averages["ema"],
            "optimizer": self.optimizer.state,
        }
        for name, tree in trees.items():
            mx.save_safetensors(str(partial / f"{name}.safetensors"), dict(tree_flatten(tree)))
        state = {"step": self.step, "training": asdict(self.config)}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        os.replace(partial, final)
        for old in checkpoints(self.run_dir)[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)
        return final

    def load(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`; a foreign or damaged one is a `UserError`."""
        try:
            state = json.loads((checkpoint / "state.json").read_text())
            trees = {
                name: mx.load(str(checkpoint / f"{name}.safetensors"))
                for name in ("model", "ema", "optimizer")
            }
        except (OSError, ValueError, RuntimeError) as error:
            others = [str(c) for c in checkpoints(self.run_dir) if c != checkpoint]
            way_out = f"delete it to resume from {others[-1]}" if others else "delete it"
            raise UserError(f"{checkpoint} is damaged ({error}): {way_out}") from None
        expected = {k: v.shape for k, v in tree_flatten(self.model.trainable_parameters())}
        found = {k: v.shape for k, v in trees["model"].items()}
        if found != expected:
            key = next(k for k in {**expected, **found} if expected.get(k) != found.get(k))
            raise UserError(
                f"{checkpoint} is of another model: '{key}' is {found.get(key)} there, "
                f"{expected.get(key)} here"
            )
        self.model.update(tree_unflatten(list(trees["model"].items())))
        self._averages["ema"] = tree_unflatten(list(trees["ema"].items()))
        self.optimizer.state = tree_unflatten(list(trees["optimizer"].items()))
        self._state[1] = self.optimizer.state
        self.step = state["step"]

    def _log(self, values: dict[str, float]) -> None:
        with open(self.run_dir / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": self.step, "time": time.time()} | values) + "\n")

    def _ask_to_stop(self, *_) -> None:
        self._stop = True


def learning_rate_schedule(config: TrainingConfig) -> Callable[[mx.array], mx.array]:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`."""
    warmup = max(1, config.warmup_steps)
    decay = optim.cosine_decay(
        config.learning_rate, max(1, config.steps - warmup), config.final_learning_rate
    )
    rise = optim.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup)
    return optim.join_schedules([rise, decay], [warmup])


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in Path(run_dir).glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def load_ema(run_dir: Path) -> dict[str, mx.array]:
    """Averaged parameters of a run's newest checkpoint, flat; `UserError` when there is none."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} holds no checkpoint: train it first")
    return mx.load(str(checkpoint / "ema.safetensors"))
