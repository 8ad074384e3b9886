"""How is a conversation written down? The chat template, and the same in Python for training."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .tokenizer import IM_END, IM_START

_TOOLS_BEFORE: Final = "You may call these tools:\n<tools>"
_TOOLS_AFTER: Final = '\n</tools>\nTo call one, say <tool_call>{"name": ..., "arguments": ...}</tool_call>'

#: The Jinja template that goes into the model file. `render` below must say the same.
CHAT_TEMPLATE: Final = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'TOOLS_BEFORE' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- 'TOOLS_AFTER<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".replace("TOOLS_BEFORE", _TOOLS_BEFORE.replace("\n", r"\n")).replace(
    "TOOLS_AFTER", _TOOLS_AFTER.replace("\n", r"\n")
)

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


def render(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """Return the prompt of a conversation, ready for the assistant's next words."""
    parts: list[str] = [system_part(messages, tools)]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            parts.append(f"{IM_START}assistant\n{assistant_text(message)}{IM_END}\n")
        elif message["role"] != "system" or index > 0:
            parts.append(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n")
    return "".join(parts) + f"{IM_START}assistant\n"


def system_part(messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """Return what stands before the first turn: the system message and the tools, if any."""
    first = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    if tools:
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        before = f"{first}\n\n" if first is not None else ""
        return f"{IM_START}system\n{before}{_TOOLS_BEFORE}{listed}{_TOOLS_AFTER}{IM_END}\n"
    return "" if first is None else f"{IM_START}system\n{first}{IM_END}\n"


def assistant_text(message: Message) -> str:
    """Return what the assistant says in `message`: its words, its tool calls, or both."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = [message["content"]] if message.get("content") else []
    return "\n".join(said + [tool_call_text(call["name"], call["arguments"]) for call in calls])


def tool_call_text(name: str, arguments: str | Mapping[str, Any]) -> str:
    """Return a tool call as the model writes it."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {written}}}\n</tool_call>'
