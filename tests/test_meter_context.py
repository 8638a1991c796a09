"""What a call is part of travels from process to process, and nothing malformed comes in."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollway.connectors.context import (
    BAGGAGE_BYTES_MAX,
    BAGGAGE_MEMBERS_MAX,
    Origin,
    current_origin,
    origin_from,
    outgoing,
    run,
    within,
)
from tollway.connectors.errors import Refused
from tollway.schemas.usage import ID, PATH_MAX

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
IDS = st.text(string.ascii_letters + string.digits + "._:@/-", min_size=1, max_size=128)
MAYBE = st.none() | IDS


@given(
    st.builds(
        Origin, MAYBE, MAYBE, MAYBE, MAYBE, st.lists(IDS, max_size=PATH_MAX).map(tuple), st.sampled_from([None, TRACE])
    )
)
def test_what_goes_out_comes_in(origin: Origin) -> None:
    """The headers that one service sends are read by the next to the same origin, as far as W3C lets baggage be long."""
    with within(origin):
        headers = outgoing()
    if len(headers.get("baggage", "")) <= BAGGAGE_BYTES_MAX:
        assert origin_from(headers.get("traceparent"), headers.get("baggage")) == origin


@given(st.text(max_size=300), st.text(max_size=80))
def test_anything_can_come_in(baggage: str, traceparent: str) -> None:
    """Whatever a caller sends, what is read of it are ids."""
    found = origin_from(traceparent, "tollway.run=" + baggage)
    assert all(ID.fullmatch(str(value)) for value in (found.agent, found.session, found.run, found.parent) if value)
    assert found.traceparent in (None, traceparent)


@pytest.mark.parametrize(
    ("baggage", "expected"),
    [
        ("tollway.run=r-1;p=1, other=2 ,tollway.session = s%3A1", Origin(run="r-1", session="s:1")),
        ("tollway.run=a%20b", Origin()),
        ("tollway.run=" + "x" * 129, Origin()),
        ("tollway.path=a~b~%20", Origin()),
        ("tollway.path=" + "~".join(["a"] * (PATH_MAX + 1)), Origin()),
        ("tollway.run=r-1," + "x" * BAGGAGE_BYTES_MAX, Origin()),
        ("a=b," * BAGGAGE_MEMBERS_MAX + "tollway.run=r-1", Origin()),
        (None, Origin()),
    ],
)
def test_baggage_is_read_within_bounds(baggage: str | None, expected: Origin) -> None:
    """Members of others are passed over; what is no id, too long or too much is not there."""
    assert origin_from(None, baggage) == expected


@pytest.mark.parametrize("bad", ["", "00-" + "0" * 32 + TRACE[35:], TRACE.upper(), TRACE[:-1], "ff" + TRACE[2:]])
def test_a_bad_traceparent_is_none(bad: str) -> None:
    """Only what W3C calls valid names a trace."""
    assert origin_from(bad, None).trace_id is None
    assert origin_from(TRACE, None).fields() == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}


def test_runs_nest() -> None:
    """A run inside a run has it as its parent, and the runs above it as its path; afterwards all is as before."""
    with run("r-1", agent="planner", session="s-1"), run("r-2"), run("r-3", agent="searcher"):
        assert current_origin().fields() == {
            "agent": "searcher", "session": "s-1", "run": "r-3", "parent": "r-2", "path": ["r-1", "r-2"],
        }  # fmt: skip
    assert current_origin() == Origin()


def test_a_run_that_came_in_is_the_parent_of_ours() -> None:
    """A service that begins a run of its own under a caller's continues the caller's path."""
    with within(origin_from(None, "tollway.run=r-2,tollway.parent=r-1,tollway.path=r-1")), run("r-3") as inner:
        assert (inner.parent, inner.path) == ("r-2", ("r-1", "r-2"))


def test_a_deep_path_keeps_its_root_and_its_nearest() -> None:
    """Below PATH_MAX runs the path leaves out the middle."""
    origin = Origin()
    for number in range(PATH_MAX + 5):
        with within(origin), run(f"r-{number}") as origin:
            pass
    assert len(origin.path) == PATH_MAX
    assert (origin.path[0], origin.path[-1]) == ("r-0", f"r-{PATH_MAX + 3}")


def test_what_is_no_id_is_no_run() -> None:
    """A run's id is refused by name, value and cure."""
    with pytest.raises(Refused, match="agent is 'a b': ids match"), run("r-1", agent="a b"):
        pass


def test_other_baggage_is_kept() -> None:
    """Members of others stay, older ones of ours are replaced, a traceparent that is there stands."""
    with within(Origin(run="r-1", traceparent=TRACE)):
        headers = outgoing({"baggage": "k=v,tollway.run=old", "traceparent": "mine", "accept": "*/*"})
    assert headers == {"baggage": "tollway.run=r-1,k=v", "traceparent": "mine", "accept": "*/*"}
    assert outgoing() == {}
