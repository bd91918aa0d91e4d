"""Tokenize and detokenize: from a request's bytes to its answer. vLLM's shapes."""

from __future__ import annotations

import msgspec

from nybble.server.chat.chat_request import chat_prompt, check_chat
from nybble.server.chat.tools import offered_tools
from nybble.server.errors import BadRequestError
from nybble.server.requests.completion_schemas import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from nybble.server.requests.request_body import check_supported, decode_body
from nybble.server.requests.schemas import ChatCompletionRequest
from nybble.server.served_model import ServedModel

_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "chat_template": (),
}


def tokenize(body: bytes, model: ServedModel) -> TokenizeAnswer:
    """The tokens that a completion of the prompt, or a chat of the messages, would run with."""
    request = decode_body(body, _tokenize_decoder)
    check_supported(request, _UNSUPPORTED)
    if request.model is not None:
        model.check_name(request.model)
    token_ids = _token_ids(request, model)
    tokenizer = model.tokenizer
    return TokenizeAnswer(
        count=len(token_ids),
        max_model_len=model.max_model_len,
        tokens=list(token_ids),
        token_strs=[tokenizer.decode([one]) for one in token_ids] if request.return_token_strs else None,
    )


def detokenize(body: bytes, model: ServedModel) -> DetokenizeAnswer:
    request = decode_body(body, _detokenize_decoder)
    if request.model is not None:
        model.check_name(request.model)
    return DetokenizeAnswer(model.tokenizer.decode(model.check_token_ids(request.tokens, "tokens")))


def _token_ids(request: TokenizeRequest, model: ServedModel) -> tuple[int, ...]:
    if (request.prompt is None) == (request.messages is None):
        raise BadRequestError("prompt: expected either this or messages", "prompt")
    if request.messages is None:
        has_added = request.add_special_tokens is not False
        return model.tokenizer.encode(request.prompt or "", add_special_tokens=has_added)
    chat = ChatCompletionRequest(
        model=model.name,
        messages=request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=request.chat_template_kwargs,
        tools=request.tools,
    )
    check_chat(chat)
    return chat_prompt(chat, model, offered_tools(chat, model.tokenizer)).token_ids
