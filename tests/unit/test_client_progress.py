"""Which requests continue a broken stream."""

import pytest

from stageline.client.progress import Progress
from stageline.errors import InternalError
from stageline.inference.v1 import generation_pb2 as pb

START = pb.GenerationStart(request_id="r", model_fingerprint="f", seed=7, prompt_tokens=3)


def begun(**fields) -> Progress:
    progress = Progress(pb.Generation(text="abc", **fields))
    assert progress.begin(START)
    return progress


def test_before_the_start_the_generation_itself_is_asked_for():
    generation = pb.Generation(text="abc", num_choices=2)
    assert Progress(generation).requests() == [generation]


def test_each_unfinished_choice_is_resumed_by_itself():
    progress = begun(num_choices=3)
    progress.take(pb.ChoiceDelta(index=0, token_ids=[5, 6]))
    progress.take(pb.ChoiceDelta(index=1, token_ids=[8], finish_reason=pb.FINISH_REASON_STOP))
    first, last = progress.requests()
    assert first.resume == pb.Resume(token_ids=[5, 6], model_fingerprint="f", seed=7, choice_index=0)
    assert last.resume == pb.Resume(model_fingerprint="f", seed=7, choice_index=2)
    assert not first.HasField("num_choices")
    assert first.text == "abc"
    assert first.request_id == "r"
    assert progress.usage() == pb.Usage(prompt_tokens=3, completion_tokens=3)


def test_prompt_logprobs_are_asked_for_until_they_are_there():
    progress = begun(num_choices=2, output=pb.OutputOptions(num_prompt_logprobs=1, num_logprobs=2))
    progress.take(pb.ChoiceDelta(index=0, token_ids=[5]))
    first, second = progress.requests()
    assert first.output == pb.OutputOptions(num_logprobs=2)
    assert second.output == pb.OutputOptions(num_prompt_logprobs=1, num_logprobs=2)


def test_a_generation_that_was_a_resume_goes_on_from_its_tokens():
    progress = begun(resume=pb.Resume(token_ids=[1], model_fingerprint="f", seed=7, choice_index=4))
    progress.take(pb.ChoiceDelta(index=4, token_ids=[2]))
    assert [list(request.resume.token_ids) for request in progress.requests()] == [[1, 2]]
    assert progress.usage().completion_tokens == 2


@pytest.mark.parametrize("changed", [{"seed": 8}, {"model_fingerprint": "g"}, {"prompt_tokens": 4}])
def test_a_resumed_stream_of_something_else_is_refused(changed):
    progress = begun()
    assert not progress.begin(START)
    other = pb.GenerationStart()
    other.CopyFrom(START)
    for name, value in changed.items():
        setattr(other, name, value)
    with pytest.raises(InternalError, match=next(iter(changed))):
        progress.begin(other)


def test_nothing_follows_the_end_of_a_choice():
    progress = begun()
    progress.take(pb.ChoiceDelta(index=0, finish_reason=pb.FINISH_REASON_LENGTH))
    assert progress.finished
    assert progress.requests() == []
    for index in (0, 1):
        with pytest.raises(InternalError, match="unknown or has ended"):
            progress.take(pb.ChoiceDelta(index=index))
