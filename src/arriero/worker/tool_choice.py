"""How is a model made to call a tool when the client demands it?

llama.cpp takes `required` only as "do not end early", and a named function as `auto`.  So the
worker asks for an answer in a JSON schema that nothing but a call fits into, and turns that answer
back into a tool call.  The tools stay in the messages, since template and grammar exclude each other.
"""

from dataclasses import dataclass
from typing import Any, Final, NoReturn

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.base import Abilities, StreamEvent, StreamFinished, TextDelta, ToolCallDelta

TOOLS_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The call that the answer must be: of one of these functions."""

    functions: tuple[dict[str, Any], ...]

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the chat options that force the call."""
        left_out = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
        kept = {name: value for name, value in given.items() if name not in left_out}
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "const": function["name"]},
                    "arguments": function.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in self.functions
        ]
        schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        kept["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "tool_call", "strict": True, "schema": schema},
        }
        return kept

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with the functions described in the system message."""
        lines = [msgspec.json.encode(function).decode() for function in self.functions]
        told = (
            "You must call one of these functions. Answer with nothing but a JSON object that has the "
            'keys "name" and "arguments".\n' + "\n".join(lines)
        )
        first, *rest = messages
        if first["role"] == "system":
            return [{**first, "content": f"{first['content']}\n\n{told}"}, *rest]
        return [{"role": "system", "content": told}, *messages]


def tool_choice_of(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, abilities: Abilities
) -> ToolChoice | None:
    """Return the call that is demanded; None where the model is free to call or not.

    Raises INVALID_REQUEST for tools or a choice that are not well formed, or name no such function.
    """
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    if len(functions) > TOOLS_MAX:
        _refuse("tools", f"tools has {len(functions)} entries, the limit is {TOOLS_MAX}")
    if choice is None or choice in ("auto", "none"):
        return None
    if isinstance(choice, dict):
        name = _named(choice)
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            _refuse("tool_choice", f"tool_choice names {name[:80]!r}, which is not among the tools")
    elif choice != "required":
        _refuse(
            "tool_choice", f"tool_choice is {choice[:40]!r}; it must be auto, none, required or a function"
        )
    if not functions:
        _refuse("tool_choice", "tool_choice is required, but there are no tools")
    if not abilities.grammar:
        _refuse(
            "tool_choice",
            "this engine cannot hold an answer to a format, so it cannot be made to call a tool",
        )
    return ToolChoice(tuple(functions))


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        _refuse(f"{where}.type", f"{where}.type is {str(tool.get('type'))[:40]!r}; it must be function")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(f"{where}.function", f"{where}.function has no name")
    if not isinstance(function.get("parameters") or {}, dict):
        _refuse(f"{where}.function.parameters", f"{where}.function.parameters is no object")
    return function


def _named(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    if (
        choice.get("type") != "function"
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        _refuse("tool_choice", "tool_choice is an object without type function and a function's name")
    name: str = function["name"]
    return name


def _refuse(param: str, message: str) -> NoReturn:
    raise ArrieroError(ErrorCode.INVALID_REQUEST, message, param=param)


class ForcedCall:
    """Turns the events of an answer in the schema into the events of a tool call."""

    def __init__(self, call_id: str) -> None:
        self._call_id = call_id
        self._text: list[str] = []

    def events(self, event: StreamEvent) -> list[StreamEvent]:
        """Return what the client is to see of an engine's event."""
        if isinstance(event, TextDelta):
            self._text.append(event.text)
            return []
        if not isinstance(event, StreamFinished):
            return [event]
        text = "".join(self._text)
        try:
            call = msgspec.json.decode(text)
            name, arguments = call["name"], msgspec.json.encode(call["arguments"]).decode()
        except (msgspec.DecodeError, KeyError, TypeError):
            # Cut off before its end (`length`): what came is shown as what it is.
            return [TextDelta(text), event]
        reason = "tool_calls" if event.finish_reason == "stop" else event.finish_reason
        finished = StreamFinished(reason, event.prompt_tokens, event.completion_tokens, event.cached_tokens)
        return [ToolCallDelta(0, self._call_id, name, arguments), finished]
