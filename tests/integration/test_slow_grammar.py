"""A grammar whose masks take long keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import contextlib

from engine_helpers import (
    EOS,
    NUM_LAYERS,
    VOCAB_SIZE,
    all_free,
    byte_tokenizer,
    collect,
    expected_tokens,
    request,
    until,
)

from gateway.grammar import Constraint, GrammarCompiler, masks

ANY = b"\xff" * ((VOCAB_SIZE + 7) // 8)


class HeldMasks:
    """Masks of a slow grammar that allow everything, each when the test says so."""

    slow = True

    def __init__(self) -> None:
        self.num_asked = 0
        self.advance(0)

    def advance(self, token_id: int) -> None:
        self.ready = asyncio.get_running_loop().create_future()
        self.num_asked += 1


class HeldGrammar:
    def __init__(self) -> None:
        self.masks: list[HeldMasks] = []

    def start(self, token_ids: tuple[int, ...]) -> HeldMasks:
        self.masks.append(HeldMasks())
        return self.masks[-1]


async def test_others_go_on_while_a_slow_mask_is_made(cluster):
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end)
    engine = await cluster.start()
    await until(engine.ready)
    grammar = HeldGrammar()
    slow = asyncio.create_task(collect(engine, request([1, 2], max_tokens=8, grammar=grammar)))
    for num_asked in range(1, 9):
        await until(lambda n=num_asked: grammar.masks and grammar.masks[0].num_asked == n)
        answer = (await collect(engine, request([7], max_tokens=12)))[0]
        assert answer.token_ids == expected_tokens([7], 12, num_stages=2)
        assert not slow.done()
        grammar.masks[0].ready.set_result(ANY)
    assert (await slow)[0].token_ids == expected_tokens([1, 2], 8, num_stages=2)
    await until(lambda: all_free(engine))


async def test_one_that_is_cancelled_while_its_mask_is_made_leaves_nothing(cluster):
    await cluster.add_stage(0, NUM_LAYERS)
    engine = await cluster.start()
    await until(engine.ready)
    grammar = HeldGrammar()
    slow = asyncio.create_task(collect(engine, request([1, 2], max_tokens=8, grammar=grammar)))
    await until(lambda: grammar.masks)
    grammar.masks[0].ready.set_result(ANY)
    await until(lambda: grammar.masks[0].num_asked == 2)
    slow.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await slow
    grammar.masks[0].ready.set_result(ANY)
    await until(lambda: all_free(engine))


async def test_a_grammar_is_slow_by_its_first_mask_or_a_later_one(monkeypatch):
    made = await GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, (EOS,)).compile(Constraint("regex", "[a-z]*", "f"))
    row = made.start()
    assert not row.slow
    await row.ready
    monkeypatch.setattr(masks, "SLOW_MASK_S", -1.0)
    row.advance(byte_tokenizer().encode("a")[0])
    await row.ready
    assert row.slow
    again = await GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, (EOS,)).compile(Constraint("regex", "[a-z]+", "f"))
    monkeypatch.setattr("gateway.grammar.compiler.SLOW_MASK_S", -1.0)
    assert again.start().slow
