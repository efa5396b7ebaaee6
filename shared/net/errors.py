"""Refusals and failures on the wire: one table, one guard around every handler, never exception text."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from shared.ids import new_error_id
from shared.outcome import Refusal, RefusedError

log = structlog.get_logger("net")

Context = grpc.aio.ServicerContext


def rich_status(refusal: Refusal) -> grpc.Status:
    """The refusal as a status with google.rpc details: BadRequest where a field is named, RetryInfo where it may
    help to try again."""
    status = status_pb2.Status(code=code_pb2.Code.Value(refusal.kind.grpc_status), message=refusal.message)
    if refusal.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=refusal.field, description=refusal.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if refusal.retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(refusal.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)


async def abort_with(context: Context, refusal: Refusal) -> NoReturn:
    """Ends the call with the refusal's status, behind the trailing metadata that the handler has set."""
    status = rich_status(refusal)
    trailing = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
    await context.abort(status.code, status.details, trailing)


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler: a refusal becomes its status, a cancellation becomes CANCELLED (one that escapes would
    send nothing: the client would wait for ever), a malformed message becomes INVALID_ARGUMENT, and anything else
    becomes INTERNAL with an id that the log also carries."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}
        """By method: its handler and that one guarded."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return None
        known, guarded = self._known.get(method, (None, None))
        if guarded is None or known is not handler:
            guarded = _guarded(handler, method)
            self._known[method] = handler, guarded
        return guarded


def _guarded(handler: Any, method: str) -> grpc.RpcMethodHandler:
    if handler.request_streaming:
        behavior, parse = (handler.stream_stream or handler.stream_unary), None
    else:
        behavior, parse = (handler.unary_stream or handler.unary_unary), handler.request_deserializer
    guard: Any = _guard_stream if inspect.isasyncgenfunction(behavior) else _guard_call
    wrapped = guard(behavior, parse, method)
    if handler.response_streaming:
        make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else _unary_stream
    else:
        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else _unary_unary
    deserializer = handler.request_deserializer if handler.request_streaming else None
    return make(wrapped, request_deserializer=deserializer, response_serializer=handler.response_serializer)


_unary_stream = grpc.unary_stream_rpc_method_handler
_unary_unary = grpc.unary_unary_rpc_method_handler

Parse = Callable[[bytes], Any] | None


def _guard_call(behavior: Any, parse: Parse, method: str) -> Callable[[Any, Context], Awaitable[Any]]:
    """Of one that returns its response, or writes its responses through the context."""

    async def handle(request: Any, context: Context) -> Any:
        try:
            return await behavior(_parsed(request, parse), context)
        except BaseException as error:
            await _end(error, context, method)

    return handle


def _guard_stream(behavior: Any, parse: Parse, method: str) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            responses = behavior(_parsed(request, parse), context)
            try:
                async for response in responses:
                    yield response
            finally:
                await responses.aclose()
        except GeneratorExit:
            raise  # the client went while a write was blocked: the handler's own finally has run
        except BaseException as error:
            await _end(error, context, method)

    return handle


def _parsed(request: Any, parse: Parse) -> Any:
    if parse is None:
        return request
    try:
        return parse(request)
    except DecodeError:
        raise RefusedError(
            Refusal(name="invalid_argument", message="the request is not a valid protobuf message of this method")
        ) from None


async def _end(error: BaseException, context: Context, method: str) -> NoReturn:
    if isinstance(error, RefusedError):
        await abort_with(context, error.refusal)
    if isinstance(error, asyncio.CancelledError):
        await context.abort(grpc.StatusCode.CANCELLED, "the call was cancelled")
    if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
        raise error
    error_id = new_error_id()
    log.error("handler_failed", method=method, error_id=error_id, exc_info=error)
    await abort_with(context, Refusal(name="internal", message=f"internal error {error_id}; the server's log has it"))
