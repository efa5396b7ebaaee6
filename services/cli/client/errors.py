"""How a call may end badly."""


class CallError(Exception):
    """A call that did not end with OK. `status` is the name of a grpc.StatusCode; `field` and `retry_after_ms` come
    from the status' details, where it has any."""

    def __init__(self, status: str, message: str, *, field: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(f"{status}: {message}" if message else status)
        self.status = status
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms


class FieldError(ValueError):
    """A value that its field of a request cannot hold. `field` is the field's name in Request."""

    def __init__(self, field: str, why: Exception) -> None:
        super().__init__(f"{field} does not fit its field: {why}")
        self.field = field
        self.why = str(why)
