"""The next step, planned while its predecessor runs: every sequence goes on by one token.

When the tokens are there, all that is left is to put them in place. Where more is to be decided (prompts to
compute, drafts, blocks that run out) there is no prediction, and where something came up meanwhile it is
given up: blocks that were taken for it stay with their sequences, which will need them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from nybble.engine.scheduling.sequence import Sequence
from nybble.engine.scheduling.step import Chunk, StepPlan


@dataclass(frozen=True)
class Prediction:
    """A plan of one token each; token_ids: the list in each chunk where its token goes."""

    plan: StepPlan
    sequences: list[Sequence]
    token_ids: list[list[int]]

    def confirm(self, decoding: Collection[Sequence]) -> StepPlan | None:
        """The plan with its tokens, without sequences that have ended; the same object if none has.

        None if that is not all that the sequences which decode now call for.
        """
        is_left = [sequence in decoding for sequence in self.sequences]
        if sum(is_left) != len(decoding) or any(sequence.drafts for sequence in decoding):
            return None
        for sequence, token_ids in zip(self.sequences, self.token_ids, strict=True):
            token_ids[0] = sequence.token_ids[-1]
        if all(is_left):
            return self.plan
        chunks = zip(self.plan.chunks, is_left, strict=True)
        return StepPlan(tuple([chunk for chunk, is_in in chunks if is_in]))


def predict(
    plan: StepPlan, sequences: Mapping[str, Sequence], grow: Callable[[Mapping[Sequence, int]], bool]
) -> Prediction | None:
    """What follows a plan that is being run and whose tokens are not known yet.

    sequences: by request; grow: makes room for so many tokens of each sequence, or for none and says False.
    """
    if any(chunk.sampling is None or chunk.num_drafts for chunk in plan.chunks):
        return None
    lengths: dict[Sequence, int] = {}  # with the token that the next step runs
    for chunk in plan.chunks:
        sequence = sequences[chunk.request_id]
        if sequence.num_output_tokens + 1 < sequence.sampling.max_tokens:  # else it ends with what comes
            lengths[sequence] = chunk.start + len(chunk.token_ids) + 1
    if not lengths or not grow(lengths):
        return None
    unknown: list[list[int]] = [[0] for _ in lengths]
    chunks = [
        Chunk(
            request_id=sequence.request_id,
            token_ids=token_ids,
            start=length - 1,
            blocks=sequence.blocks.array,
            sampling=sequence.sampling,
            rules=sequence.rules,
        )
        for (sequence, length), token_ids in zip(lengths.items(), unknown, strict=True)
    ]
    return Prediction(StepPlan(tuple(chunks)), list(lengths), unknown)
