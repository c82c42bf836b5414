"""Compiles constraints on threads, within limits, and remembers what it compiled."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from gateway.grammar.constraint import Constraint
from gateway.grammar.masks import SLOW_MASK_S, RowMasks
from gateway.tokenizer import Tokenizer
from stageline.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError

CACHED_GRAMMARS = 64
CACHED_COMPILE_S = 4.0
"""CPU time that the cached grammars took to compile: about 130 MiB a second, and a hostile one takes a second."""
COMPILE_TIMEOUT_S = 10.0
MAX_COMPILING = 32
MAX_THREADS = 8
COMPILE_NICENESS = 10
"""Of the threads that compile and that make the masks of slow grammars, where the system has it for threads: they go behind the masks
that steps wait for, and behind everything else of the gateway."""
# llguidance's own defaults are for one user; these are for a server that many share. With the 151,936 tokens of Qwen2's
# vocabulary, of some twenty grammars made to be slow the worst took 0.6 s to compile and 0.4 s for one mask, on a thread.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class _Made:
    """A matcher, and the CPU time that all of it and its first mask took, in seconds."""

    matcher: LLMatcher
    compile_s: float
    mask_s: float


class CompiledGrammar:
    """A grammar ready for any number of sequences."""

    def __init__(self, made: _Made, pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor], vocab_size: int) -> None:
        """`pools`: see RowMasks."""
        self._made, self._pools, self._vocab_size = made, pools, vocab_size
        self.compile_s = made.compile_s

    def start(self, token_ids: tuple[int, ...] = ()) -> RowMasks:
        """The masks of one sequence that has already `token_ids`; must be called on the event loop."""
        num_bytes, slow = (self._vocab_size + 7) // 8, self._made.mask_s > SLOW_MASK_S
        return RowMasks(self._made.matcher.deep_copy(), self._pools, num_bytes, token_ids, slow=slow)


class GrammarCompiler:
    """For one tokenizer. Lives on one event loop; the work is done on threads, without the GIL."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        # Apart: steps of the pipeline wait for the masks of their rows, unless these are slow.
        self._mask_pool = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="grammars", initializer=_give_way)
        self._ll_tokenizer: asyncio.Future[LLTokenizer] | None = None
        self._cache: OrderedDict[tuple[str, str], CompiledGrammar] = OrderedDict()
        self._compiling: dict[tuple[str, str], asyncio.Task[_Made]] = {}

    async def compile(self, constraint: Constraint) -> CompiledGrammar:
        """Raises InvalidArgumentError for a grammar that cannot be read, exceeds its limits or allows nothing,
        FailedPreconditionError for a model without an end token, ResourceExhaustedError where too many compile."""
        constraint.check_size()
        key = (constraint.kind, constraint.source)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if not self._eos_token_ids:
            raise FailedPreconditionError(
                "NO_END_TOKEN", "the model has no end token, so that no grammar could end its answer",
                field=constraint.field,
            )  # fmt: skip
        if key not in self._compiling:
            if len(self._compiling) >= MAX_COMPILING:
                raise ResourceExhaustedError("GRAMMARS_BUSY", f"{MAX_COMPILING} grammars are being compiled")
            self._compiling[key] = asyncio.create_task(self._compile(constraint))
            self._compiling[key].add_done_callback(lambda _: self._compiling.pop(key))
        work = self._compiling[key]
        try:
            made = await asyncio.wait_for(asyncio.shield(work), COMPILE_TIMEOUT_S)
        except TimeoutError:
            raise InvalidArgumentError(
                "GRAMMAR_TOO_COMPLEX", f"{constraint.field} takes more than {COMPILE_TIMEOUT_S:g} s to compile",
                field=constraint.field, limit_s=COMPILE_TIMEOUT_S,
            ) from None  # fmt: skip
        grammar = self._cache[key] = CompiledGrammar(made, (self._mask_pool, self._pool), self._vocab_size)
        self._evict()
        return grammar

    def _evict(self) -> None:
        cached_s = sum(one.compile_s for one in self._cache.values())
        while len(self._cache) > CACHED_GRAMMARS or cached_s > CACHED_COMPILE_S:
            cached_s -= self._cache.popitem(last=False)[1].compile_s

    async def _compile(self, constraint: Constraint) -> _Made:
        loop = asyncio.get_running_loop()
        if self._ll_tokenizer is None:
            self._ll_tokenizer = loop.run_in_executor(self._pool, self._make_tokenizer)
        ll_tokenizer = await self._ll_tokenizer
        return await loop.run_in_executor(self._pool, _compile, constraint, ll_tokenizer)

    def _make_tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids))


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere niceness is the process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), COMPILE_NICENESS)


def _compile(constraint: Constraint, ll_tokenizer: LLTokenizer) -> _Made:
    started_s = time.thread_time()
    try:
        grammar = constraint.to_grammar(ll_tokenizer)
    except (ValueError, RecursionError) as error:
        raise _invalid(constraint, str(error)) from None
    matcher = LLMatcher(ll_tokenizer, grammar, log_level=0, limits=LIMITS)
    compiled_s = time.thread_time()
    if not matcher.is_error():
        matcher.compute_bitmask()  # some faults and limits show only here; and the first mask is the dearest
    if matcher.is_error():
        raise _invalid(constraint, matcher.get_error())
    ended_s = time.thread_time()
    return _Made(matcher, ended_s - started_s, ended_s - compiled_s)


def _invalid(constraint: Constraint, fault: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "GRAMMAR_INVALID",
        f"{constraint.field} cannot be used: {fault.partition('<non-verbose')[0].strip():.500}",
        field=constraint.field,
    )
