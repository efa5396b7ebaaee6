"""scheduling.proto ⇄ values."""

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from services.router.fleet.values import (
    Durations,
    Load,
    Release,
    Segment,
    State,
    Submission,
)
from shared import PROTOCOL_VERSION
from shared.net.options import SPLIT_BYTES
from shared.outcome import REFUSALS, AbortCause, Refusal
from shared.rpc.sluice.v1 import scheduling_pb2 as pb
from shared.sampling import TokenLogprobs
from shared.structured import Structured

CAUSES = {
    AbortCause.CLIENT: pb.ABORT_CAUSE_CLIENT,
    AbortCause.STOP_STRING: pb.ABORT_CAUSE_STOP_STRING,
    AbortCause.DEADLINE: pb.ABORT_CAUSE_DEADLINE,
    AbortCause.STALLED: pb.ABORT_CAUSE_STALLED,
    AbortCause.DRAIN: pb.ABORT_CAUSE_DRAIN,
}


def hello_frame(router: str) -> pb.RouterFrame:
    return pb.RouterFrame(hello=pb.LinkHello(protocol_version=PROTOCOL_VERSION, router=router))


def submit_parts(key: int, submission: Submission) -> list[pb.Submit]:
    """The request, cut where its token ids exceed one message."""
    packed = struct.pack(f"<{len(submission.token_ids)}I", *submission.token_ids)
    chunks = [packed[i : i + SPLIT_BYTES] for i in range(0, len(packed), SPLIT_BYTES)]
    stops = sorted(submission.stopping.stop_token_ids)
    first = pb.Submit(
        key=key,
        token_ids=chunks[0],
        request_id=submission.request_id,
        sampling=_row_sampling(submission),
        n=submission.n,
        max_tokens=submission.stopping.max_tokens,
        min_tokens=submission.stopping.min_tokens,
        stop_token_ids=struct.pack(f"<{len(stops)}I", *stops),
        priority=submission.priority,
        deterministic=submission.deterministic,
        logprobs=submission.want.logprobs,
        prompt_logprobs=submission.want.prompt_logprobs,
        deadline_in_ns=submission.deadline_in_ns,
        salt=submission.salt,
        trace=submission.trace,
        stops_on_text=submission.stopping.stops_on_text,
        grammar=_grammar(submission.structured),
    )
    parts = [first, *(pb.Submit(key=key, token_ids=chunk) for chunk in chunks[1:])]
    for part in parts[:-1]:
        part.more = True
    return parts


def _grammar(structured: Structured | None) -> pb.Grammar | None:
    return None if structured is None else pb.Grammar(**msgspec.structs.asdict(structured))


def _row_sampling(submission: Submission) -> pb.RowSampling:
    sampling = submission.sampling
    return pb.RowSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )


def pack_frames(submits: list[pb.Submit], aborts: dict[tuple[int, int], AbortCause]) -> Iterator[pb.RouterFrame]:
    """As few frames as the size limit allows; submits first, so that an abort never overtakes its submit."""
    frame, size = pb.RouterFrame(), 0
    for submit in submits:
        bytes_ = submit.ByteSize()
        if size and size + bytes_ > SPLIT_BYTES:
            yield frame
            frame, size = pb.RouterFrame(), 0
        frame.submits.append(submit)
        size += bytes_
    for (key, index), cause in aborts.items():
        frame.aborts.append(pb.LinkAbort(key=key, index=index, cause=CAUSES[cause]))
    if frame.submits or frame.aborts:
        yield frame


PLAIN_TOKEN = struct.Struct("<QII")
"""Key, index and token id of one of a frame's `plain_tokens`."""


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def logprobs_of(messages: Any) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            one.logprob,
            one.rank,
            unpack_ids(one.top_ids),
            struct.unpack(f"<{len(one.top_logprobs) // 4}f", one.top_logprobs),
        )
        for one in messages
    )


def state_of(message: pb.SchedulerState) -> State:
    return State(
        protocol_version=message.protocol_version,
        scheduler=message.scheduler,
        ready=message.ready,
        draining=message.draining,
        model_fingerprint=message.model_fingerprint,
        dtype=message.dtype,
        block_size=message.block_size,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
    )


def load_of(message: pb.LinkLoad) -> Load:
    return Load(
        group=message.group,
        requests_running=message.requests_running,
        requests_waiting=message.requests_waiting,
        kv_blocks_total=message.kv_blocks_total,
        kv_blocks_free=message.kv_blocks_free,
        kv_blocks_cached=message.kv_blocks_cached,
        kv_blocks_referenced=message.kv_blocks_referenced,
        waiting_by_reason=dict(message.waiting_by_reason),
    )


def release_of(message: pb.Released) -> Release:
    """A refusal of a name that this version does not know is internal: the table is the contract."""
    refusal = None
    if message.refusal:
        name = message.refusal if message.refusal in REFUSALS else "internal"
        refusal = Refusal(
            name=name,
            message=message.message or name,
            field=message.field,
            retry_after_ms=message.retry_after_ms,
        )
    return Release(
        refusal=refusal,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
        durations=_durations_of(message.durations),
    )


def _durations_of(message: pb.PhaseDurations) -> Durations:
    return Durations(
        total_ns=message.total_ns,
        queue_ns=message.queue_ns,
        prefill_ns=message.prefill_ns,
        decode_ns=message.decode_ns,
        preemptions=message.preemptions,
        queue_reason_ns=dict(message.queue_reason_ns),
        segments=tuple(
            Segment(
                phase=segment.phase,
                ns=segment.ns,
                steps=segment.steps,
                rows=segment.rows,
                device_ns=segment.device_ns,
                chunks=segment.chunks,
                computed_tokens=segment.computed_tokens,
                cached_tokens=segment.cached_tokens,
                sampled_tokens=segment.sampled_tokens,
                preemptions=segment.preemptions,
                reason_ns=dict(segment.reason_ns),
            )
            for segment in message.segments
        ),
    )
