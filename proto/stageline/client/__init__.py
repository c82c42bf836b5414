"""The Python client of Stageline's gRPC InferenceService: `Client`, and `AsyncClient` for asyncio.

Both retry with backoff and resume broken streams, so that a gateway that dies costs a pause and no token; docs/client.md
says how, for clients in other languages. They need grpcio and protobuf, nothing of the server.
"""

from stageline.client.aio import AsyncClient
from stageline.client.backoff import Backoff
from stageline.client.connection import ChannelOptions, Tls
from stageline.client.sync import Client

__all__ = ["AsyncClient", "Backoff", "ChannelOptions", "Client", "Tls"]
