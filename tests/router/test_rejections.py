"""Refused requests leave a line in the log, but not in floods, and never what they said."""

import grpc
import pytest
import structlog

from services.router.metrics import RouterMetrics
from services.router.rejections import MOST_A_SECOND, Rejections
from shared.clock import NS_PER_S
from shared.outcome import Refusal
from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import run, running_router

SECRET = "zyxwcanary"


def lines(logs):
    return [line for line in logs if line["event"] == "request"]


def test_a_flood_is_told_of_in_a_few_lines_and_a_number():
    now = [0]
    rejections = Rejections(RouterMetrics(), lambda: now[0])
    with structlog.testing.capture_logs() as logs:
        for number in range(1000):
            rejections.tell("queue_full", request_id=str(number), door="grpc")
        now[0] += NS_PER_S
        rejections.tell("queue_full", request_id="last", door="grpc")
    told = lines(logs)
    assert len(told) == MOST_A_SECOND + 1
    assert told[-1]["request_id"] == "last"
    assert told[-1]["more_untold"] == 1000 - MOST_A_SECOND


def test_what_a_door_refuses_is_counted_and_told_without_its_message():
    metrics = RouterMetrics()
    rejections = Rejections(metrics, lambda: 0)
    with structlog.testing.capture_logs() as logs:
        rejections.reject(
            Refusal(name="invalid_argument", message=SECRET, field="sampling.top_p"), request_id="a", door="http"
        )
    assert metrics._rejections["invalid_argument"] == 1
    [line] = lines(logs)
    assert (line["end"], line["field"], line["door"]) == ("invalid_argument", "sampling.top_p", "http")
    assert SECRET not in str(line)


def test_each_refused_call_leaves_a_line(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(max_model_len=4)) as router:
            for message in (
                pb.GenerateRequest(request_id="bad", prompt=SECRET, sampling=pb.Sampling(temperature=-1)),
                pb.GenerateRequest(request_id=f"{SECRET} {SECRET}", prompt="x"),
                pb.GenerateRequest(request_id="long", prompt=f"{SECRET} " * 8),
                pb.GenerateRequest(request_id="regex", prompt="x", structured=pb.Structured(regex=f"({SECRET}")),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await router.generate(message)
            await router.idle()

    with structlog.testing.capture_logs() as logs:
        run(test())
    told = [(line["request_id"], line["end"], line.get("field", "")) for line in lines(logs)]
    assert ("bad", "invalid_argument", "sampling.temperature") in told
    assert ("", "invalid_argument", "request_id") in told
    assert ("regex", "invalid_argument", "structured.regex") in told
    assert [end for request_id, end, _ in told if request_id == "long"] == ["prompt_too_long"]
    assert SECRET not in str(logs)
