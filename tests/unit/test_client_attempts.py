"""Which failures the client tries again, and how whole answers are put together."""

import subprocess
import sys

import pytest

from stageline.client.attempts import Attempts, closed, ended_early
from stageline.client.backoff import Backoff
from stageline.client.collect import Collector
from stageline.client.connection import ChannelOptions, Endpoints, Tls, name_of_request
from stageline.client.progress import Progress, is_ranked
from stageline.errors import (
    ConfigError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb

DOWN = UnavailableError("DOWN", "down", retry_after_s=0)


def attempts(deadline_s: float | None = None) -> Attempts:
    return Attempts(Backoff(initial_s=1.0, max_s=100.0), deadline_s, "r1")


def endpoints(addresses=("a:1", "b:1"), **changes) -> Endpoints:
    options = {"tls": None, "api_key": None, "metadata": (), "channel": None, **changes}
    return Endpoints(addresses, **options)


def message(*deltas: gen.ChoiceDelta, **fields) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(choices=deltas, **fields)


def test_waits_grow_until_tokens_arrive():
    calls = attempts()
    assert [calls.wait_s(DOWN, 0.0, 0.5) for _ in range(3)] == [0.5, 1.0, 2.0]
    calls.received(message(start=gen.GenerationStart(seed=1)))  # accepted is not served
    assert calls.wait_s(DOWN, 0.0, 0.5) == 4.0
    calls.received(message(gen.ChoiceDelta(token_ids=[1])))
    assert calls.wait_s(DOWN, 0.0, 0.5) == 0.5


def test_no_wait_past_the_deadline_and_the_error_has_the_requests_name():
    calls = attempts(deadline_s=10.0)
    assert calls.left_s(9.5) == 0.5
    assert calls.left_s(11.0) == 0.0
    assert calls.wait_s(DOWN, 9.0, 0.5) == 0.5
    error = UnavailableError("DOWN", "down", retry_after_s=0)
    with pytest.raises(UnavailableError) as caught:
        calls.wait_s(error, 9.9, 0.5)
    assert caught.value is error
    assert error.metadata["request_id"] == "r1"


def test_what_is_exhausted_is_tried_again_where_the_server_says_when():
    assert attempts().wait_s(ResourceExhaustedError("QUEUE_FULL", "full", retry_after_s=3.0), 0.0, 0.5) == 3.5
    for_good = ResourceExhaustedError("RESOURCE_EXHAUSTED", "message larger than max")
    del for_good.metadata["retry_after_s"]
    with pytest.raises(ResourceExhaustedError):
        attempts().wait_s(for_good, 0.0, 0.5)


@pytest.mark.parametrize("error", [InternalError("X", "x"), InvalidArgumentError("X", "x"), closed()])
def test_other_errors_are_final(error):
    with pytest.raises(type(error)):
        attempts().wait_s(error, 0.0, 0.5)


def test_a_stream_that_ends_early_is_tried_again():
    error = ended_early(Progress(gen.Generation(text="a", num_choices=2)))
    assert "2 choices" in error.message
    assert attempts().wait_s(error, 0.0, 0.5) == 0.5


def test_a_failed_address_is_left_once():
    both = endpoints()
    assert both.address() == "a:1"
    both.failed("a:1", DOWN, 0.1)
    both.failed("a:1", DOWN, 0.1)  # another call to it, which failed with it
    assert both.address() == "b:1"
    both.failed("b:1", DOWN, 0.1)
    assert both.address() == "a:1"


def test_metadata_carries_the_key_and_the_name():
    carried = endpoints(api_key="k1", metadata=[("x-team", "red")]).metadata("r1")
    assert carried == (("x-team", "red"), ("authorization", "Bearer k1"), ("x-request-id", "r1"))
    assert name_of_request("mine") == "mine"
    assert len(name_of_request("")) == 32


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: endpoints(()),
        lambda: endpoints(("a:1", "")),
        lambda: endpoints(api_key="sécret\n"),
        lambda: Tls(private_key=b"k"),
        lambda: ChannelOptions(keepalive_s=0),
        lambda: name_of_request("a b"),
        lambda: name_of_request("a" * 129),
    ],
)
def test_wrong_settings_are_refused_before_any_call(wrong):
    with pytest.raises((ConfigError, InvalidArgumentError)) as caught:
        wrong()
    assert "sécret" not in caught.value.message


def test_a_message_with_everything_loses_no_token():
    progress = Progress(gen.Generation(text="a"))
    start = gen.GenerationStart(seed=1, prompt_tokens=2)
    usage = gen.Usage(prompt_tokens=2, completion_tokens=1, cached_prompt_tokens=1)
    assert progress.receive(message(gen.ChoiceDelta(token_ids=[1]), start=start)).HasField("start")
    again = progress.receive(message(gen.ChoiceDelta(token_ids=[2], finish_reason=2), start=start, usage=usage))
    assert again == message(gen.ChoiceDelta(token_ids=[2], finish_reason=2))
    assert progress.finished
    assert progress.receive(message(usage=usage)) is None
    assert progress.last().usage == gen.Usage(prompt_tokens=2, completion_tokens=2, cached_prompt_tokens=1)


def test_tool_calls_are_put_together():
    collector = Collector()
    for delta in (
        gen.ToolCallDelta(index=0, id="c0", name="f", arguments='{"a'),
        gen.ToolCallDelta(index=0, arguments='": 1}'),
        gen.ToolCallDelta(index=1, id="c1", name="g", arguments="{}"),
    ):
        collector.take(message(gen.ChoiceDelta(index=1, text="x", token_ids=[4], tool_calls=[delta])))
    [choice] = collector.answer().choices
    assert (choice.index, choice.text, list(choice.token_ids)) == (1, "xxx", [4, 4, 4])
    assert [(call.id, call.name, call.arguments) for call in choice.tool_calls] == [
        ("c0", "f", '{"a": 1}'),
        ("c1", "g", "{}"),
    ]


def test_best_of_more_than_come_back_cannot_be_streamed():
    assert is_ranked(gen.Generation(best_of=2))
    assert not is_ranked(gen.Generation(best_of=2, num_choices=2))
    assert not is_ranked(gen.Generation(num_choices=2))


def test_the_client_loads_nothing_of_the_server():
    program = "import sys, stageline.client; print(*{name.split('.')[0] for name in sys.modules})"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    loaded = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert not set(loaded.stdout.split()) & {"torch", "ray", "gateway", "stages", "numpy", "tokenizers", "fastapi"}
