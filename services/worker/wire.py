"""Protobuf ⇄ values for the worker: the only place that knows both."""

from collections.abc import Mapping

import grpc
import numpy as np
from llguidance import LLMatcher

from services.worker.identity import Lease, WorkerIdentity
from services.worker.plan import Admit, BlockTable, RowLogprobs, RowPromptLogprobs, StepPlan, StepResult
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2
from shared.rpc.sluice.v1.execution_pb2_grpc import RegistryStub
from shared.sampling import Sampling


class WireError(Exception):
    """A message that is valid protobuf and yet makes no sense: arrays of different lengths, bytes cut short."""


Grammars = Mapping[int, LLMatcher | None]
"""Those that were prepared, by id."""


def plan_from_message(message: pb.StepPlan, grammars: Grammars) -> StepPlan:
    """Raises WireError where the packed arrays do not fit each other, or a grammar is not there."""
    slots = _unpack(message.slots, "<u2", np.int64, "slots")
    plan = StepPlan(
        step=message.step,
        exact=message.exact,
        admits=tuple(_admit(admit, grammars) for admit in message.admits),
        slots=slots,
        counts=_unpack(message.counts, "<u2", np.int64, "counts"),
        block_counts=_unpack(message.block_counts, "<u2", np.int64, "block_counts"),
        samples=_unpack(message.samples, "<u1", np.bool_, "samples"),
        blocks=_unpack(message.blocks, "<u4", np.int32, "blocks"),
    )
    rows = len(slots)
    if not rows == len(plan.counts) == len(plan.samples):
        raise WireError(f"step {plan.step}: slots, counts and samples differ in length")
    if len(plan.block_counts) % rows if rows else len(plan.block_counts):
        raise WireError(f"step {plan.step}: {len(plan.block_counts)} block_counts for {rows} rows")
    if int(plan.block_counts.sum()) != len(plan.blocks):
        raise WireError(f"step {plan.step}: block_counts do not add up to the {len(plan.blocks)} blocks sent")
    return plan


def _admit(message: pb.Admit, grammars: Grammars) -> Admit:
    grammar = grammars.get(message.grammar) if message.grammar else None
    if message.grammar and grammar is None:
        raise WireError(f"slot {message.slot} names grammar {message.grammar}, which is not prepared")
    return Admit(
        slot=message.slot,
        token_ids=_unpack(message.token_ids, "<u4", np.int32, "token_ids"),
        prompt_len=message.prompt_len,
        computed=message.computed,
        tables=tuple(
            BlockTable(table.first, _unpack(table.blocks, "<u4", np.int32, "blocks")) for table in message.tables
        ),
        sample_index=message.sample_index,
        sampling=_sampling(message.sampling),
        min_tokens=message.min_tokens,
        stop_token_ids=_unpack(message.stop_token_ids, "<u4", np.int64, "stop_token_ids"),
        logprobs=message.logprobs,
        prompt_logprobs=message.prompt_logprobs,
        trace=message.trace,
        grammar=grammar,
    )


def prepared_reply(grammar_id: int, error: str) -> pb.ExecuteReply:
    return pb.ExecuteReply(prepared=pb.Prepared(id=grammar_id, error=error))


def _sampling(message: scheduling_pb2.RowSampling) -> Sampling:
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


def _unpack(packed: bytes, wire_type: str, kind: type[np.generic], name: str) -> np.ndarray:
    item_bytes = np.dtype(wire_type).itemsize
    if len(packed) % item_bytes:
        raise WireError(f"{name}: {len(packed)} bytes are not a multiple of {item_bytes}")
    return np.frombuffer(packed, wire_type).astype(kind)


def result_to_reply(result: StepResult) -> pb.ExecuteReply:
    """One StepResult as the message that carries it."""
    output = result.output
    return pb.ExecuteReply(
        result=pb.StepResult(
            step=result.step,
            tokens=output.tokens.astype("<u4").tobytes(),
            logprobs=[_row_logprobs(entry) for entry in output.logprobs],
            prompt_logprobs=[_row_prompt_logprobs(entry) for entry in output.prompt_logprobs],
            wait_ns=result.wait_ns,
            run_ns=result.run_ns,
            error=result.error,
            grammar_errors=[pb.GrammarError(row=row, message=told) for row, told in output.grammar_errors],
        )
    )


def ready_reply(epoch: int) -> pb.ExecuteReply:
    return pb.ExecuteReply(ready=pb.ExecuteReady(epoch=epoch))


def _row_logprobs(entry: RowLogprobs) -> pb.RowLogprobs:
    return pb.RowLogprobs(
        row=entry.row, logprobs=_token_logprobs(entry.logprob, entry.rank, entry.top_ids, entry.top_logprobs)
    )


def _row_prompt_logprobs(entry: RowPromptLogprobs) -> pb.RowPromptLogprobs:
    columns = zip(entry.logprobs.tolist(), entry.ranks.tolist(), entry.top_ids, entry.top_logprobs, strict=True)
    return pb.RowPromptLogprobs(row=entry.row, start=entry.start, logprobs=[_token_logprobs(*each) for each in columns])


def _token_logprobs(
    logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray
) -> scheduling_pb2.TokenLogprobs:
    return scheduling_pb2.TokenLogprobs(
        logprob=logprob,
        rank=rank,
        top_ids=top_ids.astype("<u4").tobytes(),
        top_logprobs=top_logprobs.astype("<f4").tobytes(),
    )


class RegistryClient:
    """The scheduler's Registry, called with values. Raises grpc.aio.AioRpcError."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._stub = RegistryStub(channel)
        self._metadata = metadata

    async def register(self, identity: WorkerIdentity, timeout_s: float) -> Lease:
        fields = {name: getattr(identity, name) for name in identity.__struct_fields__}
        response = await self._stub.Register(
            pb.RegisterRequest(**fields), timeout=timeout_s, metadata=self._metadata, wait_for_ready=False
        )
        return Lease(id=response.lease, ttl_ms=response.ttl_ms)

    async def renew(self, lease: Lease, progress: int, timeout_s: float) -> None:
        await self._stub.Renew(
            pb.RenewRequest(lease=lease.id, progress=progress), timeout=timeout_s, metadata=self._metadata
        )
