"""The two data streams of a stage: steps in (Forward), and on the last stage answers out (Results)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from stageline.errors import FailedPreconditionError, InvalidArgumentError, StagelineError
from stages.server.abort import abort
from stages.server.epoch import Epoch, EpochOverError
from stages.server.frames import Assembler
from stages.server.link import DATA_SERVICE
from stages.server.ring import OFFER, PROOF, attached

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

Admit = Callable[[int, str], Epoch]
Stale = Callable[[int], StagelineError]


class DataStreams:
    """Handlers of StageDataService. `admit(epoch, incarnation)` gives the current epoch or raises why not."""

    def __init__(
        self,
        admit: Admit,
        stale: Stale,
        *,
        is_last: Callable[[], bool],
        max_payload_bytes: Callable[[], int],
        shares_memory: bool = True,
    ) -> None:
        """`is_last` and `max_payload_bytes` are asked when a stream begins. `shares_memory=False` takes no offer of a ring."""
        self._admit, self._stale, self._is_last = admit, stale, is_last
        self._max_payload_bytes, self._shares_memory = max_payload_bytes, shares_memory

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """For `add_generic_rpc_handlers`; messages are raw frames."""
        return grpc.method_handlers_generic_handler(
            DATA_SERVICE,
            {
                "Forward": grpc.stream_unary_rpc_method_handler(self._forward),
                "Results": grpc.unary_stream_rpc_method_handler(self._results),
            },
        )

    async def _forward(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        epoch = await self._enter(context)
        offer = dict(context.invocation_metadata()).get(OFFER)
        ring = attached(str(offer)) if offer is not None and self._shares_memory else None
        try:
            if offer is not None:
                await context.send_initial_metadata(((PROOF, ring.proof if ring is not None else ""),))
            assembler = Assembler(self._max_payload_bytes(), ring)
            while (message := await epoch.until_over(context.read())) is not _EOF:
                if (frame := assembler.feed(message)) is None:
                    continue
                await epoch.put(frame)
                del frame  # its memory may be shared: it is held until the step is computed, and not for longer
        except EpochOverError:
            await abort(context, self._stale(epoch.number))
        except StagelineError as error:
            await abort(context, error)
        finally:
            if ring is not None:
                ring.close()
        return b""

    async def _results(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        epoch = await self._enter(context)
        try:
            if not self._is_last():
                raise FailedPreconditionError("NOT_LAST_STAGE", "results come from the last stage only")
            epoch.take_results()
        except StagelineError as error:
            await abort(context, error)
        try:
            while True:
                yield (await epoch.answer()).header
        except EpochOverError:
            await abort(context, self._stale(epoch.number))
        finally:
            epoch.give_results_back()

    async def _enter(self, context: Any) -> Epoch:
        """The connected epoch that the stream's metadata names."""
        metadata = dict(context.invocation_metadata())
        number = metadata.get("stageline-epoch", "")
        try:
            if not number.isascii() or not number.isdigit() or len(number) > 20:
                raise InvalidArgumentError("EPOCH_MISSING", "the stream needs the metadata stageline-epoch")
            epoch = self._admit(int(number), metadata.get("stageline-incarnation", ""))
            if not epoch.connected:
                raise FailedPreconditionError("NOT_CONNECTED", f"epoch {number} is not wired yet: call Connect first")
        except StagelineError as error:
            await abort(context, error)
        return epoch
