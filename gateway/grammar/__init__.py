"""Structured output: constraints, their compiled grammars, and the masks of the tokens a grammar allows next."""

from gateway.grammar.compiler import CompiledGrammar, GrammarCompiler
from gateway.grammar.constraint import Constraint
from gateway.grammar.masks import RowMasks, allows_only
from gateway.grammar.outbox import Outbox

__all__ = ["CompiledGrammar", "Constraint", "GrammarCompiler", "Outbox", "RowMasks", "allows_only"]
