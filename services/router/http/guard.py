"""The gate on the HTTP door: every path but the health check and the page's own files needs a key."""

from starlette.types import ASGIApp, Receive, Scope, Send

from services.router.gate import PUBLIC, Gate, Key
from services.router.http.errors import problem_of
from services.router.rejections import Rejections
from shared.outcome import RefusedError

OPEN = frozenset({"/", "/health", "/page/page.css", "/page/page.js"})
ADMIN = frozenset({"/metrics", "/cluster"})
COMPLETIONS = frozenset({"/v1/completions", "/v1/chat/completions"})
_KEY = "sluice.key"


class Guard:
    """An ASGI application around another. Paths that are added later are closed too."""

    def __init__(self, app: ASGIApp, gate: Gate, rejections: Rejections) -> None:
        self._app = app
        self._gate = gate
        self._rejections = rejections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in OPEN:
            try:
                scope[_KEY] = self._gate.key_of(header(scope, "authorization"), admin=path in ADMIN)
            except RefusedError as error:
                if path in COMPLETIONS:
                    self._rejections.reject(error.refusal, request_id="", door="http")
                return await _refuse(error, send)
        await self._app(scope, receive, send)


def key_of(scope: Scope) -> Key:
    """Whose call it is."""
    return scope.get(_KEY, PUBLIC)


def header(scope: Scope, name: str) -> str:
    """The first of that name; empty without one."""
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")


async def _refuse(error: RefusedError, send: Send) -> None:
    failure = problem_of(error.refusal)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(failure.body))]
    headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": failure.body, "more_body": False})
