"""The training loop of all commands, with exact resume.

A run is a folder: `log.jsonl`, `loss.png`, and `step_N/` checkpoints that contain everything a
resumed run needs. The step is compiled over explicit state. No random state is saved: batch `k` and
its noise depend on the run's seed and `k` alone, so a resumed run equals an uninterrupted one.

A step averages the gradients of `accumulate` micro-batches in each of the job's processes. The
step is the same for any number of processes: micro-batch m of process r is batch
(step * accumulate + m) * processes + r.
"""

import contextlib
import functools
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from tqdm import tqdm

from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import unlock_folder
from mlx_snapgen.networks.layers import flat_parameters
from train.data.source import Batch
from train.loop.checkpoint import (
    append_log,
    latest_checkpoint,
    load_checkpoint,
    lock_run,
    read_log,
    remove_partials,
    rewind_log,
    save_checkpoint,
    writing,
)
from train.loop.config import TrainingConfig
from train.loop.distributed import GRACE, SILENCE, PeerWatch, StopSignals, is_complete
from train.loop.optimizer import Role
from train.loop.plot import is_plotted, plot_log, shown_name
from train.loop.run import check_resumed
from train.loop.step import CompiledStep
from train.objectives.base import Objective

T = TypeVar("T")
SECONDS = "seconds_per_step"
"""In the log: in the lines of training, not in those of a validation."""


