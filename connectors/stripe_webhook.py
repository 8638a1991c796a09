"""Stripe's webhooks → signed commands: verified, then in the log under the event's own id, so that a repeat changes nothing.

An event about a customer belongs to the account that the customer is bound to. One about no customer, such as an error
report of a meter, is everybody's. One about a customer that no account is bound to is none of ours.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import stripe
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tollway.connectors.cloudevents import parse
from tollway.connectors.errors import Unavailable
from tollway.schemas.command import TEXT_MAX, body_text
from tollway.schemas.topics import BROADCAST
from tollway.schemas.usage import FieldError

PATH = "/v1/webhooks/stripe"
TOLERANCE_S = 300
"""A signature older than this is refused: a copied delivery cannot be sent again later."""
OBJECT_BYTES_MAX = 32 << 10
"""A larger object stays at Stripe, where its id finds it; the command then carries null."""

log = logging.getLogger(__name__)

Send = Callable[[str, str, dict[str, Any], str], Awaitable[dict[int, int]]]
"""account, kind, body, command id → partition → offset of the signed command. Raises Unavailable."""
AccountOf = Callable[[str], Awaitable[str | None]]
"""Customer → account, None where no account is bound to it. Raises Unavailable."""


class StripeWebhook:
    """Handles one delivery: 200 once it is in the log or is none of ours, 400 for a bad signature, 503 to be sent again."""

    def __init__(self, secret: str, send: Send, account_of: AccountOf) -> None:
        self._secret, self._send, self._account_of = secret, send, account_of

    async def __call__(self, body: bytes, request: Request) -> Response:
        try:
            text = body.decode()
            stripe.WebhookSignature.verify_header(
                text, request.headers.get("stripe-signature", ""), self._secret, TOLERANCE_S
            )
            event = event_of(parse(body))
        except (stripe.SignatureVerificationError, UnicodeDecodeError) as error:
            return _problem(400, "bad_signature", f"The delivery is not signed with this endpoint's secret: {error}")
        except FieldError as error:
            return _problem(400, error.reason, str(error))
        try:
            return await self._append(event)
        except Unavailable as error:
            return _problem(503, "unavailable", str(error))

    async def _append(self, event: dict[str, Any]) -> Response:
        customer = event["customer"]
        account = await self._account_of(customer) if customer else BROADCAST
        if account is None:
            log.info("webhook %s: customer %s is bound to no account", event["event_id"], customer)
            return JSONResponse({"status": "ignored", "detail": f"customer {customer} is bound to no account"})
        where = await self._send(account, "rail.event", event, f"stripe-{event['event_id']}")
        return JSONResponse({"status": "recorded", "account": account, "partitions": len(where)})


def event_of(found: Any) -> dict[str, Any]:
    """The body of `rail.event` from a verified delivery. Raises FieldError where it is no event of Stripe's."""
    data = found.get("data") if isinstance(found, dict) else None
    if not isinstance(data, dict):
        raise FieldError(
            "data", data, "bad_event", "give an event of Stripe's: an object with id, type, created and data"
        )
    for name in ("id", "type"):
        if not isinstance(found.get(name), str) or not 1 <= len(found[name]) <= TEXT_MAX:
            raise FieldError(name, found.get(name), "bad_event", f"give a text of 1 to {TEXT_MAX} characters")
    created = found.get("created")
    if not isinstance(created, int) or isinstance(created, bool) or not 0 <= created < 2**40:
        raise FieldError("created", created, "bad_event", "give seconds since 1970")
    about = data.get("object")
    if not isinstance(about, dict):
        about = {}
    customer = about.get("id") if about.get("object") == "customer" else about.get("customer")
    object_id = about.get("id")
    return {
        "rail": "stripe",
        "event_id": found["id"],
        "type": found["type"],
        "created_s": created,
        "customer": customer if isinstance(customer, str) and customer else None,
        "object_id": object_id if isinstance(object_id, str) and object_id else None,
        "object": about if len(body_text(about)) <= OBJECT_BYTES_MAX else None,
    }


def _problem(status: int, reason: str, detail: str) -> Response:
    problem = {"type": "about:blank", "title": reason, "status": status, "detail": detail}
    return JSONResponse(problem, status, media_type="application/problem+json")
