"""Each kind of command is accepted as it should be and refused by field, value and cure where it is not."""

from typing import Any

import pytest

from tollway.schemas.command import (
    DEFAULT_POLICY,
    KINDS,
    LIMIT_MAX,
    LIMITS_MAX,
    METERS_COUNTED_MAX,
    SECONDS_MAX,
    CommandError,
    LogConfig,
    check_body,
    parse_body,
)
from tollway.schemas.usage import MONEY_NANO_MAX

KEY = "ab" * 32
OPEN = LogConfig(epoch="0-a", deployment="prod", kid="k1", public_key=KEY).body()
PRICE = {"price_ref": "p:1", "asset": "USD", "unit_nano": {"calls": 1}}
COUNT = {"meter": "calls", "windows": ["h"], "scopes": ["acct"]}
LIMIT = {"scope": "user:u1", "meter": "calls", "window": "h", "limit": 10}
POLICY = {"counts": [COUNT], "limits": [LIMIT], "outage": "open", "max_staleness_s": 5}
TOKEN = {"issuer": "https://id.example", "kind": "user", "subject": "auth0|5"}
BIND = {**TOKEN, "principal": "u5"}
RAIL = {"rail": "stripe", "event_id": "evt_1", "type": "charge.dispute.created", "created_s": 5, "customer": "cus_1"}

ACCEPTED: list[tuple[str, str, dict[str, Any]]] = [
    ("log.open", "*", OPEN),
    ("log.open", "*", {"epoch": "0-a", "deployment": "d", "kid": "k", "public_key": KEY}),
    ("log.open", "*", {**OPEN, "billing_window_s": 10, "billing_grace_s": 0, "snapshot_s": 60, "auto_open": True}),
    ("key.add", "*", {"kid": "k2", "public_key": KEY}),
    ("meter.add", "*", {"meter": "calls", "event_name": None}),
    ("meter.add", "*", {"meter": "calls"}),
    ("meter.add", "*", {"meter": "a" + "_" * 63, "event_name": "e" * 100}),
    ("price.add", "*", PRICE),
    ("price.add", "*", {**PRICE, "unit_nano": {"calls": 0, "tokens": MONEY_NANO_MAX}}),
    ("fold.change", "*", {"version": 2, "at_s": 0}),
    ("fold.change", "*", {"version": 1_000_000, "at_s": 2**40}),
    ("account.open", "acme", {}),
    ("account.open", "a" * 128, {"name": "Acme"}),
    ("customer.bind", "acme", {"customer": "cus_1"}),
    ("account.freeze", "acme", {}),
    ("account.freeze", "acme", {"reason": "dispute"}),
    ("account.unfreeze", "acme", {"reason": "r" * 256}),
    ("principal.bind", "acme", BIND),
    (
        "principal.bind",
        "acme",
        {**BIND, "kind": "client", "scopes": ["agent:a1"], "operations": ["*", "chat *", "GET /v1"]},
    ),
    ("principal.unbind", "acme", TOKEN),
    ("run.close", "acme", {"run": "r1"}),
    ("rail.event", "acme", RAIL),
    ("rail.event", "*", {**RAIL, "customer": None, "object": {"id": "x"}}),
    ("session.close", "acme", {"session": "s1"}),
    ("policy.set", "acme", DEFAULT_POLICY),
    ("policy.set", "acme", POLICY),
    ("policy.set", "acme", {"counts": []}),
    ("policy.set", "acme", {"counts": [COUNT] * METERS_COUNTED_MAX, "limits": [LIMIT] * LIMITS_MAX}),
    ("policy.set", "acme", {**POLICY, "limits": [{**LIMIT, "limit": LIMIT_MAX}, {**LIMIT, "limit": 0}]}),
    ("policy.set", "acme", {**POLICY, "limits": [{**LIMIT, "scope": "principal"}, {**LIMIT, "scope": "run"}]}),
]


@pytest.mark.parametrize(("kind", "account", "body"), ACCEPTED)
def test_a_good_command_passes(kind: str, account: str, body: dict[str, Any]) -> None:
    """Each kind passes with what it needs, with all that it takes, and at its bounds."""
    check_body(kind, account, body)


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


def policy(**changed: Any) -> tuple[str, str, dict[str, Any]]:
    return "policy.set", "acme", {**POLICY, **changed}


def limit(**changed: Any) -> tuple[str, str, dict[str, Any]]:
    return policy(limits=[{**LIMIT, **changed}])


def log_open(**changed: Any) -> tuple[str, str, dict[str, Any]]:
    return "log.open", "*", {**OPEN, **changed}