class Trainer:
    """Trains `model` in place and keeps an exponential moving average in `ema_parameters`.

    Args:
        model: module with the trainable parameters.
        objective: computes gradients and metrics of one micro-batch; compiled.
        batches: number -> micro-batch; must depend on the number (and its own seed) alone.
        config: loop settings.
        run_dir: folder of the run; created, or resumed from when it holds a checkpoint.
        arguments: step -> the `step` of the objective's gradients (one compilation for each).
        validate: called with the trainer after every checkpoint, only in the first process; may
            write pictures to `sample_path`, and returns metrics to log. It shows its own progress.
        roles: groups of parameters, each with its own optimizer and gradient clip.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[Any, Any],
        *,
        batches: Callable[[int], Batch],
        config: TrainingConfig,
        run_dir: Path,
        arguments: Callable[[int], Any] = lambda step: None,
        validate: Callable[["Trainer"], dict[str, float]] | None = None,
        roles: Sequence[Role] = (Role("model"),),
    ):
        self.model, self.batches, self.config = model, batches, config
        self.run_dir, self.arguments, self.validate = Path(run_dir), arguments, validate
        self.group = mx.distributed.init()
        self.step: int = 0
        # Metrics since the last line of the log. They may differ from step to step, for example in
        # elastic training.
        self._history: dict[str, list[float]] = {}
        self._stop, self._signal = False, 0
        self._saving = threading.Lock()
        self._bar: tqdm | None = None
        if mx.default_device() == mx.Device(mx.cpu):
            # The CPU backend's default cache of freed buffers is too small for a training step.
            mx.set_cache_limit(4 << 30)
        self._compiled = CompiledStep(
            model, objective, config=config, roles=roles, group=self.group
        )
        self.optimizers = self._compiled.optimizers

    @property
    def ema_parameters(self) -> dict:
        """The averaged parameters, shaped like `model.trainable_parameters()`."""
        return self._compiled.averages

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block, the model has the averaged parameters."""
        current = self.model.trainable_parameters()
        self.model.update(self.ema_parameters)
        try:
            yield
        finally:
            self.model.update(current)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs, saves and validates."""
        return self.group.rank() == 0

    @property
    def _alone(self) -> bool:
        return self.group.size() == 1

    @property
    def exit_code(self) -> int:
        """For the command: 0, or 128 + the number of the signal that stopped any process."""
        return 128 + self._signal if self._signal and self.step < self.config.steps else 0

    def stop(self) -> None:
        """End the run after the current step, in all processes; may be called from a thread."""
        self._stop = True

    def run(self) -> bool:
        """Train to the last step, resuming when the run has a checkpoint.

        Returns:
            True when the last step was reached, False when the run was stopped (state saved).

        Raises:
            UserError: the checkpoint does not fit, a metric is not finite, the folder cannot be
                written, or another process trains in it.
        """
        watch, orderly = PeerWatch(self.group, self._lost), False
        try:
            with StopSignals(self._interrupt) as signals:
                self._resume()
                self._loop()
            orderly = True
        except RuntimeError:
            if not self._alone:
                # mlx may detect a lost process before the watch does, which prints its rank.
                time.sleep(2 * GRACE)
            raise
        finally:
            watch.close(orderly)
            unlock_folder(self.run_dir)
        finished = self.step >= self.config.steps
        if self.is_main:
            stopped = f"stopped at step {self.step}; {self._resume_hint()}"
            more = f", with {self.step:,} steps" if self.step > self.config.steps else ""
            signals.print(f"{self.run_dir} is complete{more}" if finished else stopped)
        return finished

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.run_dir)
        if self.is_main:
            with writing(self.run_dir):
                self.run_dir.mkdir(parents=True, exist_ok=True)
            lock_run(self.run_dir)
            remove_partials(self.run_dir)
            if checkpoint:
                with self._doing(f"loading {checkpoint}"):
                    self.load(checkpoint)
            plotted = is_plotted(self.run_dir)
            with writing(self.run_dir):
                rewind_log(self.run_dir, self._is_kept)
        if not self._alone:
            self._broadcast_state()
        if checkpoint and self.is_main and self._is_due:
            # The process may have been killed between its checkpoint and what follows one.
            if not (validated := self._is_validated()):
                self._validate()
            if not (validated and plotted):
                self._plot()

    def _is_kept(self, entry: dict[str, Any]) -> bool:
        """Whether a run without interruption has this line of the log, too."""
        step = entry["step"]
        # The last step of a run has a line that it does not have if there are more steps.
        early = SECONDS in entry and step % self.config.log_every and step < self.config.steps
        return step <= self.step and not early

    def _loop(self) -> None:
        config = self.config
        # A run that is longer already has no bar.
        hidden = not self.is_main or self.step > config.steps
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=hidden)
        self._bar = None if hidden else bar
        started, steps = time.perf_counter(), 0
        agreed = False
        with bar:
            bar.set_postfix_str("the first step compiles and takes longest")
            # Several processes stop by `agreed` of the last step, which is the same in all.
            while self.step < config.steps and not (agreed or (self._stop and self._alone)):
                metrics, agreed = self._train_step()
                self.step, steps = self.step + 1, steps + 1
                if steps == 1:
                    bar.set_postfix_str("", refresh=False)
                bar.update()
                if not all(math.isfinite(v) for v in metrics.values()):
                    saved = latest_checkpoint(self.run_dir)
                    raise UserError(
                        f"the loss is not finite at step {self.step}: lower the learning rate and "
                        + (f"resume from {saved}" if saved else "start again")
                    )
                for name, value in metrics.items():
                    self._history.setdefault(name, []).append(value)
                regular = self.step % config.log_every == 0
                if regular or self.step == config.steps:
                    means = {name: sum(v) / len(v) for name, v in self._history.items()}
                    seconds = (time.perf_counter() - started) / steps
                    bar.set_postfix({shown_name(k): f"{v:.4f}" for k, v in means.items()})
                    self._log(means | {SECONDS: seconds})
                if regular:
                    self._history, started, steps = {}, time.perf_counter(), 0
                if self._is_due:
                    before = time.perf_counter()
                    self._check_complete()
                    self._checkpoint()
                    started += time.perf_counter() - before
        self._bar = None
        self._check_complete()
        self.save()
        # Wait for all: mpirun ends the job when one process ends, even if another still saves. A
        # signal to one process is the exit code of all.
        shared = mx.distributed.all_max(mx.array(self._signal), group=self.group)
        self._signal = max(self._signal, int(_number(shared)))

    def _train_step(self) -> tuple[dict[str, float], bool]:
        """One step; returns the metrics, and whether any process is to stop."""
        config, processes, rank = self.config, self.group.size(), self.group.rank()
        count = config.accumulate * processes
        key = mx.random.key(config.seed * 1_000_003 + self.step)
        keys = mx.random.split(key, count) if count > 1 else [key]
        add_gradients = self._compiled.gradients(self.arguments(self.step))
        total: Any = None
        for micro in range(config.accumulate):
            share = micro * processes + rank
            batch = self._again(lambda number=self.step * count + share: self.batches(number))
            total = add_gradients(total, batch, keys[share])
            self._again(functools.partial(mx.eval, total))
        grads, sums = total
        now = mx.array(self.step), mx.array(float(self._stop))
        metrics, stop = self._compiled.update(grads, sums, *now)
        del total, grads, sums
        self._again(lambda: mx.eval(self._compiled.state, metrics, stop))
        return {name: _number(value) for name, value in metrics.items()}, _number(stop) > 0

    def _again(self, call: Callable[[], T]) -> T:
        """The result of `call`, which is called again if it fails because of Ctrl-C.

        On the CPU, mlx starts compilers. Ctrl-C in a terminal also ends these, and mlx fails; what
        it was to compute can still be computed.
        """
        try:
            return call()
        except RuntimeError:
            time.sleep(0.1)  # the signal may be later than the error
            if not self._signal:
                raise
        return call()

    def _check_complete(self) -> None:
        """Wait for all processes, so that what is saved is of all of them."""
        if not self._alone and not is_complete(self.group):
            time.sleep(SILENCE + 2 * GRACE)  # the watch ends this process, with a line
            raise RuntimeError("a process of the job is gone")

    def _checkpoint(self) -> None:
        if not self.is_main:
            return
        self.save()
        self._validate()
        self._plot()

    @property
    def _is_due(self) -> bool:
        """Whether a checkpoint with its validation follows this step."""
        # A run that was stopped before its first step has a checkpoint 0.
        is_last = self.step == self.config.steps
        return self.step > 0 and (is_last or self.step % self.config.checkpoint_every == 0)

    def _validate(self) -> None:
        validate = self.validate
        if validate is None:
            return
        with writing(self.run_dir):
            metrics = self._again(lambda: validate(self))
            if metrics:
                self._log(metrics)
            else:
                self._validated.touch()

    @property
    def _validated(self) -> Path:
        """File that tells a resumed run of a validation without metrics after this step."""
        return self.run_dir / f"step_{self.step}" / "validated"

    def _is_validated(self) -> bool:
        """Whether the validation after this step is done."""
        lines = (entry for entry in read_log(self.run_dir) if entry["step"] == self.step)
        return self._validated.exists() or any(SECONDS not in entry for entry in lines)

    def _plot(self) -> None:
        with self._doing("drawing loss.png"), writing(self.run_dir):
            plot_log(self.run_dir)

    @contextlib.contextmanager
    def _doing(self, text: str) -> Iterator[None]:
        """Show `text` behind the bar in the block; without a bar, as a line if it takes long."""
        if self._bar is None:
            with announce(f"{text} ..."):
                yield
            return
        before = self._bar.postfix or ""
        self._bar.set_postfix_str(f"{text} ...")
        yield
        self._bar.set_postfix_str(before)

    def save(self) -> None:
        """Write `step_N` whole or not at all, then prune old checkpoints.

        Raises:
            UserError: it cannot be written, as when the disk is full.
        """
        if not self.is_main or (self.run_dir / f"step_{self.step}").exists():
            return
        state = {
            "step": self.step,
            "training": asdict(self.config),
            "processes": self.group.size(),
            "history": self._history,
        }
        step = f"saving step_{self.step}"
        with self._doing(step), self._saving, writing(self.run_dir):
            save_checkpoint(
                self.run_dir, self._compiled.trees(), state=state, keep=self.config.keep_checkpoints
            )

    def load(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`; a foreign or damaged one is a `UserError`."""
        trees, state = load_checkpoint(
            checkpoint,
            self._compiled.trees(),
            split_optimizer=self.optimizers.split,
            check=lambda state: check_resumed(
                checkpoint, state, config=self.config, processes=self.group.size()
            ),
        )
        self._compiled.set_trees(trees)
        self.step, self._history = int(state["step"]), state.get("history", {})

    def _broadcast_state(self) -> None:
        """Copy the first process's step and weights to the others, which have no run folder."""

        def from_first(x: mx.array) -> mx.array:
            return mx.distributed.all_sum(x if self.is_main else mx.zeros_like(x), group=self.group)

        # Sorted, because all processes need the same order, and that of a loaded tree may differ.
        shared = [
            (name, from_first(x))
            for name, x in sorted(flat_parameters(self._compiled.trees()).items())
        ]
        mx.eval(shared)
        self._compiled.set_trees(tree_unflatten(shared))
        self.step = int(_number(from_first(mx.array(self.step))))

    def sample_path(self, name: str) -> Path:
        """Path for a picture of the current step, for `validate`."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        return folder / f"{self.step:07d}_{name}.png"

    def _log(self, values: dict[str, float]) -> None:
        if not self.is_main:
            return
        with writing(self.run_dir):
            append_log(self.run_dir, {"step": self.step, "time": time.time()} | values)

    def _resume_hint(self) -> str:
        each = "" if self._alone else ", in every process,"
        return f"resume{each} with: {shlex.join(sys.orig_argv)}"

    def _interrupt(self, number: int) -> None:
        self._signal = number
        self.stop()
        print("\nfinishing the step and saving; press again to abort at once", file=sys.stderr)

    def _lost(self, rank: int) -> None:
        """End this process, whose main thread may wait for the lost one forever."""
        with self._saving:
            saved = latest_checkpoint(self.run_dir)
            last = f"last checkpoint: {saved}; " if saved else ""
            print(
                f"\nprocess {rank} of {self.group.size()} is gone, training ends at step "
                f"{self.step}; {last}{self._resume_hint()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _number(x: mx.array) -> float:
    return float(np.array(x))
