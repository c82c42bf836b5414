"""What an answer must look like, as the client said it, and as a grammar of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from stageline.errors import InvalidArgumentError

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # around a call, in Qwen2's (Hermes') form
MAX_SOURCE_CHARS = 64 * 1024
MAX_GBNF_CHARS = 16 * 1024
MAX_CHOICES = 1024
MAX_CALLS = 16  # of one answer
_LARK_LINE = re.compile(r"\s*(%llguidance\b|start\s*:(?!:=))")
# At most this much white space where JSON allows any: small models would go on for ever.
JSON_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{0,20}"}
# As Qwen2's chat template writes the calls of earlier turns (Python's json.dumps).
CALL_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Constraint:
    """`source` is a JSON schema as JSON text, a regular expression (Rust's syntax, anchored at both ends), a grammar in
    Lark or GBNF, a JSON list of texts, or a JSON list of tool objects of which at least one must be called (`tools`),
    or exactly one (`tool`). `field` is what the client calls it.
    """

    kind: Literal["json_schema", "regex", "grammar", "choice", "tools", "tool"]
    source: str
    field: str

    @classmethod
    def json_schema(cls, schema: Any, field: str) -> Constraint:
        """An answer that is JSON and valid against `schema`."""
        return cls("json_schema", _dump(schema, field), field)

    @classmethod
    def json_object(cls, field: str) -> Constraint:
        """An answer that is any JSON object."""
        return cls("json_schema", '{"type": "object"}', field)

    @classmethod
    def choice(cls, texts: Sequence[str], field: str) -> Constraint:
        """An answer that is one of `texts`. Raises InvalidArgumentError for none, too many, or an empty one."""
        if not 1 <= len(texts) <= MAX_CHOICES or "" in texts:
            raise InvalidArgumentError(
                "CHOICES_INVALID", f"{field} must hold 1 to {MAX_CHOICES} texts, none of them empty", field=field
            )
        return cls("choice", _dump(list(texts), field), field)

    @classmethod
    def tool_calls(cls, tools: Sequence[Mapping[str, Any]], field: str, *, several: bool) -> Constraint:
        """An answer that is nothing but calls of `tools`."""
        return cls("tools" if several else "tool", _dump([tool["function"] for tool in tools], field), field)

    def check_size(self) -> None:
        """Raises InvalidArgumentError for a source that is empty or too long."""
        if not 0 < len(self.source) <= MAX_SOURCE_CHARS:
            raise InvalidArgumentError(
                "GRAMMAR_SIZE_OUT_OF_RANGE",
                f"{self.field} has {len(self.source)} characters; 1 to {MAX_SOURCE_CHARS} are possible",
                field=self.field, length=len(self.source), limit=MAX_SOURCE_CHARS,
            )  # fmt: skip

    def to_grammar(self, ll_tokenizer: LLTokenizer) -> str:
        """In llguidance's form. Raises ValueError where the source cannot be read."""
        if self.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(self.source, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.source)
        if self.kind == "grammar":
            return LLMatcher.grammar_from_lark(_to_lark(self.source))
        if self.kind == "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(self.source))))
        tags = [_tag(text, ll_tokenizer) for text in (OPEN, CLOSE)]
        return LLMatcher.grammar_from_lark(_calls_grammar(json.loads(self.source), tags, several=self.kind == "tools"))


def _to_lark(source: str) -> str:
    """Lark as it is, GBNF converted. Raises ValueError for GBNF that is too long or cannot be read."""
    # llguidance's own detection and its converter take quadratic time over empty lines, and hold the GIL.
    lines = [line for line in source.splitlines() if line.strip()]
    if any(_LARK_LINE.match(line) for line in lines):
        return source
    if len(source) > MAX_GBNF_CHARS:
        raise ValueError(
            f"it has no Lark rule `start:`, and as GBNF it may have {MAX_GBNF_CHARS} characters, not {len(source)}"
        )
    try:
        return gbnf_to_lark("\n".join(lines))
    except Exception as error:  # it raises plain Exceptions too
        raise ValueError(str(error) or type(error).__name__) from None


def _tag(text: str, ll_tokenizer: LLTokenizer) -> str:
    """A tag in a Lark grammar: its own token where llguidance takes it for special (Qwen2.5's are), else plain text."""
    token_ids = ll_tokenizer.tokenize_str(text, parse_special=True)
    return text if len(token_ids) == 1 and ll_tokenizer.is_special_token(token_ids[0]) else json.dumps(text)


def _calls_grammar(functions: Sequence[Mapping[str, Any]], tags: Sequence[str], *, several: bool) -> str:
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if several else ""
    lines = [
        f"start: call{more}",
        f'call: {tags[0]} "\\n" function "\\n" {tags[1]}',
        "function: " + " | ".join(f"f{place}" for place in range(len(functions))),
    ]
    for place, function in enumerate(functions):
        schema = {
            "x-guidance": CALL_OPTIONS,
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        lines.append(f"f{place}: %json {json.dumps(schema)}")
    return "\n".join(lines)


def _dump(value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise InvalidArgumentError("GRAMMAR_INVALID", f"{field} is nested too deep", field=field) from None
