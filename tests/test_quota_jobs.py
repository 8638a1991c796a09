"""What is due for a partition's lanes, and what answers make of it: jobs without a Redis."""

from collections import Counter
from itertools import count

from tests.batches import NOW_S, usage
from tests.quota_world import ACCOUNT, EPOCH, LANES, Log
from tollway.connectors.redis import Answer
from tollway.schemas.lane import lane
from tollway.streams.quota_jobs import Apply, Figures, Job, View, due
from tollway.streams.quota_lane import LaneView, Phase

HOUR = 3_600
OK = [b"OK", b"5", b"READY", b"7", b"5"]
OLD = [b"OLD", b"5", b"READY", b"7", b"99"]


def live(log: Log) -> View:
    """A partition whose lanes are all live at the log's offset, nothing due but what is dirty."""
    view = View.of(log.state, 0.0)
    for found in view.lanes.values():
        found.phase, found.expect, found.log_ms = Phase.LIVE, log.state.next_offset, log.state.log_time_ms
        found.sweep_at = 1e9
    return view


def jobs_of(view: View, figures: Figures | None = None) -> list[Job]:
    return due(view, EPOCH, map(str, count()), 1.0, Counter() if figures is None else figures)


def test_what_was_not_written_is_due_again() -> None:
    """An abandoned or refused batch gives back its totals, its policy and its closes."""
    log = Log()
    log.fold(usage(hold="h1"))
    view = live(log)
    for settle in (lambda job: job.abandoned(), lambda job: job.answered(OLD, 1.0)):
        (job,) = jobs_of(view)
        assert (log.quota.closes, log.quota.policies, int(log.quota.dirty().sum())) == ({}, set(), 0)
        settle(job)
        assert log.quota.closes == {lane(ACCOUNT): ["h1"]}
        assert log.quota.policies == {ACCOUNT}
        assert int(log.quota.dirty().sum()) == 6


def test_an_acknowledged_end_is_not_told_again() -> None:
    """Once a complete batch was acknowledged its fields' ends stay at home; where the fold is not sure they travel."""
    log, figures = Log(), Counter[str]()
    log.fold(usage())
    view = live(log)
    (job,) = jobs_of(view, figures)
    assert job.answered(OK, 1.0)  # the policy; now the totals
    assert (NOW_S + HOUR).to_bytes(4, "big") in job.call
    assert not job.answered(OK, 1.0)
    assert figures["written"] == 6
    log.fold(usage())
    view.note(log.state)
    (job,) = jobs_of(view)
    assert f"calls h:{NOW_S}".encode() in job.call
    assert (NOW_S + HOUR).to_bytes(4, "big") not in job.call
    job.abandoned()
    view.lanes[lane(ACCOUNT)].expect = None
    (job,) = jobs_of(view)
    assert (NOW_S + HOUR).to_bytes(4, "big") in job.call


def test_a_refused_lane_waits_for_its_log() -> None:
    """After OLD nothing is sent for the lane until the log has been read up to what Redis has begun."""
    log = Log()
    log.fold(usage())
    view = live(log)
    (job,) = jobs_of(view)
    job.answered(OLD, 1.0)
    assert jobs_of(view) == []
    log.state.next_offset = 99
    view.note(log.state)
    assert len(jobs_of(view)) == 1


def test_a_whole_lane_stays_due_as_a_whole() -> None:
    """A refresh that was abandoned is due again with everything, whatever was dirty."""
    log = Log()
    log.fold(usage())
    view = View.of(log.state, 0.0)
    for _ in range(2):
        jobs = jobs_of(view)
        assert len(jobs) == len(LANES)
        (mine,) = [job for job in jobs if job.answered(OK, 1.0)]  # its policy went; it is abandoned before its totals
        assert b"calls h:" in mine.call
        mine.abandoned()
        for number in LANES:
            view.lanes[number].phase = Phase.REFRESH


def test_a_fault_makes_everything_due() -> None:
    """After a failure that nobody foresaw the lanes are refreshed: what was taken is not known."""
    log = Log()
    log.fold(usage())
    view = live(log)
    jobs_of(view)
    assert jobs_of(view) == []
    view.refresh()
    assert len([job for job in jobs_of(view) if isinstance(job, Apply)]) == len(LANES)


def test_answers_that_contradict_the_fold_begin_a_rewrite() -> None:
    """LOST and EPOCH begin a rewrite from every phase; BROKEN sends the same again."""
    for phase in (Phase.REFRESH, Phase.LIVE, Phase.FILL, Phase.GATES):
        for word, then in (("LOST", Phase.BEGIN), ("EPOCH", Phase.BEGIN), ("BROKEN", phase)):
            found = LaneView(1, phase)
            assert not found.applied(Answer(word, -1, "", -1, -1), 5, 0, 0.0)
            assert found.phase is then
