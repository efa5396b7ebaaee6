"""The router's ordinary path, through the real gRPC door, in front of a fake scheduler."""

from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import ends, ids, run, running_router, texts


def test_a_prompt_is_answered_with_accepted_deltas_and_one_finished(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            request = pb.GenerateRequest(prompt="the quick fox", stopping=pb.Stopping(max_tokens=8))
            request.response.include_timing = True
            responses = await router.generate(request)
            prompt = tokenizer.encode("the quick fox")
            assert responses[0].accepted.prompt_tokens == len(prompt)
            assert responses[0].accepted.request_id.startswith("req-")
            assert len(ids(responses)) == 8
            assert texts(responses)[0] == tokenizer.decode(ids(responses))
            (finished,) = ends(responses)
            assert finished.reason == pb.FINISH_REASON_LENGTH
            assert finished.usage == pb.Usage(prompt_tokens=len(prompt), completion_tokens=8, cached_tokens=3)
            assert finished.timing.total_ns > 0
            assert scheduler.requests[0].token_ids == prompt

    run(test())
