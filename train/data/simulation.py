"""Backward simulation: batches of what a few-step student meets (SnapGen++ section 3.3)."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.config import FOUR_STEPS
from mlx_snapgen.lora.adapters import acting
from mlx_snapgen.sampling import get_schedule
from mlx_snapgen.teachers.base import Teacher
from train.data.source import Batch
from train.objectives.dmd import STUDENT, STUDENT_TEXT, Distilled
from train.objectives.losses import add_noise, expand


class Simulation:
    """Backward simulation: batches of x_t that the student itself would meet.

    A batch picks a step of the schedule, runs the student up to it without gradient (predict x0,
    noise it afresh to the next level), and stops there. `width_of` is told the step. `read` makes
    prompts into the student's text and mask; None where the teacher is of the student's own
    weights, which reads for both.
    """

    def __init__(
        self,
        model: Distilled,
        teacher: Teacher,
        shape: tuple[int, int, int],
        batch_size: int,
        prompts: Callable[[int], str],
        width_of: Callable[[int], float],
        num_steps: int = FOUR_STEPS.num_inference_steps,
        time_shift: float = FOUR_STEPS.time_shift,
        seed: int = 0,
        read: Callable[[Sequence[str]], tuple[mx.array, mx.array]] | None = None,
    ):
        self.model, self.teacher, self.shape, self.read = model, teacher, shape, read
        self.batch_size, self.prompts, self.width_of = batch_size, prompts, width_of
        self.levels = get_schedule(num_steps, time_shift)
        self.seed = seed

        def predict(x_t, sigma, text, mask, width):
            with acting(model.network, STUDENT):
                v = model.network(x_t, sigma, text, mask, share=width)
            return x_t - expand(sigma, x_t) * v

        self._predict = mx.compile(predict, inputs=model.state)

    def __call__(self, number: int) -> Batch:
        """Batch `number`, from the student as it is now."""
        # The engine numbers batches by step, then process.
        step = number // mx.distributed.init().size()
        start, count = number * self.batch_size, self.batch_size
        rng = np.random.default_rng((self.seed, number, 4))
        stop, width = int(rng.integers(len(self.levels) - 1)), self.width_of(step)
        prompts = [self.prompts(start + k) for k in range(count)]
        condition = self.teacher.encode(prompts)
        text, mask = self.read(prompts) if self.read else (condition.text, condition.mask)
        keys = mx.random.split(mx.random.key(int(rng.integers(2**32))), stop + 1)
        x_t = mx.random.normal((count, *self.shape), key=keys[0])
        for i in range(stop):
            sigma, following = (mx.full((count,), s) for s in self.levels[i : i + 2])
            x0 = self._predict(x_t, sigma, text, mask, width)
            x_t = add_noise(x0, mx.random.normal(x0.shape, key=keys[i + 1]), following)
        sigma = mx.full((count,), self.levels[stop])
        told = dict(zip(STUDENT_TEXT, (text, mask), strict=True))
        return {"x_t": x_t, "sigma": sigma, **condition._asdict(), **told}
