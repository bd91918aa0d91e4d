"""Fields that are known and not honoured, hence refused unless they hold a value that changes nothing.

They are in the request's types so that using one is an error that names it. Any other field is ignored.
"""

from __future__ import annotations

from typing import Any

from nybble.server.requests.grammar_fields import FormFields

Harmless = dict[str, tuple[object, ...]]  # of each field, the values besides null that change nothing

REFUSED: Harmless = {
    "chat_template": (),
    "custom_logit_processor": (),
    "ebnf": (),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "regex": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "use_beam_search": (False,),
}

REFUSED_IN_CHATS: Harmless = REFUSED | {
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

REFUSED_IN_COMPLETIONS: Harmless = REFUSED | {
    "best_of": (1,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
}


class RefusedFields(FormFields, frozen=True, kw_only=True):
    """Of vLLM, SGLang and OpenAI, in chat completions and completions."""

    chat_template: Any = None
    custom_logit_processor: Any = None
    ebnf: Any = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    regex: Any = None
    service_tier: Any = None
    skip_special_tokens: bool | None = None
    structural_tag: Any = None
    use_beam_search: bool | None = None
