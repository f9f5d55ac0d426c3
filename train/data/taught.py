"""Batches with a teacher's conditions."""

from mlx_snapgen.teachers.base import Teacher
from train.data.encoded import Data
from train.data.source import Batch


class TaughtData:
    """`Data` with what the teacher makes of the captions: the fields of `Condition`."""

    def __init__(self, data: Data, teacher: Teacher):
        self.data, self.teacher = data, teacher

    def __call__(self, number: int) -> Batch:
        """Batch `number`."""
        batch, prompts = self.data.with_prompts(number)
        return batch | self.teacher.encode(prompts)._asdict()
