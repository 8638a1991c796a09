"""The benchmarks compare equal work: each contender, on the same events, gets the same sums."""

import sys
from collections.abc import Iterator

import pytest

from benchmarks import page
from benchmarks.contenders import AIOKAFKA, FAUST, PLAIN, Peer, new_log, run_ours, run_peer
from benchmarks.site import Site, light
from benchmarks.traffic import Shape, Traffic
from tollway.schemas import codec

EVENTS = 2_000
SMALL, OWN = Shape("acct", principals=200), Shape("own", principals=200)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with light(partitions=4) as made:
        new_log(made, SMALL, OWN)
        yield made


def test_the_sums_known_beforehand_are_those_of_the_events() -> None:
    """What a contender must show is what the encoded events add up to, by their own decoder."""
    traffic, added = Traffic(SMALL), dict[str, dict[str, int]]()
    for _, value, _ in traffic.events(EVENTS):
        event = codec.decode(value)[1]
        fields = added.setdefault(event["principal"], {})
        for meter, units in event["quantities"].items():
            name = f"{meter} m:{event['occurred_at'] // 60_000_000 * 60}"
            fields[name] = fields.get(name, 0) + units
    assert added == traffic.sums


@pytest.mark.parametrize("peer", [PLAIN, AIOKAFKA, FAUST], ids=lambda peer: peer.name)
def test_a_peer_sums_what_came(site: Site, peer: Peer) -> None:
    """Each peer of this environment shows in Redis exactly the sums of its events."""
    assert run_peer(site, peer, sys.executable, Traffic(SMALL), EVENTS)["exact"]


def test_ours_sums_what_came(site: Site) -> None:
    """Group accounts, under the policy of the peers' work, shows exactly the sums of its events."""
    assert run_ours(site, Traffic(OWN), EVENTS)["exact"]


def test_the_page_is_of_the_kept_figures() -> None:
    """docs/benchmarks.md and its picture say what docs/benchmarks/*.json say."""
    found = page.load()
    assert page.PAGE.read_text(encoding="utf-8") == page.text(found)
    assert "fold" not in found or page.PICTURE.read_text(encoding="utf-8") == page.picture(found["fold"])
