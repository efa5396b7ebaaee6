"""protobuf ⇄ the core's values: the scheduler's only conversions."""

import functools
import re
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from services.scheduler.core.events import Durations, Released, SampleEnded, Tokens
from services.scheduler.core.grammars import Forget, Prepare
from services.scheduler.core.plan import Admission, StepPlan, StepResult
from services.scheduler.core.request import Submission
from services.scheduler.core.worker_group import GroupLoad, GroupSpec
from shared import PROTOCOL_VERSION
from shared.net.options import SPLIT_BYTES
from shared.outcome import AbortCause
from shared.prefix import SHORT_HASH_BYTES
from shared.rpc.sluice.v1 import control_pb2, execution_pb2, scheduling_pb2
from shared.sampling import Sampling, Stopping, TokenLogprobs, Want
from shared.structured import Structured

_CAUSES = {
    scheduling_pb2.ABORT_CAUSE_CLIENT: AbortCause.CLIENT,
    scheduling_pb2.ABORT_CAUSE_STOP_STRING: AbortCause.STOP_STRING,
    scheduling_pb2.ABORT_CAUSE_DEADLINE: AbortCause.DEADLINE,
    scheduling_pb2.ABORT_CAUSE_STALLED: AbortCause.STALLED,
    scheduling_pb2.ABORT_CAUSE_DRAIN: AbortCause.DRAIN,
}

_NOT_NEWER = re.compile(r"is not newer than (\d{1,19})\b")


