"""The schedulers behind this router: links, and a live view of what is warm and busy where."""

from services.router.fleet.fleet import Fleet
from services.router.fleet.values import Expected, Release, Sink, Submission, Ticket

__all__ = ["Expected", "Fleet", "Release", "Sink", "Submission", "Ticket"]
