"""Batches with a teacher's conditions."""

from mlx_snapgen.teachers.base import Teacher
from train.data.encoded import EncodedBatches
from train.data.source import Batch


class DistillationBatches:
    """`EncodedBatches` with the captions also encoded by the teacher: the fields of `Condition`."""

    def __init__(self, batches: EncodedBatches, teacher: Teacher):
        self.batches, self.teacher = batches, teacher

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream."""
        batch, prompts = self.batches.with_prompts(number)
        return batch | self.teacher.encode(prompts)._asdict()
