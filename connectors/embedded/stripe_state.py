"""What the Stripe stand-in knows and refuses: a fold of its journal. Rules: Stripe's documentation of meters and meter events."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DAY_S = 86_400
IDENTIFIER_LIFE_S = DAY_S
"""Stripe says "at least 24 hours"; the stand-in forgets at once after that: the worst case."""
PAST_S, FUTURE_S = 35 * DAY_S, 300
DIGITS_MAX = 15
NAME_MAX = 100
CANCEL_WITHIN_S = DAY_S
IDEMPOTENCY_LIFE_S = DAY_S
REPLIES_MAX = 100_000
"""Most answers kept for their idempotency keys; the oldest goes first."""
RANGE_MAX_S = 400 * DAY_S
"""Longest range of summaries that one request may ask for."""
DUPLICATE = "An event already exists with identifier"
PAGE_DEFAULT, PAGE_MAX = 10, 100
SAMPLES_MAX = 10_000
"""Most error reports kept; the oldest goes first, as Stripe lists only samples."""

Entry = dict[str, Any]
Params = Mapping[str, Any]


class ApiError(Exception):
    """A refusal as Stripe words it: HTTP status and the `error` object."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str = "", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        named = {"type": kind, "message": message, "code": code, "param": param}
        self.body = {"error": {name: value for name, value in named.items() if value}}


