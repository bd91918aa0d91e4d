"""What each field means is tested with chat requests (test_chat_request.py)."""

from __future__ import annotations

import pytest

from nybble.server.errors import BadRequestError
from nybble.server.requests.sampling_fields import SamplingFields, settle_sampling, stop_strings
from nybble.server.served_model import ServedModel


@pytest.mark.parametrize(("num_prompt", "max_tokens", "param"), [(64, None, "text"), (60, 5, "size")])
def test_the_field_at_fault_is_the_callers(
    model: ServedModel, num_prompt: int, max_tokens: int | None, param: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        settle_sampling(
            SamplingFields(),
            model,
            num_prompt,
            max_tokens=max_tokens,
            num_logprobs=None,
            prompt_field="text",
            length_field="size",
        )
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")


@pytest.mark.parametrize(("stop", "wanted"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))])
def test_stop_strings(stop: str | list[str] | None, wanted: tuple[str, ...]) -> None:
    assert stop_strings(SamplingFields(stop=stop)) == wanted
