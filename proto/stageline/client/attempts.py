"""Whether a failed call is tried again, and when. Pure: time and chance are passed in."""

from __future__ import annotations

from typing import Any

from stageline.client.backoff import Backoff
from stageline.client.progress import Progress
from stageline.errors import FailedPreconditionError, ResourceExhaustedError, StagelineError, UnavailableError
from stageline.grpc_errors import from_rpc_error
from stageline.inference.v1 import inference_service_pb2 as pb


class Attempts:
    """The attempts of one call of the user. `deadline_s` bounds all of them together, on the caller's monotonic clock."""

    def __init__(self, backoff: Backoff, deadline_s: float | None, request_id: str) -> None:
        self.request_id = request_id
        self._backoff, self._deadline_s = backoff, deadline_s
        self._failures = 0  # in a row, without a token received in between

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the deadline, the timeout of the next attempt; None without one."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - now_s)

    def received(self, message: pb.StreamGenerateResponse) -> None:
        """Tokens were received: the next failure is a first one. A `start` alone is none: a gateway that accepts and fails
        at once must not be asked again at full speed."""
        if message.choices:
            self._failures = 0

    def wait_s(self, error: StagelineError, now_s: float, draw: float) -> float:
        """Seconds to wait before the next attempt; raises `error` where it cannot help or would come too late."""
        wait_s = None
        if _retried(error):
            wait_s = self._backoff.delay_s(
                self._failures,
                draw,
                retry_after_s=float(error.metadata.get("retry_after_s", 0.0)),
                left_s=self.left_s(now_s),
            )
        if wait_s is None:
            error.metadata.setdefault("request_id", self.request_id)
            raise error
        self._failures += 1
        return wait_s


def failure(error: Any) -> StagelineError:
    """The typed error of a failed call (grpc.RpcError)."""
    return cancelled_by_peer(error.details()) if error.code().name == "CANCELLED" else from_rpc_error(error)


def cancelled_by_peer(details: str) -> StagelineError:
    """For a cancellation that nobody here asked for. It is a broken stream: what stands between, or the peer, reset it."""
    return _broken("CANCELLED_BY_PEER", f"the other side cancelled the call: {details}")


def ended_early(progress: Progress) -> StagelineError:
    """For a stream that ended without an error before its answer had."""
    return _broken("STREAM_ENDED_EARLY", f"the stream ended with {progress.num_unfinished} choices unfinished")


def closed() -> StagelineError:
    """For a call of a client that was closed, before it or meanwhile."""
    return FailedPreconditionError("CLIENT_CLOSED", "the client was closed; open another")


def _broken(reason: str, message: str) -> StagelineError:
    return UnavailableError(reason, message, retry_after_s=0)  # no server has said when to come back


def _retried(error: StagelineError) -> bool:
    # RESOURCE_EXHAUSTED comes for good too: gRPC itself says so of a message that is too large.
    return isinstance(error, UnavailableError) or (
        isinstance(error, ResourceExhaustedError) and "retry_after_s" in error.metadata
    )