def unpack_u32(packed: bytes) -> array:
    """uint32 little-endian. Raises ValueError for a length that is not a multiple of 4."""
    values = array("I")
    values.frombytes(packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def pack_u32(values: Iterable[int]) -> bytes:
    return _little(array("I", values)).tobytes()


def _little(values: array) -> array:
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return values


# Router → scheduler.


def submission_of(submit: scheduling_pb2.Submit, token_ids: array, link: int, now_ns: int) -> Submission:
    """`token_ids` are those of all parts; the key is made unique across links."""
    return Submission(
        key=(link, submit.key),
        token_ids=token_ids,
        sampling=_sampling_of(submit.sampling),
        stopping=Stopping(
            max_tokens=submit.max_tokens,
            min_tokens=submit.min_tokens,
            stop_token_ids=_stop_token_ids(submit.stop_token_ids),
            stops_on_text=submit.stops_on_text,
        ),
        want=Want(logprobs=submit.logprobs, prompt_logprobs=submit.prompt_logprobs),
        n=submit.n,
        priority=submit.priority,
        deterministic=submit.deterministic,
        deadline_ns=now_ns + submit.deadline_in_ns if submit.deadline_in_ns else 0,
        salt=submit.salt,
        structured=_structured_of(submit),
        trace=submit.trace,
    )


@functools.lru_cache(maxsize=1024)
def _stop_token_ids(packed: bytes) -> frozenset[int]:
    """Most requests to a model have the same ones: sharing them keeps them in the processor's cache during a step."""
    return frozenset(unpack_u32(packed))


def _structured_of(submit: scheduling_pb2.Submit) -> Structured | None:
    return Structured.of(submit.grammar) if submit.HasField("grammar") else None


def cause_of(abort: scheduling_pb2.LinkAbort) -> AbortCause:
    return _CAUSES.get(abort.cause, AbortCause.CLIENT)


def _sampling_of(message: scheduling_pb2.RowSampling) -> Sampling:
    return Sampling(
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


# Scheduler → router.

PROMPT_LOGPROBS_PER_EVENT = 1024
SchedulerState = scheduling_pb2.SchedulerState
FrameMessage = scheduling_pb2.SchedulerFrame


def state_message(
    identity: execution_pb2.RegisterRequest | None, *, scheduler: str, ready: bool, draining: bool, max_model_len: int
) -> SchedulerState:
    """What routers learn of this scheduler. `identity` is what its workers agree on; `max_model_len` 0 is theirs."""
    return SchedulerState(
        protocol_version=PROTOCOL_VERSION,
        scheduler=scheduler,
        ready=ready,
        draining=draining,
        model_fingerprint=identity.model_fingerprint if identity else "",
        dtype=identity.dtype if identity else "",
        block_size=identity.block_size if identity else 0,
        max_model_len=min(max_model_len or 2**31, identity.max_model_len) if identity else 0,
        vocab_size=identity.vocab_size if identity else 0,
    )


def tokens_messages(event: Tokens) -> Iterator[scheduling_pb2.TokensEvent]:
    """One message, or several where the logprobs of a long prompt come first, in parts."""
    key, prompt = event.key[1], event.prompt_logprobs  # type: ignore[index]
    for start in range(0, len(prompt) - PROMPT_LOGPROBS_PER_EVENT, PROMPT_LOGPROBS_PER_EVENT):
        part = prompt[start : start + PROMPT_LOGPROBS_PER_EVENT]
        yield scheduling_pb2.TokensEvent(key=key, index=event.index, prompt_logprobs=map(_logprobs_message, part))
    rest = len(prompt) % PROMPT_LOGPROBS_PER_EVENT or min(len(prompt), PROMPT_LOGPROBS_PER_EVENT)
    message = scheduling_pb2.TokensEvent(key=key, index=event.index, token_ids=pack_u32(event.token_ids))
    if event.logprobs:
        message.logprobs.extend(map(_logprobs_message, event.logprobs))
    if prompt:
        message.prompt_logprobs.extend(map(_logprobs_message, prompt[len(prompt) - rest :]))
    return (yield message)


PLAIN_TOKEN = struct.Struct("<QII")
"""Key, index, token id."""


class Frame:
    """What a router has yet to be told: grows event by event until its writer takes it."""

    def __init__(self) -> None:
        self._message = scheduling_pb2.SchedulerFrame()
        self.plain: list[bytes] = []
        """Packed by PLAIN_TOKEN. A step has one for each row: a message for each would take ten times as long."""

    def tell_event(self, event: Tokens | SampleEnded | Released) -> None:
        match event:
            case Tokens():
                self._message.tokens.extend(tokens_messages(event))
            case SampleEnded():
                self._message.ends.add(
                    key=event.key[1],  # type: ignore[index]
                    index=event.index,
                    reason=event.reason.value,
                    stop_token_id=event.stop_token_id,
                )
            case Released():
                self._message.released.append(_released_message(event))

    def tell_state(self, state: SchedulerState) -> None:
        self._message.state.CopyFrom(state)

    def tell_loads(self, loads: Iterable[GroupLoad]) -> None:
        """Of all groups that there are now."""
        del self._message.loads.groups[:]
        self._message.loads.SetInParent()
        self._message.loads.groups.extend(scheduling_pb2.LinkLoad(**_load_fields(load)) for load in loads)

    def tell_blocks(self, came: set[bytes], gone: set[bytes]) -> None:
        """Short hashes; the later word on a block is the one that counts."""
        message = self._message
        message.blocks_stored = _without(message.blocks_stored, gone) + b"".join(came)
        message.blocks_removed = _without(message.blocks_removed, came) + b"".join(gone)

    def messages(self) -> Iterator[scheduling_pb2.SchedulerFrame]:
        """The frame in one message or, over SPLIT_BYTES, in several of at most about that size, in order: a sample's
        tokens come before its end, and its end before its request's release."""
        whole = self._message
        whole.plain_tokens = b"".join(self.plain)
        if whole.ByteSize() <= SPLIT_BYTES:
            yield whole
            return
        part, size = scheduling_pb2.SchedulerFrame(), 0
        for message in whole.tokens:
            part.tokens.append(message)
            size += message.ByteSize()
            if size > SPLIT_BYTES:
                yield part
                part, size = scheduling_pb2.SchedulerFrame(), 0
        per_part = SPLIT_BYTES // PLAIN_TOKEN.size
        for start in range(0, len(self.plain) - per_part, per_part):
            part.plain_tokens = b"".join(self.plain[start : start + per_part])
            yield part
            part = scheduling_pb2.SchedulerFrame()
        rest = len(self.plain) % per_part or min(len(self.plain), per_part)
        whole.ClearField("tokens")
        whole.plain_tokens = b"".join(self.plain[len(self.plain) - rest :])
        part.MergeFrom(whole)
        yield part


def _without(packed: bytes, blocks: set[bytes]) -> bytes:
    if not packed or not blocks:
        return packed
    parts = (packed[i : i + SHORT_HASH_BYTES] for i in range(0, len(packed), SHORT_HASH_BYTES))
    return b"".join(part for part in parts if part not in blocks)


def public_load(load: GroupLoad) -> control_pb2.GroupLoad:
    return control_pb2.GroupLoad(**_load_fields(load))


def _load_fields(load: GroupLoad) -> dict[str, Any]:
    return {name: getattr(load, name) for name in load.__struct_fields__}


def _logprobs_message(value: TokenLogprobs) -> scheduling_pb2.TokenLogprobs:
    return scheduling_pb2.TokenLogprobs(
        logprob=value.logprob,
        rank=value.rank,
        top_ids=pack_u32(value.top_ids),
        top_logprobs=_little(array("f", value.top_logprobs)).tobytes(),
    )


def _released_message(event: Released) -> scheduling_pb2.Released:
    refusal = event.refusal
    return scheduling_pb2.Released(
        key=event.key[1],  # type: ignore[index]
        refusal=refusal.name if refusal else "",
        message=refusal.message if refusal else "",
        field=refusal.field if refusal else "",
        retry_after_ms=refusal.retry_after_ms if refusal else 0,
        cached_tokens=event.cached_tokens,
        completion_tokens=event.completion_tokens,
        durations=_durations_message(event.durations),
    )


def _durations_message(durations: Durations) -> scheduling_pb2.PhaseDurations:
    facts = msgspec.structs.asdict(durations)
    segments = [scheduling_pb2.PhaseSegment(**msgspec.structs.asdict(segment)) for segment in facts.pop("segments")]
    return scheduling_pb2.PhaseDurations(**facts, segments=segments)


# Scheduler ⇄ worker.


def group_spec_of(request: execution_pb2.RegisterRequest) -> GroupSpec:
    return GroupSpec(
        id=request.worker,
        num_blocks=request.num_blocks,
        block_size=request.block_size,
        max_num_seqs=request.max_num_seqs,
        max_num_batched_tokens=request.max_num_batched_tokens,
        max_model_len=request.max_model_len,
        windows=tuple(window or None for window in request.windows) or (None,),
    )


def newest_epoch(refusal: str) -> int:
    """The last epoch that a worker began, in its refusal of one that is not newer; 0 in any other message."""
    found = _NOT_NEWER.search(refusal)
    return int(found[1]) if found else 0


def grammar_message(command: Prepare | Forget) -> execution_pb2.ExecuteRequest:
    match command:
        case Prepare():
            grammar = scheduling_pb2.Grammar(**msgspec.structs.asdict(command.structured))
            return execution_pb2.ExecuteRequest(prepare=execution_pb2.Prepare(id=command.id, grammar=grammar))
        case Forget():
            return execution_pb2.ExecuteRequest(forget=execution_pb2.Forget(id=command.id))


def plan_message(plan: StepPlan) -> execution_pb2.ExecuteRequest:
    return execution_pb2.ExecuteRequest(
        plan=execution_pb2.StepPlan(
            step=plan.step,
            exact=plan.exact,
            admits=map(_admit_message, plan.admissions),
            slots=_little(plan.slots).tobytes(),
            counts=_little(plan.counts).tobytes(),
            block_counts=_little(plan.block_counts).tobytes(),
            samples=plan.samples,
            blocks=_little(plan.blocks).tobytes(),
        )
    )


def _admit_message(admission: Admission) -> execution_pb2.Admit:
    sampling = admission.sampling
    row_sampling = scheduling_pb2.RowSampling(
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
    return execution_pb2.Admit(
        slot=admission.slot,
        token_ids=admission.token_ids,
        prompt_len=admission.prompt_len,
        computed=admission.computed,
        tables=[execution_pb2.BlockTable(first=first, blocks=pack_u32(blocks)) for first, blocks in admission.tables],
        sample_index=admission.sample_index,
        sampling=row_sampling,
        min_tokens=admission.min_tokens,
        stop_token_ids=pack_u32(sorted(admission.stop_token_ids)),
        logprobs=admission.logprobs,
        prompt_logprobs=admission.prompt_logprobs,
        trace=admission.trace,
        grammar=admission.grammar,
    )


def result_of(message: execution_pb2.StepResult) -> StepResult:
    return StepResult(
        step=message.step,
        tokens=unpack_u32(message.tokens),
        logprobs={row.row: _logprobs_of(row.logprobs) for row in message.logprobs},
        prompt_logprobs={
            row.row: (row.start, tuple(map(_logprobs_of, row.logprobs))) for row in message.prompt_logprobs
        },
        wait_ns=message.wait_ns,
        run_ns=message.run_ns,
        error=message.error,
        grammar_errors={row.row: row.message for row in message.grammar_errors},
    )


def _logprobs_of(message: scheduling_pb2.TokenLogprobs) -> TokenLogprobs:
    floats = array("f")
    floats.frombytes(message.top_logprobs)
    if sys.byteorder == "big":
        floats.byteswap()
    return TokenLogprobs(message.logprob, message.rank, tuple(unpack_u32(message.top_ids)), tuple(floats))
