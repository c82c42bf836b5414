"""The base of request bodies: JSON objects without surprises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from stageline.errors import UnimplementedError

NoOps = Mapping[str, tuple[Any, ...]]  # parameter that is not served → values that ask for nothing, beside null


class Body(BaseModel):
    """A JSON object without surprises: no coercion, no unknown fields; null is "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    no_ops: ClassVar[NoOps] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.no_ops.keys() & data.keys():
            value = data[name]
            if value is not None and not any(_same(value, idle) for idle in cls.no_ops[name]):
                raise UnimplementedError("PARAMETER_NOT_SERVED", f"{name} is not served yet; leave it out", field=name)
        return {name: value for name, value in data.items() if name not in cls.no_ops}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The OpenAPI document has the parameters that are known and not served, with what they may say."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, idle in sorted(cls.no_ops.items()):
            schema.setdefault("properties", {})[name] = {
                "enum": [*idle, None],
                "description": "Known and not served: only what asks for nothing is accepted.",
            }
        return schema


def _same(value: object, idle: object) -> bool:
    # In Python 0 == False and 1 == True; in JSON a number is no boolean.
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)
