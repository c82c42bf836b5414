"""One choice of one request while it is generated: text, stops, and where its deltas go. Pure but for the queue."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from gateway.engine.deltas import Deltas
from gateway.grammar import RowMasks, allows_only
from gateway.metrics import Metrics
from gateway.sampling import make_sampling, scored_tokens
from gateway.scheduler import ScheduledRow, Sequence
from gateway.tokenizer import Detokenizer, StopMatcher, Tokenizer
from gateway.types import ChoiceDelta, FinishReason, GenerateRequest, SamplingParams, TokenLogprobs
from stageline.errors import StagelineError
from stageline.stage.v1 import stage_service_pb2 as pb


@dataclass(slots=True)
class _Piece:
    text: str
    finish_reason: FinishReason | None
    matched_stop: str = ""


class ChoiceState:
    """Turns tokens into deltas and says when the choice has ended."""

    def __init__(
        self,
        request: GenerateRequest,
        index: int,
        sequence_id: int,
        tokenizer: Tokenizer,
        context_tokens: int,
        deltas: Deltas,
    ) -> None:
        self.params: SamplingParams = request.sampling
        self.index, self.deltas = index, deltas
        self.asked = make_sampling(self.params, choice_index=index)
        """What every step asks of the last stage for this choice."""
        self.ended = False
        self.finish_reason: FinishReason | None = None
        self.created_s = time.monotonic()
        self._last_token_s: float | None = None
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, self.params.skip_special_tokens)
        self._matcher = StopMatcher(self.params.stop_strings, self.params.include_stop_string)
        self._stop_ids = frozenset(self.params.eos_token_ids) | frozenset(self.params.stop_token_ids)
        self._suppressed = tuple(sorted(self._stop_ids))
        self.num_prompt_logprobs = request.num_prompt_logprobs or 0
        # The prompt is the same for all choices: the first one scores it.
        scores = request.num_prompt_logprobs is not None and index == request.first_choice
        self._scores: list[TokenLogprobs] | None = [] if scores else None
        prompt, forced = request.prompt_token_ids, None
        longest = len(prompt) + self.params.max_tokens
        scores = scores and len(prompt) > 1
        if self.params.max_tokens == 0 and scores:
            *computed, forced = prompt
            prompt = tuple(computed)
        self.sequence = Sequence(
            sequence_id=sequence_id,
            prompt_token_ids=prompt,
            output_token_ids=list(request.resume_token_ids),
            choice_index=index,
            max_total_tokens=min(longest, context_tokens),
            score_from=1 if scores else None,
            forced_token_id=forced,
            priority=request.priority,
            request_key=id(deltas),  # one queue serves all choices of a request, and lives as long as they do
            tenant=request.tenant,
            deadline_s=request.deadline_s,
            use_prefix_cache=request.use_prefix_cache,
            cache_salt=request.cache_salt,
        )
        grammar = request.grammar
        self._constrained = grammar is not None
        self._resume(request.resume_token_ids)
        if self.params.max_tokens == 0 and not scores:  # nothing to compute
            self._send(_Piece("", FinishReason.LENGTH), (), ())
        self.masks: RowMasks | None = None if grammar is None or self.ended else grammar.start(request.resume_token_ids)

    def move(self) -> None:
        """Leave the scheduler: what was generated so far goes on in a new sequence of the same number."""
        self.sequence = self.sequence.successor()

    def suppressed(self, output_position: int) -> tuple[int, ...]:
        """Tokens that cannot be chosen yet: end tokens and stop ids before min_tokens, unless a grammar allows no other."""
        if output_position >= self.params.min_tokens:
            return ()
        if self.masks is not None and allows_only(self.allowed_tokens(), self._suppressed):
            return ()
        return self._suppressed

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Take a generated token that the sequence already holds, send its delta, return whether the choice ended."""
        if self.sequence.forced_token_id is not None:
            self._send(_Piece("", FinishReason.LENGTH), (), ())
            return True
        piece = self._advance(token_id, len(self.sequence.output_token_ids))
        self._send(piece, (token_id,), () if logprobs is None else (logprobs,))
        if self.masks is not None and not self.ended:
            self.masks.advance(token_id)
        return self.ended

    def measure(self, metrics: Metrics, now_s: float) -> None:
        """A token came at `now_s`, on the monotonic clock; after `append`."""
        if self._last_token_s is None:
            prompt_tokens = len(self.sequence.prompt_token_ids)
            cached_tokens = self.sequence.num_cached_prompt_tokens
            metrics.first_token(now_s - self.created_s, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
        else:
            metrics.next_token(now_s - self._last_token_s)
        self._last_token_s = now_s
        if self.finish_reason is not None:
            metrics.finished(self.finish_reason, now_s - self.created_s)

    def add_scores(self, result: pb.RowResult, row: ScheduledRow) -> None:
        """Take the scores of the prompt's next tokens. Raises what `scored_tokens` raises."""
        assert self._scores is not None
        self._scores += scored_tokens(result, row.target_ids)

    @property
    def late_mask(self) -> asyncio.Future[bytes] | None:
        """The mask of the next position, where its grammar is slow and still at work on it."""
        masks = self.masks
        return masks.ready if masks is not None and masks.slow and not masks.ready.done() else None

    def allowed_tokens(self) -> bytes:
        """Bitmask of the tokens the grammar allows at this position; empty without a grammar, or where it failed, which
        fails the request."""
        if self.masks is None:
            return b""
        try:
            return self.masks.ready.result()
        except StagelineError as error:
            self.fail(error)
            return b""

    def fail(self, error: StagelineError) -> None:
        """End the whole request with an error."""
        if not self.ended:
            self.ended = True
            self.deltas.fail(error)

    def _resume(self, token_ids: tuple[int, ...]) -> None:
        """Bring text and stops to where they were; what the client has is not sent again."""
        for count, token_id in enumerate(token_ids, start=1):
            piece = self._advance(token_id, count)
            if piece.finish_reason is not None:
                self._send(_Piece("", piece.finish_reason, piece.matched_stop), (), ())
                return

    def _advance(self, token_id: int, num_output: int) -> _Piece:
        """Text and stops after one more token; `num_output` counts it. Nothing stops the first `min_tokens` tokens."""
        early = num_output <= self.params.min_tokens
        # A grammar that allows nothing but an end token has ended, before min_tokens too.
        stops = token_id in self._stop_ids and (self._constrained or not early)
        text = "" if stops and not self.params.include_stop_string else self._detokenizer.append(token_id)
        last = stops or len(self.sequence.prompt_token_ids) + num_output >= self.sequence.max_total_tokens
        if last:
            text += self._detokenizer.finish()
        text, matched = self._matcher.append(text, may_stop=not early)
        if matched is not None:
            return _Piece(text, FinishReason.STOP, matched)
        if not last:
            return _Piece(text, None)
        text += self._matcher.finish()
        if stops:
            return _Piece(text, FinishReason.STOP, self._tokenizer.decode([token_id], skip_special_tokens=False))
        return _Piece(text, FinishReason.LENGTH)

    def _send(self, piece: _Piece, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self.finish_reason = piece.finish_reason
        self.ended = piece.finish_reason is not None
        scores, self._scores = self._scores, None
        wanted = self.deltas.put(
            ChoiceDelta(
                index=self.index,
                text=piece.text,
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=piece.finish_reason,
                matched_stop=piece.matched_stop,
                cached_prompt_tokens=self.sequence.num_cached_prompt_tokens,
                prompt_logprobs=None if scores is None else tuple(scores),
            )
        )
        self.ended = self.ended or not wanted
