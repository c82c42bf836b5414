"""What the compiler of grammars remembers is bounded by number and by cost."""

from __future__ import annotations

from gateway.grammar import Constraint, compiler
from gateway.grammar.compiler import GrammarCompiler
from tests.integration.engine_helpers import EOS, VOCAB_SIZE, byte_tokenizer


async def test_cheap_grammars_stay_and_dear_ones_go(monkeypatch) -> None:
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, (EOS,))
    cheap = [Constraint("regex", f"a{i}", "f") for i in range(3)]
    first = [await made.compile(one) for one in cheap]
    assert [await made.compile(one) for one in cheap] == first, "remembered"
    dear = Constraint("regex", "a{100000}", "f")
    grammar = await made.compile(dear)
    assert grammar.compile_s > 10 * max(one.compile_s for one in first)
    assert await made.compile(dear) is grammar

    monkeypatch.setattr(compiler, "CACHED_COMPILE_S", grammar.compile_s / 2)
    late = await made.compile(Constraint("regex", "b", "f"))
    assert await made.compile(Constraint("regex", "b", "f")) is late
    assert await made.compile(dear) is not grammar, "the dear one had to go"
