from __future__ import annotations

from array import array

from nybble.engine.messages import Request, SamplingParams
from nybble.engine.scheduling.block_pool import hash_block
from nybble.engine.scheduling.sequence import Sequence


def _sequence(prompt: tuple[int, ...] = (1, 2, 3, 4, 5), block_size: int = 2, **sampling: object) -> Sequence:
    params = SamplingParams(**({"max_tokens": 3} | sampling))
    request = Request(request_id="r", prompt_token_ids=prompt, sampling=params)
    return Sequence(request, params, block_size)


def test_a_new_sequence_has_everything_to_compute() -> None:
    sequence = _sequence()
    assert (sequence.num_uncomputed, sequence.num_output_tokens, len(sequence.blocks)) == (5, 0, 0)
    assert not sequence.is_decoding


def test_a_prompts_last_token_is_not_decoding() -> None:
    sequence = _sequence()
    sequence.num_computed = 4
    assert sequence.num_uncomputed == 1
    assert not sequence.is_decoding


def test_decoding_is_one_sampled_token_to_run() -> None:
    sequence = _sequence()
    sequence.num_computed = 5
    sequence.append(9)
    assert sequence.is_decoding
    sequence.num_computed = 0  # preempted
    assert not sequence.is_decoding
    assert sequence.num_uncomputed == 6


def test_ends_with_length_at_max_tokens() -> None:
    sequence = _sequence(max_tokens=2)
    assert sequence.append(8) is None
    assert sequence.append(9) == "length"
    assert sequence.token_ids == [1, 2, 3, 4, 5, 8, 9]
    assert sequence.num_output_tokens == 2


def test_ends_with_stop_at_any_stop_token() -> None:
    for stop in (7, 9):
        sequence = _sequence(stop_token_ids=(7, 9))
        assert sequence.append(8) is None
        assert sequence.append(stop) == "stop"


def test_a_stop_token_that_is_also_the_last_ends_with_stop() -> None:
    assert _sequence(max_tokens=1, stop_token_ids=(7,)).append(7) == "stop"


def test_stop_tokens_in_the_prompt_end_nothing() -> None:
    assert _sequence(stop_token_ids=(5,)).append(8) is None


def test_the_request_is_not_changed() -> None:
    request = Request(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=3))
    Sequence(request, request.sampling, 2).append(2)
    assert request.prompt_token_ids == (1,)


def test_block_hashes_are_the_chain_whenever_they_are_asked_for() -> None:
    first = hash_block(b"", array("i", [1, 2]))
    second = hash_block(first, array("i", [3, 4]))
    third = hash_block(second, array("i", [5, 9]))
    sequence = _sequence()
    assert list(sequence.block_hashes(0)) == []
    assert list(sequence.block_hashes(2)) == [first, second]
    sequence.append(9)
    assert sequence.block_hash(2) == third
    assert list(sequence.block_hashes(3)) == [first, second, third]
    assert list(sequence.block_hashes(1)) == [first]


def test_drafts_that_would_leave_nothing_to_sample_are_useless() -> None:
    sequence = _sequence(max_tokens=4)
    sequence.drafts = (1, 2, 3, 4, 5)
    assert sequence.useful_drafts == ()  # a prompt is not decoding
    sequence.num_computed = 5
    for num_useful in (2, 1, 0):
        sequence.append(9)
        assert sequence.useful_drafts == (1, 2, 3, 4, 5)[:num_useful]
        sequence.num_computed += 1


def test_a_sequence_is_finished_once_it_has_a_reason() -> None:
    sequence = _sequence(max_tokens=2)
    sequence.append(8)
    assert not sequence.is_finished
    sequence.append(9)
    assert sequence.is_finished
