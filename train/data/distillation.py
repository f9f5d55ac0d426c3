"""Batches with a teacher's conditions."""

from train.data.conditions import Conditions
from train.data.encoded import EncodedBatches
from train.data.source import Batch


class DistillationBatches:
    """`EncodedBatches` with the teacher's text of the captions: the fields of `Condition`.

    Where no encoder of the student gets the caption, the teacher gets its unconditional text.
    """

    def __init__(self, batches: EncodedBatches, conditions: Conditions):
        self.batches, self.conditions = batches, conditions

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream."""
        batch, prompts = self.batches.with_prompts(number)
        states = self.batches.samples(number).states
        return batch | self.conditions(prompts, states)._asdict()
