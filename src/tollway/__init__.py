"""Tollway: usage metering as a fold of one log. The names a service needs; each is loaded when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tollway.connectors.asgi import MeterMiddleware as MeterMiddleware
    from tollway.connectors.call import Call as Call
    from tollway.connectors.call import current_call as current_call
    from tollway.connectors.context import Origin as Origin
    from tollway.connectors.context import outgoing as outgoing
    from tollway.connectors.context import run as run
    from tollway.connectors.denied import Denied as Denied
    from tollway.connectors.emitter import Emitted as Emitted
    from tollway.connectors.emitter import Emitter as Emitter
    from tollway.connectors.errors import Fatal as Fatal
    from tollway.connectors.errors import Invalid as Invalid
    from tollway.connectors.errors import Refused as Refused
    from tollway.connectors.errors import TollwayError as TollwayError
    from tollway.connectors.errors import Unavailable as Unavailable
    from tollway.connectors.gate import Ask as Ask
    from tollway.connectors.gate import Decision as Decision
    from tollway.connectors.gate import Gate as Gate
    from tollway.connectors.identity import Bearer as Bearer
    from tollway.connectors.jwks import Jwks as Jwks
    from tollway.connectors.meter import Meter as Meter
    from tollway.connectors.metered import metered as metered
    from tollway.connectors.principal import ClaimedAccount as ClaimedAccount
    from tollway.connectors.principal import Principal as Principal
    from tollway.connectors.principal import bound_by as bound_by
    from tollway.connectors.redis_sink import RedisSink as RedisSink
    from tollway.connectors.redis_sink import read_redis as read_redis
    from tollway.connectors.sinks import CompositeSink as CompositeSink
    from tollway.connectors.sinks import JsonlSink as JsonlSink
    from tollway.connectors.sinks import KafkaSink as KafkaSink
    from tollway.connectors.sinks import MemorySink as MemorySink
    from tollway.connectors.sinks import Sink as Sink
    from tollway.connectors.sinks import read_jsonl as read_jsonl
    from tollway.schemas.usage import FieldError as FieldError
    from tollway.schemas.usage import UsageEvent as UsageEvent

_HOMES = {
    "connectors.asgi": ("MeterMiddleware",),
    "connectors.call": ("Call", "current_call"),
    "connectors.context": ("Origin", "outgoing", "run"),
    "connectors.denied": ("Denied",),
    "connectors.emitter": ("Emitted", "Emitter"),
    "connectors.errors": ("Fatal", "Invalid", "Refused", "TollwayError", "Unavailable"),
    "connectors.gate": ("Ask", "Decision", "Gate"),
    "connectors.identity": ("Bearer",),
    "connectors.jwks": ("Jwks",),
    "connectors.meter": ("Meter",),
    "connectors.metered": ("metered",),
    "connectors.principal": ("ClaimedAccount", "Principal", "bound_by"),
    "connectors.redis_sink": ("RedisSink", "read_redis"),
    "connectors.sinks": ("CompositeSink", "JsonlSink", "KafkaSink", "MemorySink", "Sink", "read_jsonl"),
    "schemas.usage": ("FieldError", "UsageEvent"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tollway' has no attribute {name!r}")
    value = getattr(import_module(f"tollway.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
