"""The Jinja environment of chat templates: as transformers sets it up, and bounded.

Templates come with a checkpoint, so they are other people's code. The sandbox keeps them from running anything; the
budget here keeps them from looping or growing for ever, which would stop the gateway for everyone. It counts steps and
the results of operators; one filter or string method can still allocate much at once (`'x' | center(10 ** 9)`).
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 500_000  # loop iterations and calls of one rendering
MAX_CHARS = 16 * 1024 * 1024  # of the text, and of any string on the way
_MAX_INTEGER_BITS = 4096
BUDGET = "#budget"  # key in the render context; no template can spell it


class Budget:
    """The steps left to one rendering."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Raises SecurityError where nothing is left."""
        self._steps -= steps
        if self._steps < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")


class _Bounded(CodeGenerator):
    """Compiles loops and concatenations so that the environment sees them."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        counted = nodes.EnvironmentAttribute("counted", lineno=node.lineno)
        arguments = [nodes.ContextReference(lineno=node.lineno), node.iter]
        node.iter = nodes.Call(counted, arguments, [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.checked(")
        super().visit_Concat(node, frame)
        self.write(")")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders with `{BUDGET: Budget()}` in the context."""

    code_generator_class = _Bounded
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes here: macros, recursive loops, `range`, methods."""
        context[BUDGET].spend(1)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse products and powers before they are made; a sum is at most twice a checked string."""
        if operator == "*":
            size, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if hasattr(size, "__len__") and isinstance(times, int) and len(size) * times > MAX_CHARS:
                raise SecurityError(f"the template makes a value longer than {MAX_CHARS}")
        if isinstance(left, int) and isinstance(right, int) and operator != "+":
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_INTEGER_BITS:
                raise SecurityError(f"the template makes an integer of more than {_MAX_INTEGER_BITS} bits")
        return self.checked(super().call_binop(context, operator, left, right))

    @staticmethod
    def counted(context: Context, values: Iterable[Any]) -> list[Any]:
        """What a loop runs over, paid for."""
        items = list(itertools.islice(values, MAX_STEPS + 1))
        context[BUDGET].spend(len(items))
        return items

    @staticmethod
    def checked(value: Any) -> Any:
        """The value, unless it is too long."""
        if hasattr(value, "__len__") and len(value) > MAX_CHARS:
            raise SecurityError(f"the template makes a value longer than {MAX_CHARS}")
        return value


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
