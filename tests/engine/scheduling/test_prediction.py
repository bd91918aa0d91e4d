"""A prediction must change nothing but when the work is done."""

from __future__ import annotations

from typing import Any

from engine_harness import Harness, distinct_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import VOCABULARY

from nybble.engine.scheduling.step import StepPlan


def _without_prediction(harness: Harness) -> Harness:
    harness.scheduler.predict = lambda plan: None  # type: ignore[method-assign]
    return harness


def _watched(harness: Harness) -> list[StepPlan | None]:
    """What is predicted from now on."""
    predictions: list[StepPlan | None] = []
    predict = harness.scheduler.predict

    def watch(plan: StepPlan) -> StepPlan | None:
        predictions.append(predict(plan))
        return predictions[-1]

    harness.scheduler.predict = watch  # type: ignore[method-assign]
    return predictions


def _shape(plan: StepPlan | None) -> list[tuple[object, ...]]:
    """All of a plan but which blocks it writes to, and the seeds that the engine draws."""
    assert plan is not None
    return [(c.request_id, list(c.token_ids), c.start, c.sampling is None, c.num_drafts) for c in plan.chunks]


ACTIONS = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(1, 25),  # prompt
        st.integers(1, 12),  # max_tokens
        st.lists(st.integers(0, VOCABULARY - 1), max_size=2, unique=True).map(tuple),  # stop tokens
        st.integers(0, 2),  # priority
        st.sampled_from(["", "a", "b"]),  # tenant
    ),
    st.just(("step",)),
    st.just(("step",)),
    st.just(("step",)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("draft"), st.integers(0, 9), st.lists(st.integers(0, VOCABULARY - 1), max_size=3)),
)


def _play(harness: Harness, actions: list[tuple[Any, ...]]) -> None:
    num_added = 0
    for action in actions:
        match action:
            case "add", length, max_tokens, stops, priority, tenant:
                prompt = distinct_prompt(length, num_added)
                if length + max_tokens <= harness.num_blocks * 4:
                    harness.add(
                        str(num_added), prompt, max_tokens, tuple(stops), priority=priority, tenant=tenant
                    )
                num_added += 1
            case ("step",):
                harness.step()
            case "abort", number:
                harness.engine.abort(str(number))
            case "draft", number, drafts:
                for sequence in harness.scheduler.running:
                    if sequence.request_id == str(number) and sequence.is_decoding:
                        sequence.drafts = tuple(drafts)
    harness.drain()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ACTIONS, max_size=50),
    st.integers(8, 24),
    st.integers(1, 5),
    st.sampled_from([3, 8, 64]),
    st.booleans(),
)
def test_every_step_is_the_one_without_prediction(
    actions: list[tuple[Any, ...]], num_blocks: int, max_num_seqs: int, budget: int, has_cache: bool
) -> None:
    def harness() -> Harness:
        return Harness(num_blocks, max_num_seqs, max(budget, max_num_seqs), has_cache)

    with_it, without = harness(), _without_prediction(harness())
    _play(with_it, actions)
    _play(without, actions)
    assert [_shape(plan) for plan in with_it.runner.plans] == [_shape(plan) for plan in without.runner.plans]
    assert with_it.tokens == without.tokens and with_it.finish_reasons == without.finish_reasons
    assert with_it.num_cached == without.num_cached
    gauges = (with_it.engine.stats().num_preemptions, without.engine.stats().num_preemptions)
    assert gauges[0] == gauges[1]


def test_what_is_predicted_is_what_is_run() -> None:
    harness = Harness()
    for name in "abc":
        harness.add(name, distinct_prompt(5, ord(name)), 6)
    predictions = _watched(harness)
    harness.drain()
    assert len(predictions) == 6 and predictions[-1] is None  # nothing follows the last step
    for predicted, plan in zip(predictions, harness.runner.plans[1:], strict=False):
        assert predicted is plan


def test_a_request_s_last_token_is_foreseen() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5), 2)
    harness.add("b", distinct_prompt(5, 3), 4)
    predictions = _watched(harness)
    harness.drain()
    assert [p is plan for p, plan in zip(predictions, harness.runner.plans[1:], strict=False)] == [True] * 3
    assert [len(plan.chunks) for plan in harness.runner.plans] == [2, 2, 1, 1]


def test_what_is_left_when_one_stops() -> None:
    """The others run at once, without being planned anew."""
    free = Harness()
    free.add("a", distinct_prompt(5), 8)
    free.drain()
    count = next(n for n in range(1, 7) if free.tokens["a"][n] not in free.tokens["a"][:n])
    stop = free.tokens["a"][count]
    harness = Harness()
    harness.add("a", distinct_prompt(5), 8, (stop,))
    harness.add("b", distinct_prompt(6, 3), 8)
    predictions = _watched(harness)
    for _ in range(count + 1):
        harness.step()
    assert harness.finish_reasons == {"a": "stop"}
    predicted = predictions[-1]
    assert predicted is not None and len(predicted.chunks) == 2
    harness.step()
    assert harness.runner.plans[-1].chunks == predicted.chunks[1:]
    harness.drain()
    harness.assert_right_tokens("b", 8)


def test_prompts_are_not_kept_waiting() -> None:
    """An arrival between two steps is in the next one."""
    harness = Harness()
    harness.add("a", distinct_prompt(5), 8)
    harness.step()
    harness.add("b", distinct_prompt(6, 3), 2)
    assert harness.step() == {"a": 1, "b": 6}


def test_those_who_wait_for_a_place_do_not_hinder() -> None:
    harness = Harness(max_num_seqs=2)
    for number in range(5):
        harness.add(str(number), distinct_prompt(5, number), 4)
    predictions = _watched(harness)
    for _ in range(3):
        harness.step()
    assert [p is plan for p, plan in zip(predictions, harness.runner.plans[1:], strict=False)] == [True, True]
    harness.step()
    assert harness.step() == {"2": 5, "3": 5}


def test_no_prediction_over_prompts_and_drafts() -> None:
    harness = Harness(budget=8)
    harness.add("a", distinct_prompt(20), 8)
    predictions = _watched(harness)
    harness.step()
    assert predictions == [None]  # more of the prompt is to come
    harness.step()
    harness.step()
    (sequence,) = harness.scheduler.running
    sequence.drafts = (1, 2)
    assert harness.step() == {"a": 3}
    assert predictions[2] is not None and predictions[3] is None


def test_no_block_is_taken_where_not_all_can_grow() -> None:
    harness = Harness(num_blocks=5)
    harness.add("a", distinct_prompt(7), 8)
    harness.add("b", distinct_prompt(7, 3), 8)
    predictions = _watched(harness)
    harness.step()  # both fill two blocks with their first token, and want a third each
    free = harness.engine.stats().num_free_blocks
    harness.step()
    assert (free, predictions[-1]) == (1, None)
    assert harness.engine.stats().num_free_blocks == 1
    harness.drain()
    for name in "ab":
        harness.assert_right_tokens(name, 8)
