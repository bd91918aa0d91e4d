"""A chat template with the grammar of GLM-4.7's, but without its words on how to call tools: which turns keep
their thoughts, what the prompt ends with, how calls and their results are written."""

from __future__ import annotations

SPECIAL_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TEXT_TOKENS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)

TEMPLATE = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>' }}
    {%- for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}{{ '\\n' }}{% endfor %}
{%- endif %}
{%- set seen = namespace(users=0) %}
{%- for message in messages if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endfor %}
{%- set now = namespace(users=0, before='') %}
{%- for message in messages %}
    {%- if message.role in ('system', 'user') %}
        {{- '<|' + message.role + '|>' + message.content }}
        {%- if message.role == 'user' %}{% set now.users = now.users + 1 %}{% endif %}
    {%- elif message.role == 'assistant' %}
        {%- set is_kept = now.users == seen.users or (clear_thinking is defined and not clear_thinking) %}
        {{- '<|assistant|>' }}
        {%- if message.reasoning_content and is_kept %}
            {{- '<think>' + message.reasoning_content.strip() }}
        {%- endif %}
        {{- '</think>' + message.content.strip() }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<arg_key>' + key + '</arg_key><arg_value>' }}
                {{- value if value is string else value | tojson(ensure_ascii=False) }}
                {{- '</arg_value>' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '<|observation|>' if now.before != 'tool' else '' }}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
    {%- endif %}
    {%- set now.before = message.role %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}
{%- endif %}"""
