"""The base of request bodies: JSON objects without surprises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

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


def _same(value: object, idle: object) -> bool:
    # In Python 0 == False and 1 == True; in JSON a number is no boolean.
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)
