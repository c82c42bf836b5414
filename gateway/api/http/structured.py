"""Structured output in request bodies: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from gateway.api.http.body import Body, NoOps
from gateway.grammar import Constraint
from gateway.grammar.constraint import MAX_CHOICES, MAX_SOURCE_CHARS
from stageline.errors import InvalidArgumentError

Source = str | dict[str, Any]
# Bounds for the OpenAPI document; gateway.grammar checks them.
_SOURCE: Any = Field(None, json_schema_extra={"minLength": 1, "maxLength": MAX_SOURCE_CHARS})
_TEXTS: Any = Field(None, json_schema_extra={"minItems": 1, "maxItems": MAX_CHOICES})


class JsonSchemaFormat(Body):
    """A named schema. `strict` changes nothing: the schema is always kept to."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Body):
    """`text`, any JSON object, or JSON that a schema accepts."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's form: one of these."""

    no_ops: ClassVar[NoOps] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "disable_fallback": (True, False),
        "structural_tag": (),
        "whitespace_pattern": (),
    }
    json_: Source | None = Field(None, alias="json")
    regex: str | None = _SOURCE
    choice: list[str] | None = _TEXTS
    grammar: str | None = _SOURCE
    json_object: bool | None = None


class StructuredFields(BaseModel):
    """What a body may say about the form of the answer; at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Source | None = None
    guided_regex: str | None = _SOURCE
    guided_choice: list[str] | None = _TEXTS
    guided_grammar: str | None = _SOURCE

    def constraint(self) -> Constraint | None:
        """The one that was given. Raises InvalidArgumentError for several, or a schema that is no JSON."""
        found = [one for one in (self._response_format(), *self._structured(), *self._guided()) if one is not None]
        if len(found) > 1:
            raise InvalidArgumentError(
                "GRAMMAR_TWICE",
                f"{found[1].field} cannot be used beside {found[0].field}; send one",
                field=found[1].field,
            )
        return found[0] if found else None

    def _response_format(self) -> Constraint | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return Constraint.json_object("response_format")
        if form.json_schema is None or form.json_schema.schema_ is None:
            field = "response_format.json_schema.schema"
            raise InvalidArgumentError("PARAMETER_MISSING", f"{field} is required with type json_schema", field=field)
        return Constraint.json_schema(form.json_schema.schema_, "response_format.json_schema.schema")

    def _structured(self) -> list[Constraint | None]:
        one = self.structured_outputs
        if one is None:
            return []
        found = _constraints("structured_outputs.", one.json_, one.regex, one.choice, one.grammar)
        if one.json_object:
            found.append(Constraint.json_object("structured_outputs.json_object"))
        return found

    def _guided(self) -> list[Constraint | None]:
        return _constraints("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def _constraints(
    prefix: str, schema: Source | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[Constraint | None]:
    return [
        None if schema is None else _schema(schema, f"{prefix}json"),
        None if regex is None else Constraint("regex", regex, f"{prefix}regex"),
        None if choice is None else Constraint.choice(choice, f"{prefix}choice"),
        None if grammar is None else Constraint("grammar", grammar, f"{prefix}grammar"),
    ]


def _schema(schema: Source, field: str) -> Constraint:
    return (
        Constraint("json_schema", schema, field) if isinstance(schema, str) else Constraint.json_schema(schema, field)
    )