REFUSED: list[tuple[tuple[str, str, dict[str, Any]], str]] = [
    (("account.close", "acme", {}), "kind is 'account.close': give one of account.freeze, account.open, "),
    (("account.open", "*", {}), "account is '*': account.open takes one account"),
    (("account.open", "a b", {}), "account is 'a b': ids match"),
    (("account.open", "", {}), "account is '': ids match"),
    (("account.open", "a" * 129, {}), "ids match"),
    (("meter.add", "acme", {"meter": "calls"}), "account is 'acme': meter.add takes `*`"),
    (("account.open", "acme", {"nmae": "Acme"}), "nmae is no field of account.open: give name"),
    (("account.open", "acme", {"name": ""}), "name is '': give a text"),
    (("account.open", "acme", {"name": 5}), "name is 5: give a text"),
    (("customer.bind", "acme", {}), "customer is None: give a text"),
    (("customer.bind", "acme", {"customer": "cus 1"}), "customer is 'cus 1': give Stripe's customer id"),
    *[(("log.open", "*", without(OPEN, name)), f"{name} is None") for name in ("epoch", "deployment", "kid")],
    (log_open(public_key="ab"), "public_key is 'ab': give the 32 bytes"),
    (log_open(public_key="zz" * 32), "64 hex digits"),
    (log_open(lanes=128), "lanes is 128: give 256"),
    (log_open(step_s=0), "step_s is 0: give a whole number from 1"),
    (log_open(step_s=True), "step_s is True: give a whole number"),
    (log_open(step_s=2.5), "step_s is 2.5: give a whole number"),
    (log_open(billing_window_s=7), "billing_window_s is 7: it must divide 3600"),
    (log_open(billing_window_s=0), "billing_window_s is 0: give a whole number from 1"),
    (log_open(billing_grace_s=-1), "billing_grace_s is -1: give a whole number from 0"),
    (log_open(snapshot_s=SECONDS_MAX + 1), f"give a whole number from 1 to {SECONDS_MAX}"),
    (log_open(hold_grace_s="900"), "hold_grace_s is '900': give a whole number"),
    (log_open(auto_open="yes"), "auto_open is 'yes': give true or false"),
    (log_open(partitions=16), "partitions is no field of log.open"),
    (("key.add", "*", {"public_key": KEY}), "kid is None"),
    (("key.add", "*", {"kid": "k", "public_key": KEY + "00"}), "64 hex digits"),
    (("meter.add", "*", {"event_name": "calls"}), "meter is None: meters match"),
    (("meter.add", "*", {"meter": "Calls"}), "meter is 'Calls': meters match"),
    (("meter.add", "*", {"meter": "a" * 65}), "meters match"),
    (("meter.add", "*", {"meter": "calls", "event_name": ""}), "event_name is '': give Stripe's event name"),
    (("meter.add", "*", {"meter": "calls", "event_name": "e" * 101}), "1 to 100 characters"),
    (("meter.add", "*", {"meter": "calls", "event_name": 5}), "event_name is 5"),
    (("price.add", "*", without(PRICE, "price_ref")), "price_ref is None: give a text"),
    (("price.add", "*", {**PRICE, "price_ref": "p 1"}), "price_ref is 'p 1': ids match"),
    (("price.add", "*", without(PRICE, "asset")), "asset is None: give a text"),
    (("price.add", "*", {**PRICE, "unit_nano": {}}), "unit_nano is {}: give meter → nano units"),
    (("price.add", "*", {**PRICE, "unit_nano": 5}), "unit_nano is 5"),
    (("price.add", "*", {**PRICE, "unit_nano": {"Calls": 5}}), "unit_nano is 'Calls': meters match"),
    (("price.add", "*", {**PRICE, "unit_nano": {"calls": 0.5}}), "unit_nano.calls is 0.5: give a whole number"),
    (("price.add", "*", {**PRICE, "unit_nano": {"calls": True}}), "unit_nano.calls is True"),
    (("price.add", "*", {**PRICE, "unit_nano": {"calls": -1}}), "unit_nano.calls is -1"),
    (("price.add", "*", {**PRICE, "unit_nano": {"calls": MONEY_NANO_MAX + 1}}), f"from 0 to {MONEY_NANO_MAX}"),
    (("fold.change", "*", {"version": 1, "at_s": 0}), "version is 1: give a whole number from 2"),
    (("fold.change", "*", {"version": 2, "at_s": -1}), "at_s is -1"),
    (("fold.change", "acme", {"version": 2, "at_s": 0}), "fold.change takes `*`"),
    (("account.freeze", "*", {}), "account is '*': account.freeze takes one account"),
    (("account.freeze", "acme", {"reason": ""}), "reason is '': give a text"),
    (("account.unfreeze", "acme", {"reason": "r" * 257}), "reason is 257 characters long: give at most 256"),
    *[(("principal.bind", "acme", without(BIND, name)), f"{name} is None") for name in BIND],
    (("principal.bind", "acme", {**BIND, "kind": "anonymous"}), "kind is 'anonymous': give one of user, client"),
    (("principal.bind", "acme", {**BIND, "principal": "a b"}), "principal is 'a b': ids match"),
    (("principal.bind", "acme", {**BIND, "scopes": ["user:u6"]}), "scopes has 'user:u6': give agent:id"),
    (("principal.bind", "acme", {**BIND, "scopes": ["agent:a"] * 5}), "give a list of at most 4 texts"),
    (("principal.bind", "acme", {**BIND, "operations": "chat"}), "operations is 'chat': give a list"),
    (("principal.bind", "acme", {**BIND, "operations": ["a*b"]}), "operations has 'a*b': give an operation's name"),
    (("principal.unbind", "acme", BIND), "principal is no field of principal.unbind"),
    *[
        (("rail.event", "acme", without(RAIL, name)), f"{name} is None")
        for name in ("rail", "event_id", "type", "created_s")
    ],
    (("rail.event", "acme", {**RAIL, "object": "x"}), "object is str: give the event's object, or null"),
    (("rail.event", "a b", RAIL), "ids match"),
    (("run.close", "acme", {}), "run is None: give a text"),
    (("session.close", "acme", {"session": "s 1"}), "session is 's 1': ids match"),
    (("policy.set", "acme", {}), "counts is None: give a list of at most 32"),
    (policy(counts={}), "counts is {}: give a list"),
    (policy(counts=[COUNT] * (METERS_COUNTED_MAX + 1)), "counts is 33 long: give a list of at most 32"),
    (policy(counts=["calls"]), "counts has 'calls': each row has meter, windows, scopes"),
    (policy(counts=[without(COUNT, "scopes")]), "each row has meter, windows, scopes"),
    (policy(counts=[{**COUNT, "meter": "C"}]), "meter is 'C': meters match"),
    (policy(counts=[{**COUNT, "windows": ["w"]}]), "windows is ['w']: give some of m, h, d, M, L"),
    (policy(counts=[{**COUNT, "windows": []}]), "windows is []"),
    (policy(counts=[{**COUNT, "scopes": ["org"]}]), "scopes is ['org']: give some of acct, user"),
    (policy(counts=[{**COUNT, "scopes": "acct"}]), "scopes is 'acct'"),
    (policy(limits=None), "limits is None: give a list of at most 1000"),
    (policy(limits=[LIMIT] * (LIMITS_MAX + 1)), "limits is 1001 long"),
    (policy(limits=["calls"]), "limits has 'calls': each row has scope, meter, window, limit"),
    (policy(limits=[{**LIMIT, "per": "day"}]), "each row has scope, meter, window, limit"),
    (limit(meter=5), "meter is 5: meters match"),
    (limit(window="w"), "window is 'w': give one of m, h, d, M, L"),
    (limit(window=None), "window is None"),
    (limit(scope="org"), "scope is 'org': give a kind (acct, user"),
    (limit(scope="user:"), "scope is 'user:': give a kind"),
    (limit(scope="user:a b"), "scope is 'user:a b'"),
    (limit(scope="acct:acme"), "scope is 'acct:acme'"),
    (limit(scope="principal:u"), "scope is 'principal:u'"),
    (limit(scope=None), "scope is None"),
    (limit(limit=-1), "limit is -1: give a whole number from 0"),
    (limit(limit=LIMIT_MAX + 1), f"from 0 to {LIMIT_MAX}"),
    (limit(limit=True), "limit is True"),
    (limit(limit=1.0), "limit is 1.0"),
    (limit(limit="10"), "limit is '10'"),
    (policy(outage="shut"), "outage is 'shut': give one of closed, open, lease"),
    (policy(outage=None), "outage is None"),
    (policy(max_staleness_s=0), "max_staleness_s is 0: give a whole number from 1"),
    (policy(limit=[]), "limit is no field of policy.set: give counts, limits, outage, max_staleness_s"),
]


