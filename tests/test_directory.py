"""What commands establish in a partition, and what they are refused for where their body alone is sound."""

from typing import Any

import pytest

from tests.records import NOW_MS, account_of, command, opened, records
from tollway.schemas.command import BINDINGS_MAX, REMEMBERED_S
from tollway.streams.batch import ACCEPTED, REFUSED
from tollway.streams.directory import Binding, Directory, token
from tollway.streams.judge import judge

ACME = account_of(0)
TOKEN = {"issuer": "https://id.example", "kind": "user", "subject": "auth0|5"}
KEY = token(TOKEN)


def told(state: Any, kind: str, body: dict[str, Any], at_ms: int = NOW_MS) -> Any:
    number = state.next_offset
    batch = judge(state, records([command(ACME, kind, body, at_ms, number=number)], first=number))
    return batch.verdict[0], batch.reasons.get(0, ("", ""))


def test_a_binding_says_who_a_token_is_until_it_is_unbound() -> None:
    """The later command wins; what is unbound is remembered 35 days, so that every reader hears it, then forgotten."""
    state = opened()
    body = {**TOKEN, "principal": "u5", "scopes": ["agent:a1"], "operations": ["chat *"]}
    told(state, "principal.bind", body)
    found = state.directory.accounts[ACME].bindings
    assert found == {KEY: Binding("u5", ["agent:a1"], ["chat *"], NOW_MS, 0)}
    told(state, "principal.bind", {**TOKEN, "principal": "u6"})
    assert found[KEY] == Binding("u6", [], [], NOW_MS, 1)
    told(state, "principal.unbind", TOKEN)
    assert found[KEY] == Binding(None, [], [], NOW_MS, 2)
    state.directory.forget(NOW_MS + REMEMBERED_S * 1000)
    assert KEY in found
    state.directory.forget(NOW_MS + REMEMBERED_S * 1000 + 1)
    assert not found


def test_a_freeze_holds_from_its_offset_on() -> None:
    """An account is frozen behind the freeze and free behind the unfreeze."""
    state = opened()
    seen = []
    for kind in ("account.freeze", "account.unfreeze"):
        told(state, kind, {"reason": "dispute"})
        seen.append(state.directory.accounts[ACME].frozen)
    assert seen == [True, False]


def test_who_signed_the_last_change_of_each_kind_is_known() -> None:
    """Key, command id, time and offset of the last command of a kind stand in the account."""
    state = opened()
    told(state, "policy.set", {"counts": []})
    told(state, "policy.set", {"counts": []}, NOW_MS + 1)
    kid, command_id, at_ms, offset = state.directory.accounts[ACME].signed["policy.set"]
    assert (kid, at_ms, offset) == (state.directory.config.kid, NOW_MS + 1, 1)
    assert command_id == f"cmd-policy.set-{ACME}-1"
    assert state.directory.accounts[ACME].policy_version == 2


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [("principal.unbind", TOKEN, "bad_command"), ("principal.bind", {**TOKEN, "principal": "u"}, "too_many_bindings")],
)
def test_what_would_change_nothing_or_too_much_is_refused(kind: str, body: dict[str, Any], reason: str) -> None:
    """Unbinding what is not bound, and one principal more than an account takes, are dead letters."""
    state = opened()
    if kind == "principal.bind":
        full = {("i", "user", str(number)): Binding("u", [], [], 0, 0) for number in range(BINDINGS_MAX)}
        state.directory.accounts[ACME].bindings = full
    verdict, (found, _) = told(state, kind, body)
    assert (verdict, found) == (REFUSED, reason)


def test_a_bound_principal_may_be_bound_anew_in_a_full_account() -> None:
    """The bound counts principals, not changes."""
    state = opened()
    full = {("i", "user", str(number)): Binding("u", [], [], 0, 0) for number in range(BINDINGS_MAX - 1)}
    state.directory.accounts[ACME].bindings = {**full, KEY: Binding("u", [], [], 0, 0)}
    assert told(state, "principal.bind", {**TOKEN, "principal": "v"})[0] == ACCEPTED


def test_what_is_dumped_is_loaded() -> None:
    """Freezes, bindings and who signed them come back from a dump."""
    state = opened()
    told(state, "account.freeze", {})
    told(state, "principal.bind", {**TOKEN, "principal": "u5"})
    loaded = Directory.load(state.directory.dump())
    assert loaded.accounts == state.directory.accounts
    assert loaded.dump() == state.directory.dump()
