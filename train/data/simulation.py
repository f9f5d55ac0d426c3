"""Backward simulation: batches on the path of a few-step student (SnapGen++ section 3.3)."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_snapgen.config import FOUR_STEPS
from mlx_snapgen.lora.adapters import active_adapters
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.sampling import add_noise, get_schedule
from mlx_snapgen.teachers.base import Teacher
from train.data.source import Batch, PromptSource
from train.data.streams import Stream

STUDENT = "student"
"""Name of the student's adapter."""
STUDENT_TEXT = ("student_text", "student_mask")
"""In a batch, the joined text (B, L, D) and mask (B, L) of student and critic."""


class Simulation:
    """Backward simulation: batches of x_t on the student's own path.

    A batch picks a step of the schedule, runs the student up to it without gradient (predict x0,
    add fresh noise of the next level), and stops there.

    Args:
        network: has the student's adapter.
        shape: (h, w, C) of the latents.
        share_of: step -> the student's share of the network's width.
        read: prompts -> the student's text and mask; None if the teacher has the student's text
            encoders: then both use the teacher's text.
    """

    def __init__(
        self,
        network: EfficientDiT,
        teacher: Teacher,
        *,
        shape: tuple[int, int, int],
        batch_size: int,
        prompts: PromptSource,
        share_of: Callable[[int], float],
        num_steps: int = FOUR_STEPS.num_inference_steps,
        time_shift: float = FOUR_STEPS.time_shift,
        seed: int = 0,
        read: Callable[[Sequence[str]], tuple[mx.array, mx.array]] | None = None,
    ):
        self.teacher, self.shape, self.read = teacher, shape, read
        self.batch_size, self.prompts, self.share_of = batch_size, prompts, share_of
        self.levels = get_schedule(num_steps, time_shift)
        self.seed = seed

        def predict(x_t, sigma, text, mask, share):
            with active_adapters(network, STUDENT):
                v = network(x_t, sigma, text, mask, share=share)
            return x_t - sigma[:, None, None, None] * v

        self._predict = mx.compile(predict, inputs=network.state)

    def __call__(self, number: int) -> Batch:
        """Batch `number`, sampled with the student's current weights."""
        # The trainer numbers batches by step, then process.
        step = number // mx.distributed.init().size()
        count = self.batch_size
        rng = Stream.SIMULATION.generator(self.seed, number)
        stop, share = int(rng.integers(len(self.levels) - 1)), self.share_of(step)
        prompts = self.prompts.prompts(number, count)
        condition = self.teacher.encode(prompts)
        text, mask = self.read(prompts) if self.read else (condition.text, condition.mask)
        keys = mx.random.split(mx.random.key(int(rng.integers(2**32))), stop + 1)
        x_t = mx.random.normal((count, *self.shape), key=keys[0])
        for i in range(stop):
            sigma, following = (mx.full((count,), s) for s in self.levels[i : i + 2])
            x0 = self._predict(x_t, sigma, text, mask, share)
            eps = mx.random.normal(x0.shape, key=keys[i + 1])
            x_t = add_noise(x0, eps, following[:, None, None, None])
        sigma = mx.full((count,), self.levels[stop])
        own = dict(zip(STUDENT_TEXT, (text, mask), strict=True))
        return {"x_t": x_t, "sigma": sigma, **condition._asdict(), **own}