class StripeState:
    """Meters, customers, meter events. Each request is judged first, then becomes journal entries, then is applied.

    `judge` methods return (journal entry, answer) and change nothing; `apply` takes an entry in, live or at a restart.
    Times are whole seconds of the stand-in's own clock.
    """

    def __init__(self) -> None:
        self.meters: dict[str, Entry] = {}
        self.customers: dict[str, Entry] = {}
        self.events: list[Entry] = []
        self.errors: list[Entry] = []
        self.replies: dict[str, Entry] = {}
        self._accepted_at: dict[str, int] = {}
        self._hours: dict[tuple[str, str, int], list[Entry]] = defaultdict(list)
        self._by_identifier: dict[str, Entry] = {}

    def apply(self, entry: Entry) -> None:
        """Take one journal entry in."""
        _APPLY[entry["kind"]](self, entry)

    # Meter events

    def judge_event(self, params: Params, now_s: int, fresh_id: str) -> tuple[Entry, Entry]:
        """POST /v1/billing/meter_events."""
        event_name = _text(params, "event_name", NAME_MAX)
        payload = params.get("payload")
        if not isinstance(payload, dict):
            raise ApiError(400, "Missing required param: payload.", code="parameter_missing", param="payload")
        identifier = _text(params, "identifier", NAME_MAX) if "identifier" in params else fresh_id
        at_s = _whole(params, "timestamp", now_s)
        if at_s < now_s - PAST_S:
            raise ApiError(400, "The timestamp must be within the past 35 calendar days.", param="timestamp")
        if at_s > now_s + FUTURE_S:
            raise ApiError(400, "The timestamp must not be more than 5 minutes in the future.", param="timestamp")
        meter = self._active_meter(event_name)
        customer_key, value_key = _keys(meter)
        value = _value(payload, value_key)
        customer = payload.get(customer_key)
        if not customer:
            raise ApiError(400, f"The payload needs the key {customer_key}.", param=f"payload[{customer_key}]")
        accepted_at = self._accepted_at.get(identifier)
        if accepted_at is not None and now_s - accepted_at < IDENTIFIER_LIFE_S:
            raise ApiError(400, f"{DUPLICATE} {identifier}.", param="identifier")
        error = "no_meter" if meter is None else "" if customer in self.customers else "meter_event_customer_not_found"
        entry = {
            "kind": "event",
            "identifier": identifier,
            "event_name": event_name,
            "customer": customer,
            "value": value,
            "timestamp": at_s,
            "received_at": now_s,
            "payload": payload,
            "meter": meter["id"] if meter else None,
            "error": error,
            "cancelled": False,
        }
        answer = {
            "object": "billing.meter_event",
            "created": now_s,
            "event_name": event_name,
            "identifier": identifier,
            "livemode": False,
            "payload": payload,
            "timestamp": at_s,
        }
        return entry, answer

    def judge_cancel(self, params: Params, now_s: int) -> tuple[Entry, Entry]:
        """POST /v1/billing/meter_event_adjustments: one event, within 24 h of its receipt."""
        event_name = _text(params, "event_name", NAME_MAX)
        if params.get("type") != "cancel":
            raise ApiError(400, "Invalid type: must be one of cancel", param="type")
        cancel = params.get("cancel")
        identifier = _text(cancel if isinstance(cancel, dict) else {}, "identifier", NAME_MAX)
        event = self._by_identifier.get(identifier)
        if event is None or event["event_name"] != event_name:
            raise ApiError(404, f"No meter event with identifier {identifier}.", code="resource_missing")
        if now_s - event["received_at"] > CANCEL_WITHIN_S:
            raise ApiError(400, "You can only cancel events within 24 hours of Stripe receiving them.")
        return {"kind": "cancel", "identifier": identifier}, {
            "object": "billing.meter_event_adjustment",
            "cancel": {"identifier": identifier},
            "event_name": event_name,
            "livemode": False,
            "status": "complete",
            "type": "cancel",
        }

    def _apply_event(self, entry: Entry) -> None:
        self.events.append(entry)
        self._accepted_at[entry["identifier"]] = entry["received_at"]
        self._by_identifier[entry["identifier"]] = entry
        if entry["error"]:
            self.errors.append({name: entry[name] for name in ("error", "identifier", "event_name", "received_at")})
            del self.errors[:-SAMPLES_MAX]
        else:
            hour_s = entry["timestamp"] // 3600 * 3600
            self._hours[entry["meter"], entry["customer"], hour_s].append(entry)

    def _apply_cancel(self, entry: Entry) -> None:
        self._by_identifier[entry["identifier"]]["cancelled"] = True

    # Summaries

    def summaries(self, meter_id: str, params: Params, now_s: int, delay_s: int) -> list[Entry]:
        """Event summaries of a meter and customer, newest first; events of the last `delay_s` are not in them yet."""
        meter = self.meter(meter_id)
        customer = _text(params, "customer", NAME_MAX)
        start_s, end_s = _whole(params, "start_time"), _whole(params, "end_time")
        window = params.get("value_grouping_window")
        if window not in (None, "hour", "day"):
            raise ApiError(
                400, "Invalid value_grouping_window: must be one of hour or day", param="value_grouping_window"
            )
        grid_s = {None: 60, "hour": 3600, "day": DAY_S}[window]
        for name, at_s in (("start_time", start_s), ("end_time", end_s)):
            if at_s % grid_s:
                raise ApiError(400, f"{name} must be aligned with {window or 'minute'} boundaries.", param=name)
        if not start_s < end_s <= start_s + RANGE_MAX_S:
            message = f"end_time must be after start_time, and at most {RANGE_MAX_S // DAY_S} days after it."
            raise ApiError(400, message, param="end_time")
        step_s = grid_s if window else end_s - start_s
        found = []
        for first_s in range(start_s, end_s, step_s):
            seen = [
                event
                for hour_s in range(first_s // 3600 * 3600, first_s + step_s, 3600)
                for event in self._hours.get((meter_id, customer, hour_s), ())
                if first_s <= event["timestamp"] < first_s + step_s
                and event["received_at"] + delay_s <= now_s
                and not event["cancelled"]
            ]
            if seen or not window:
                found.append(_summary(meter, customer, first_s, first_s + step_s, aggregate(meter, seen)))
        return found[::-1]

    # Meters and customers

    def judge_meter(self, params: Params, now_s: int, fresh_id: str) -> tuple[Entry, Entry]:
        """POST /v1/billing/meters."""
        event_name = _text(params, "event_name", NAME_MAX)
        if self._active_meter(event_name):
            message = f"There is already an active meter with the event name {event_name}."
            raise ApiError(400, message, param="event_name")
        aggregation = params.get("default_aggregation")
        formula = aggregation.get("formula") if isinstance(aggregation, dict) else None
        if formula not in ("sum", "count", "last"):
            message = "Invalid default_aggregation[formula]: must be one of count, last, or sum"
            raise ApiError(400, message, param="default_aggregation[formula]")
        window = params.get("event_time_window")
        if window not in (None, "hour", "day"):
            raise ApiError(400, "Invalid event_time_window: must be one of day or hour", param="event_time_window")
        customer = params.get("customer_mapping") or {"event_payload_key": "stripe_customer_id", "type": "by_id"}
        meter = {
            "id": fresh_id,
            "object": "billing.meter",
            "created": now_s,
            "customer_mapping": dict(customer),
            "default_aggregation": {"formula": formula},
            "display_name": _text(params, "display_name", 250),
            "event_name": event_name,
            "event_time_window": window,
            "livemode": False,
            "status": "active",
            "status_transitions": {"deactivated_at": None},
            "updated": now_s,
            "value_settings": dict(params.get("value_settings") or {"event_payload_key": "value"}),
        }
        return {"kind": "meter", "object": meter}, meter

    def judge_meter_change(self, meter_id: str, change: str, params: Params, now_s: int) -> tuple[Entry, Entry]:
        """POST /v1/billing/meters/:id, …/deactivate, …/reactivate: only name and status ever change."""
        meter = {**self.meter(meter_id), "updated": now_s}
        if change == "update":
            meter["display_name"] = _text(params, "display_name", 250)
        else:
            meter["status"] = "inactive" if change == "deactivate" else "active"
            meter["status_transitions"] = {"deactivated_at": now_s if change == "deactivate" else None}
            if change == "reactivate" and self._active_meter(meter["event_name"]):
                raise ApiError(400, f"There is already an active meter with the event name {meter['event_name']}.")
        return {"kind": "meter", "object": meter}, meter

    def judge_customer(self, params: Params, now_s: int, fresh_id: str) -> tuple[Entry, Entry]:
        """POST /v1/customers."""
        customer = {
            "id": fresh_id,
            "object": "customer",
            "created": now_s,
            "description": params.get("description"),
            "email": params.get("email"),
            "livemode": False,
            "metadata": dict(params.get("metadata") or {}),
            "name": params.get("name"),
        }
        return {"kind": "customer", "object": customer}, customer

    def meter(self, meter_id: str) -> Entry:
        """One meter. Raises ApiError 404."""
        if meter_id not in self.meters:
            raise ApiError(404, f"No such billing meter: '{meter_id}'", code="resource_missing", param="id")
        return self.meters[meter_id]

    def customer(self, customer_id: str) -> Entry:
        """One customer. Raises ApiError 404."""
        if customer_id not in self.customers:
            raise ApiError(404, f"No such customer: '{customer_id}'", code="resource_missing", param="id")
        return self.customers[customer_id]

    def _active_meter(self, event_name: str) -> Entry | None:
        return next(
            (
                meter
                for meter in self.meters.values()
                if (meter["event_name"], meter["status"]) == (event_name, "active")
            ),
            None,
        )

    def _apply_meter(self, entry: Entry) -> None:
        self.meters[entry["object"]["id"]] = entry["object"]

    def _apply_customer(self, entry: Entry) -> None:
        self.customers[entry["object"]["id"]] = entry["object"]

    # Idempotency keys

    def replayed(self, key: str, fingerprint: str, now_s: int) -> Entry | None:
        """The stored answer of an idempotency key of the last 24 h. Raises ApiError where other parameters came with it."""
        reply = self.replies.get(key)
        if reply is None or now_s - reply["at_s"] >= IDEMPOTENCY_LIFE_S:
            return None
        if reply["fingerprint"] != fingerprint:
            message = (
                "Keys for idempotent requests can only be used with the same parameters they were first used with."
            )
            raise ApiError(400, message, kind="idempotency_error")
        return reply

    def _apply_reply(self, entry: Entry) -> None:
        self.replies[entry["key"]] = entry
        if len(self.replies) > REPLIES_MAX:
            del self.replies[next(iter(self.replies))]


_APPLY: dict[str, Callable[[StripeState, Entry], None]] = {
    "event": StripeState._apply_event,
    "cancel": StripeState._apply_cancel,
    "meter": StripeState._apply_meter,
    "customer": StripeState._apply_customer,
    "reply": StripeState._apply_reply,
}


def aggregate(meter: Entry, events: list[Entry]) -> int:
    """A meter's value of some events: sum, count or last; with a time window only the newest of each window is left."""
    window = meter["event_time_window"]
    if window:
        grid_s = 3600 if window == "hour" else DAY_S
        events = list({event["timestamp"] // grid_s: event for event in events}.values())
    if meter["default_aggregation"]["formula"] == "count":
        return len(events)
    if meter["default_aggregation"]["formula"] == "last":
        return int(max(reversed(events), key=lambda event: event["timestamp"])["value"]) if events else 0
    return sum(int(event["value"]) for event in events)


def page(items: Iterable[Entry], params: Params, url: str) -> Entry:
    """A list object: `limit` and `starting_after` as Stripe has them."""
    limit = _whole(params, "limit", PAGE_DEFAULT)
    if not 1 <= limit <= PAGE_MAX:
        raise ApiError(400, f"Invalid limit: must be between 1 and {PAGE_MAX}", param="limit")
    left = list(items)
    after = params.get("starting_after")
    if after is not None:
        places = [at for at, item in enumerate(left) if item["id"] == after]
        if not places:
            raise ApiError(400, f"No such object: '{after}'", code="resource_missing", param="starting_after")
        left = left[places[0] + 1 :]
    return {"object": "list", "data": left[:limit], "has_more": len(left) > limit, "url": url}


def _summary(meter: Entry, customer: str, start_s: int, end_s: int, value: int) -> Entry:
    return {
        "id": f"mtrusg_{meter['id']}_{customer}_{start_s}",
        "object": "billing.meter_event_summary",
        "aggregated_value": float(value),  # as Stripe sends it; 15 digits fit
        "end_time": end_s,
        "livemode": False,
        "meter": meter["id"],
        "start_time": start_s,
    }


def _keys(meter: Entry | None) -> tuple[str, str]:
    if meter is None:
        return "stripe_customer_id", "value"
    return meter["customer_mapping"]["event_payload_key"], meter["value_settings"]["event_payload_key"]


def _value(payload: Params, key: str) -> str:
    text = str(payload.get(key, ""))
    if not text.removeprefix("-").isdecimal() or not text.isascii():
        raise ApiError(400, f"Invalid {key}: {text!r} must be a whole number.", param=f"payload[{key}]")
    if len(text.removeprefix("-").lstrip("0")) > DIGITS_MAX:
        message = f"Invalid {key}: at most {DIGITS_MAX} significant digits."
        raise ApiError(400, message, code="meter_event_value_too_many_digits", param=f"payload[{key}]")
    return str(int(text))


def _text(params: Params, name: str, most: int) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"Missing required param: {name}.", code="parameter_missing", param=name)
    if len(value) > most:
        raise ApiError(400, f"Invalid string: must be at most {most} characters", code="string_too_long", param=name)
    return value


def _whole(params: Params, name: str, default: int | None = None) -> int:
    if name not in params and default is not None:
        return default
    text = _text(params, name, 20)
    if not text.isascii() or not text.isdecimal():
        raise ApiError(400, f"Invalid integer: {text}", code="parameter_invalid_integer", param=name)
    return int(text)
