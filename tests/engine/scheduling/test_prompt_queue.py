from __future__ import annotations

import itertools

from nybble.engine.messages import Request, SamplingParams
from nybble.engine.scheduling.fair_share import FairShare
from nybble.engine.scheduling.prompt_queue import PromptQueue
from nybble.engine.scheduling.sequence import Sequence

_TURN = 10


class _Prompts:
    """A queue in which whoever has a turn is admitted at once and gets up to 10 tokens."""

    def __init__(self) -> None:
        self.shares = FairShare(max_lag=100)
        self.queue = PromptQueue(self.shares)
        self.left: dict[Sequence, int] = {}
        self.admitted: set[Sequence] = set()
        self._arrivals = itertools.count()

    def add(
        self, name: str, num_tokens: int, tenant: str = "", priority: int = 0, output: int = 0
    ) -> Sequence:
        sampling = SamplingParams(max_tokens=100)
        request = Request(
            request_id=name, prompt_token_ids=(1,), sampling=sampling, tenant=tenant, priority=priority
        )
        sequence = Sequence(request, sampling, block_size=4)
        for _ in range(output):
            sequence.append(1)
        sequence.arrival = next(self._arrivals)
        self.shares.arrive(tenant)
        self.queue.add(sequence, num_tokens)
        self.left[sequence] = num_tokens
        return sequence

    def take_turn(self, can_admit: bool = True) -> str:
        sequence = self.queue.next(can_admit)
        if sequence is None:
            return ""
        if sequence not in self.admitted:
            self.admitted.add(sequence)
            self.queue.admit(sequence, self.left[sequence])
        count = min(self.left[sequence], _TURN)
        self.left[sequence] -= count
        self.shares.charge(sequence.tenant, count)
        self.queue.end_turn(sequence, self.left[sequence], can_admit)
        return sequence.request_id

    def take_turns(self, count: int, can_admit: bool = True) -> list[str]:
        return [self.take_turn(can_admit) for _ in range(count)]


def test_turns_go_alternately_to_the_oldest_and_to_the_shortest() -> None:
    prompts = _Prompts()
    prompts.add("long", 100)
    prompts.add("longer", 200)
    prompts.add("short", 20)
    assert prompts.take_turns(5) == ["long", "short", "long", "short", "long"]
    assert prompts.take_turns(2) == ["long", "long"]  # it is the shortest now, too


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    prompts = _Prompts()
    for name in "abc":
        prompts.add(name, 20)
    assert prompts.take_turns(7) == ["a", "a", "b", "b", "c", "c", ""]


def test_tenants_take_turns_by_tokens_served() -> None:
    prompts = _Prompts()
    for number in range(1000):
        prompts.add(f"a{number}", 10, tenant="a")
    assert prompts.take_turns(2) == ["a0", "a1"]
    prompts.add("b0", 20, tenant="b")
    prompts.add("c0", 10, tenant="c")
    # b and c were served nothing, a 20 tokens.
    assert prompts.take_turns(5) == ["b0", "c0", "b0", "a2", "a3"]


def test_a_better_priority_goes_first_whoever_was_served_what() -> None:
    prompts = _Prompts()
    prompts.add("low", 20, tenant="a", priority=1)
    prompts.add("lowest", 20, tenant="b", priority=7)
    assert prompts.take_turn() == "low"
    prompts.add("high", 20, tenant="c", priority=-1)
    prompts.shares.charge("c", 1000)
    assert prompts.take_turns(5) == ["high", "high", "low", "lowest", "lowest"]


def test_answers_that_were_begun_go_before_new_ones_of_their_priority() -> None:
    prompts = _Prompts()
    prompts.add("new", 10, tenant="a")
    prompts.add("begun", 10, tenant="b", output=3)
    prompts.add("urgent", 10, tenant="b", priority=-1)
    prompts.shares.charge("b", 50)
    assert prompts.take_turns(3) == ["urgent", "begun", "new"]


def test_without_admission_those_that_prefill_go_on() -> None:
    prompts = _Prompts()
    prompts.add("a", 30)
    assert prompts.take_turn(can_admit=False) == ""
    assert prompts.take_turn() == "a"
    prompts.add("b", 5)
    assert prompts.take_turns(3, can_admit=False) == ["a", "a", ""]
    assert prompts.take_turn() == "b"


def test_what_waits_for_room_stays_next() -> None:
    prompts = _Prompts()
    running = prompts.add("running", 1000)
    prompts.take_turns(2)
    big = prompts.add("big", 500, priority=-1)
    prompts.add("small", 5, priority=-1)
    for _ in range(5):
        assert prompts.queue.next(can_admit=True) is big
        assert prompts.take_turn(can_admit=False) == "running"
    prompts.queue.remove(running)
    assert prompts.queue.next(can_admit=True) is big


def test_removal_from_anywhere() -> None:
    prompts = _Prompts()
    prefilling, waiting, other = (prompts.add(name, 50) for name in "abc")
    prompts.take_turn()
    assert (prompts.queue.num_waiting, prompts.queue.num_prefilling) == (2, 1)
    prompts.queue.remove(prefilling)
    prompts.queue.remove(prefilling)
    assert (prompts.queue.num_waiting, prompts.queue.num_prefilling) == (2, 0)
    prompts.queue.remove(waiting)
    assert set(prompts.queue.waiting()) == {other}
    prompts.queue.remove(other)
    assert prompts.queue.next(can_admit=True) is None
    assert prompts.queue.next(can_admit=False) is None


def test_ten_thousand_tenants_and_as_many_priorities_leave_in_order() -> None:
    prompts = _Prompts()
    for number in range(10_000):
        prompts.add(str(number), 10, tenant=f"t{number % 5000}", priority=number % 100)
    order = [int(name) % 100 for name in prompts.take_turns(10_000)]
    assert order == sorted(order)
