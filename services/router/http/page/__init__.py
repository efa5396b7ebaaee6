"""The page at `/`: a conversation with the model, what each answer took, and the state of the cluster."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.router.admission import Admission
from services.router.fleet import Fleet
from services.router.model import ServedModel
from services.router.peers import Peers
from shared import __version__

KINDS = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    # Its own files and the router's answers; nothing from elsewhere, no frame around it.
    "content-security-policy": "default-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


Endpoint = Callable[[Request], Awaitable[Response]]


def routes(model: ServedModel, fleet: Fleet, admission: Admission, peers: Peers) -> list[Route]:
    """The page's files, and `/cluster`, which it reads every second."""
    made = [Route("/", _file("index.html"), methods=["GET"])]
    made += [Route(f"/page/{name}", _file(name), methods=["GET"]) for name in ("page.css", "page.js")]
    return [*made, Route("/cluster", _cluster(model, fleet, admission, peers), methods=["GET"])]


def _file(name: str) -> Endpoint:
    body = files(__package__).joinpath(name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(body, headers={**HEADERS, "content-type": f"{KINDS[name]}; charset=utf-8"})

    return send


def _cluster(model: ServedModel, fleet: Fleet, admission: Admission, peers: Peers) -> Endpoint:
    """What the router knows of itself and of every worker group."""

    async def tell(request: Request) -> Response:
        groups = [{"scheduler": target, **msgspec.structs.asdict(load)} for target, load in fleet.loads()]
        told = {
            "version": __version__,
            "models": model.names,
            "has_chat_template": model.chat_template is not None,
            "max_model_len": fleet.max_model_len or model.max_model_len,
            "draining": admission.draining,
            "requests_in_flight": len(admission) + await peers.requests_in_flight(),
            "groups": groups,
        }
        return Response(msgspec.json.encode(told), media_type="application/json")

    return tell
