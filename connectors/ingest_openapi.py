"""The OpenAPI 3.1 document of the ingest endpoint: what it takes and what it answers."""

from typing import Any

from tollway.connectors.cloudevents import BATCH, SINGLE, SPEC_VERSION, TEXT_MAX, TYPE
from tollway.schemas import usage

_ID = {"type": ["string", "null"], "pattern": f"^{usage.ID_PATTERN}$"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": usage.QUANTITY_MAX}
_MONEY = {"type": ["integer", "null"], "minimum": 0, "maximum": usage.MONEY_NANO_MAX}
_TEXT = {"type": ["string", "null"], "minLength": 1, "maxLength": usage.OPERATION_BYTES_MAX}


def openapi(events_max: int) -> dict[str, Any]:
    """The document, as a JSON object."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tollway ingest",
            "version": "1",
            "description": "Usage as CloudEvents 1.0. Answered once the log has it; safe to repeat for an hour.",
        },
        "paths": {
            "/v1/events": {
                "post": {
                    "operationId": "record",
                    "summary": "Record one event or a batch",
                    "security": [{"bearer": []}],
                    "requestBody": {
                        "required": True,
                        "content": {
                            SINGLE: {"schema": {"$ref": "#/components/schemas/Event"}},
                            BATCH: {
                                "schema": {
                                    "type": "array",
                                    "maxItems": events_max,
                                    "items": {"$ref": "#/components/schemas/Event"},
                                }
                            },
                        },
                    },
                    "responses": {
                        "202": _results("Every event is in the log"),
                        "207": _results("Some are; the others are refused, each with its field and reason"),
                        "400": _problem("The body is no JSON, no batch, or too long a batch"),
                        "401": _problem("No token, or one that is not valid"),
                        "403": _problem("The token is bound to no account"),
                        "413": _problem("The body is too large"),
                        "415": _problem("Neither a CloudEvent nor a batch"),
                        "422": _results("None can be taken"),
                        "429": _problem("Too many events wait for the broker: Retry-After says when to come back"),
                        "503": {
                            "description": "Some are not in the log yet: send all again, unchanged",
                            "content": {
                                "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
                                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}},
                            },
                        },
                    },
                }
            }
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": {
                "Event": _event(),
                "Usage": _usage(),
                "Result": _result(),
                "Answer": _answer(),
                "Problem": _PROBLEM,
            },
        },
    }


def _event() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": TEXT_MAX}
    return {
        "type": "object",
        "required": ["specversion", "id", "source", "type", "time", "data"],
        "properties": {
            "specversion": {"const": SPEC_VERSION},
            "id": {**text, "description": "with `source`, the event's identity"},
            "source": text,
            "type": {"const": TYPE},
            "time": {
                "type": "string",
                "format": "date-time",
                "description": "when the call began, at most an hour ago",
            },
            "datacontenttype": {"const": "application/json"},
            "data": {"$ref": "#/components/schemas/Usage"},
        },
    }


def _usage() -> dict[str, Any]:
    properties: dict[str, Any] = {
        "surface": {"enum": list(usage.SURFACES)},
        "operation": {**_TEXT, "type": "string"},
        "account": _ID,
        "principal_kind": {"enum": list(usage.PRINCIPAL_KINDS)},
        "principal": {**_ID, "type": "string"},
        "status": {"enum": list(usage.STATUSES)},
        "latency_us": {"type": "integer", "minimum": 0, "maximum": usage.LATENCY_US_MAX},
        "quantities": {
            "type": ["object", "null"],
            "maxProperties": usage.QUANTITIES_MAX - 1,
            "propertyNames": {"pattern": f"^{usage.METER_PATTERN}$"},
            "additionalProperties": _COUNT,
        },
        "path": {"type": ["array", "null"], "maxItems": usage.PATH_MAX, "items": {**_ID, "type": "string"}},
        "attributes": {
            "type": ["object", "null"],
            "maxProperties": usage.ATTRIBUTES_MAX,
            "additionalProperties": {"type": "string", "maxLength": usage.ATTRIBUTE_BYTES_MAX},
        },
    }
    properties |= dict.fromkeys(("agent", "session", "run", "parent", "price_ref", "payment_ref", "trace_id"), _ID)
    properties |= dict.fromkeys(("revenue_nano", "cost_nano"), _MONEY)
    properties |= dict.fromkeys(("rail", "revenue_asset", "cost_asset", "provider", "model"), _TEXT)
    required = ["surface", "operation", "principal_kind", "principal", "status", "latency_us"]
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _result() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["status"],
        "properties": {
            "id": {},
            "source": {},
            "status": {"enum": ["accepted", "refused", "unavailable"]},
            "reason": text,
            "field": text,
            "detail": text,
        },
    }


def _answer() -> dict[str, Any]:
    result = {"$ref": "#/components/schemas/Result"}
    batch = {"type": "object", "required": ["results"], "properties": {"results": {"type": "array", "items": result}}}
    return {"anyOf": [batch, result]}


_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}


def _results(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Answer"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problem(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {"application/problem+json": {"schema": schema}}}