@pytest.mark.parametrize(("command", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_a_bad_command_is_refused_in_a_sentence(command: tuple[str, str, dict[str, Any]], sentence: str) -> None:
    """Each error of each kind is refused with the field, its value and the cure."""
    with pytest.raises(CommandError) as caught:
        check_body(*command)
    assert sentence in str(caught.value)


def test_every_kind_is_accepted_once_and_refused_once() -> None:
    """No kind goes untested on either side."""
    assert {kind for kind, _, _ in ACCEPTED} == set(KINDS)
    assert {kind for (kind, _, _), _ in REFUSED} >= set(KINDS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "body is no JSON"),
        ("{", "body is no JSON"),
        ("[" * 60_000, "body is no JSON"),
        ('{"name": "\\ud800"}', "body is no JSON"),
        ("[]", "body is list: give a JSON object"),
        ("null", "body is NoneType: give a JSON object"),
        ("5", "body is int: give a JSON object"),
    ],
    ids=["empty", "cut", "nested too deep", "lone surrogate", "list", "null", "number"],
)
def test_a_body_that_is_no_object_is_refused(text: str, sentence: str) -> None:
    """Broken, hostile or other JSON is a CommandError, never another exception: a fold must survive it."""
    with pytest.raises(CommandError) as caught:
        parse_body(text)
    assert sentence in str(caught.value)


def test_the_configuration_is_its_own_body() -> None:
    """`log.open` carries the whole configuration, and reading it back gives an equal one."""
    config = LogConfig(epoch="0-a", deployment="prod", kid="k1", public_key=KEY, auto_open=True)
    assert LogConfig(**config.body()) == config
