"""What `tools` and `tool_choice` mean for a request: the prompt, the parser, the grammar. Pure."""

from __future__ import annotations

from dataclasses import replace

from gateway.api.checks import fail, shown_name
from gateway.api.raw import ChatPrompt, RawRequest
from gateway.grammar import Constraint
from gateway.grammar.constraint import CLOSE
from stageline.errors import FailedPreconditionError

MAX_TOOLS = 128
CHOICES = ("none", "auto", "required", "named")


def with_tool_choice(raw: RawRequest, *, takes_tools: bool) -> tuple[RawRequest, bool]:
    """The request with its tools applied, and whether its answer may hold calls.

    "none" leaves the tools out of the prompt. "required" and a named tool become a grammar. `takes_tools`: the model's
    chat template writes tools into the prompt; where it does not, it would drop them without a word.

    Raises InvalidArgumentError for a choice without tools, an unknown name, too many tools, or a grammar besides;
    FailedPreconditionError for a template that takes no tools.
    """
    prompt = raw.prompt
    if not isinstance(prompt, ChatPrompt):
        return raw, False
    named = prompt.tool_choice == "named"
    if not prompt.tools:
        if prompt.tool_choice in ("required", "named"):
            fail(raw, "tool_choice", "TOOL_CHOICE_WITHOUT_TOOLS", "needs tools to choose from")
        return raw, False
    if len(prompt.tools) > MAX_TOOLS:
        fail(raw, "tools", "TOOLS_TOO_MANY", f"has {len(prompt.tools)} tools, the limit is {MAX_TOOLS}",
             count=len(prompt.tools), limit=MAX_TOOLS)  # fmt: skip
    if prompt.tool_choice == "none":
        return replace(raw, prompt=replace(prompt, tools=())), False
    if not takes_tools:
        shown = shown_name(raw, "tools")
        raise FailedPreconditionError(
            "TOOLS_NOT_IN_TEMPLATE", f"this model's chat template takes no {shown}; serve a model whose template does",
            field=shown,
        )  # fmt: skip
    if prompt.tool_choice == "auto":
        # A generation that ends with the first call: the parser does not need the tag to see that it is complete.
        stops = raw.stop_strings if prompt.parallel_tool_calls else (*raw.stop_strings, CLOSE)
        return replace(raw, stop_strings=stops), True
    if raw.constraint is not None:
        fail(raw, "tool_choice", "GRAMMAR_TWICE", f"cannot force a call beside {raw.constraint.field}")
    tools = [t for t in prompt.tools if t["function"]["name"] == prompt.tool_name] if named else prompt.tools
    if not tools:
        fail(raw, "tool_choice", "TOOL_UNKNOWN", f"names {prompt.tool_name!r:.80}, which is none of the tools",
             name=prompt.tool_name[:80])  # fmt: skip
    several = prompt.parallel_tool_calls and not named
    constraint = Constraint.tool_calls(tools, shown_name(raw, "tools"), several=several)
    return replace(raw, constraint=constraint), True
