"""The fold's scripts on a real Valkey against a model of dictionaries."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.batches import NOW_S, counts
from tests.lane_model import TAG, Lane, packed
from tollway.connectors import redis as far_redis
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP, Swept
from tollway.streams.policy import gate_fields

NOW_MS = NOW_S * 1000
HOUR, DAY = 3_600, 86_400
EPOCH, LATER_EPOCH, OTHER_EPOCH = "0-log", "1-log", "0-other"
BIG = 9_007_199_254_740_993  # 2⁵³ + 1: no double holds it


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator["redis.Redis[bytes]"]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password) as found:
        found.flushdb()
        yield found


def run(client: "redis.Redis[bytes]", script: far_redis.Script, *arguments: Any) -> Any:
    reply = client.eval(script.text, 1, f"{TAG}m", *arguments)
    return _plain(reply)


def _plain(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_plain(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply


def apply(client: "redis.Redis[bytes]", off: int, body: list[Any], **other: Any) -> tuple[str, ...]:
    """apply with a batch of one part at its log's present."""
    call = {"epoch": EPOCH, "tok": f"t{off}", "part": 0, "more": "", "expect": "", "log": NOW_MS, **other}
    words = (call["epoch"], off, call["tok"], call["part"], call["more"], call["expect"], call["log"])
    return tuple(run(client, APPLY, *words, packed(body)))


def begin(client: "redis.Redis[bytes]", off: int = 0, epoch: str = EPOCH) -> list[Any]:
    found: list[Any] = run(client, REWRITE_BEGIN, epoch, off)
    return found


def ready(client: "redis.Redis[bytes]", off: int = 0) -> str:
    """A lane that is READY with nothing in it; its generation."""
    gen = begin(client, off)[3]
    assert apply(client, off, [[], [], [], []])[0] == "OK"
    assert run(client, REWRITE_END, EPOCH, gen, off)[0] == "OK"
    return str(gen)


FIELDS = [
    ("acme~acct", "calls h:0", NOW_S + HOUR),
    ("acme~acct", "calls d:0", NOW_S + DAY),
    ("acme~user:u1", "calls h:0", NOW_S + HOUR),
    ("acme~run:r1", "calls L:0", NOW_S + 2 * DAY),
    ("acme~acct", "usd L:0", 0),
]
LOGS = st.integers(0, 8).map(lambda halves: NOW_MS + halves * 12 * HOUR * 1000)
OFFS = st.integers(0, 5)
HOLDS = st.sampled_from(["h1", "h2", "h3"])
AMOUNTS = st.sampled_from([0, 1, 7, BIG])
USED = st.sampled_from(["0", "5", str(BIG), str(2**63 - 1)])


@st.composite
def bodies(draw: st.DrawFn) -> list[Any]:
    some = draw(st.lists(st.sampled_from(FIELDS), unique=True, max_size=4))
    plain = [[scope, f"{base} u", draw(USED)] for scope, base, end in some if draw(st.booleans()) or not end]
    sent = {(run[0], run[1]) for run in plain}
    fresh = [[end, scope, f"{base} u", draw(USED)] for scope, base, end in some if (scope, f"{base} u") not in sent]
    policies = [["acme", "v", draw(USED)]] if draw(st.booleans()) else []
    return [plain, fresh, policies, draw(st.lists(HOLDS, unique=True, max_size=2))]


def on(kind: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(kind), *arguments)


EPOCHS = st.sampled_from([EPOCH, EPOCH, EPOCH, EPOCH, LATER_EPOCH, OTHER_EPOCH])
APPLIES = on(
    "apply", EPOCHS, OFFS, st.sampled_from("ab"), st.sampled_from([0, 0, 0, 1, 2]), st.booleans(),
    st.none() | OFFS, LOGS, bodies(),
)  # fmt: skip
OPERATIONS = st.one_of(
    APPLIES,
    APPLIES,
    APPLIES,
    on("begin", EPOCHS, OFFS),
    on("end", EPOCHS, st.booleans(), OFFS),
    on("sweep", st.integers(1, 3)),
    on(
        "hold",
        HOLDS,
        st.lists(st.tuples(st.sampled_from(FIELDS), AMOUNTS), max_size=3, unique_by=lambda pair: pair[0]),
        LOGS,
    ),
    on("capture", HOLDS, LOGS),
)


def step(client: "redis.Redis[bytes]", model: Lane, operation: tuple[Any, ...]) -> tuple[Any, Any]:
    """The same operation on both; (real answer, model's answer)."""
    kind, *words = operation
    if kind == "apply":
        epoch, off, tok, part, more, expect, log, body = words
        told = ("1" if more else "", "" if expect is None else expect, log)
        real = run(client, APPLY, epoch, off, tok, part, *told, packed(body))
        return tuple(real), model.apply(*words)
    if kind == "begin":
        *real, gates = run(client, REWRITE_BEGIN, *words)
        wanted = model.begin(*words, real[3])
        assert gates == (len(model.g) if wanted[0] == "OK" else 0)
        return tuple(real), wanted
    if kind == "end":
        epoch, same, off = words
        gen = model.m.get("gen", "1") if same else "1"
        return tuple(run(client, REWRITE_END, epoch, gen, off)), model.end(epoch, gen, off)
    if kind == "sweep":
        return tuple(run(client, SWEEP, *words)), model.sweep(*words)
    if kind == "hold":
        name, fields, due = words
        model.hold(name, [(scope, base, amount, end) for (scope, base, end), amount in fields], due)
    else:
        model.capture(*words)
    model.write(client)
    return None, None


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATIONS, min_size=1, max_size=25), st.booleans())
def test_scripts_do_what_the_model_does(client: Any, operations: list[tuple[Any, ...]], opened: bool) -> None:
    """Answers and the whole key space equal the model's after every step, with parts, foreign epochs, holds and sweeps."""
    client.flushdb()
    model = Lane()
    if opened:
        gen = ready(client)
        model.begin(EPOCH, 0, gen)
        model.apply(EPOCH, 0, "t0", 0, False, None, NOW_MS, [[], [], [], []])
        model.end(EPOCH, gen, 0)
    for operation in operations:
        real, wanted = step(client, model, operation)
        assert real == wanted, operation
        assert Lane.read(client) == model, operation


def likely(dice: random.Random, model: Lane, log: int) -> tuple[Any, ...]:
    """An operation that mostly gets through: a fold that goes on, its gates, and now and then a fault."""
    begun = int(model.m.get("begun", "0"))
    off = begun + dice.choice([0, 0, 1, 1, 2, -1])
    match dice.choice(["apply"] * 8 + ["hold"] * 3 + ["capture"] * 2 + ["sweep"] * 2 + ["rewrite"]):
        case "apply":
            again = dice.random() < 0.3  # the same batch goes on, or its predecessor is missing
            tok, part = model.m.get("tok", "a"), int(model.m.get("part", "0")) + dice.choice([0, 1, 1, 2])
            tok, part, off = (
                (dice.choice([tok, "z"]), max(0, part), dice.choice([begun, off])) if again else ("a", 0, off)
            )
            expect = dice.choice(
                [None, int(model.m.get("off", "0")), int(model.m.get("off", "0")) + dice.choice([0, 0, 0, 1])]
            )
            picked = dice.sample(FIELDS, dice.randrange(len(FIELDS)))
            bare = [field for field in picked if not field[2] or dice.random() < 0.4]
            totals = [[scope, f"{base} u", dice.choice(["5", str(BIG)])] for scope, base, _ in bare]
            fresh = [[end, scope, f"{base} u", "7"] for scope, base, end in picked if (scope, base, end) not in bare]
            closes = dice.sample(["h1", "h2", "h3"], dice.choice([0, 0, 1]))
            body = [totals, fresh, [["acme", f"v{dice.randrange(3)}", "1"]], closes]
            return (
                "apply",
                EPOCH,
                off,
                tok,
                part,
                dice.random() < 0.3,
                expect,
                log - dice.choice([0, 0, DAY * 1000]),
                body,
            )
        case "hold":
            fields = [(field, dice.choice([1, BIG])) for field in dice.sample(FIELDS, 3)]
            return "hold", dice.choice(["h1", "h2", "h3"]), fields, log + dice.choice([0, HOUR * 1000])
        case "capture":
            return "capture", dice.choice(["h1", "h2", "h3"]), log
        case "sweep":
            return "sweep", dice.choice([1, 10])
    if model.m.get("state") == "COLD" and dice.random() < 0.7:
        return "end", EPOCH, True, int(model.m["off"]) + dice.choice([0, 0, 1])
    return "begin", EPOCH, off


@pytest.mark.parametrize("seed", range(30))
def test_long_lives_of_a_lane_follow_the_model(client: Any, seed: int) -> None:
    """A lane over days of log time, mostly well: batches in parts, holds, expiry, field removal; equal after every step."""
    dice, log = random.Random(seed), NOW_MS
    gen, model = ready(client), Lane()
    model.begin(EPOCH, 0, gen)
    model.apply(EPOCH, 0, "t0", 0, False, None, NOW_MS, [[], [], [], []])
    model.end(EPOCH, gen, 0)
    for _ in range(60):
        log += dice.choice([0, 1, HOUR * 1000, 12 * HOUR * 1000])
        if model.m["state"] == "COLD" and dice.random() < 0.6:
            operation: tuple[Any, ...] = ("end", EPOCH, True, int(model.m["off"]))
        else:
            operation = likely(dice, model, log)
        real, wanted = step(client, model, operation)
        assert real == wanted, operation
        assert Lane.read(client) == model, operation


def test_a_lane_without_meta_takes_nothing(client: Any) -> None:
    """Where `m` is missing, apply writes nothing and says LOST: the fold has to rewrite the lane."""
    assert apply(client, 5, [[["acme~acct", "calls L:0 u", "1"]], [], [], []])[0] == "LOST"
    assert client.dbsize() == 0


def test_an_apply_twice_is_an_apply_once(client: Any) -> None:
    """The same call again changes nothing, a hold's close included."""
    ready(client)
    model = Lane.read(client)
    model.hold("h1", [("acme~acct", "calls h:0", BIG, NOW_S + HOUR)], NOW_MS)
    model.write(client)
    body = [[], [[NOW_S + HOUR, "acme~acct", "calls h:0 u", str(BIG)]], [["acme", "v", "1"]], ["h1"]]
    apply(client, 5, body)
    once = Lane.read(client)
    assert once.s == {"acme~acct": {"calls h:0 u": str(BIG), "calls h:0 h": "0"}}
    assert (once.h, once.hx) == ({}, {})
    assert apply(client, 5, body)[0] == "OK"
    assert Lane.read(client) == once


def test_redis_behind_what_the_fold_was_told_is_cold_and_unwritten(client: Any) -> None:
    """`expect` beyond the lane's offset: an older copy came back; COLD, and not one total written."""
    ready(client)
    apply(client, 5, [[["acme~acct", "calls L:0 u", "1"]], [], [], []])
    assert apply(client, 9, [[["acme~acct", "calls L:0 u", "3"]], [], [], []], expect=7)[:3] == ("LOST", "5", "COLD")
    assert Lane.read(client).s == {"acme~acct": {"calls L:0 u": "1"}}


def test_a_part_without_its_predecessors_is_refused(client: Any) -> None:
    """Part 1 after a failover that took part 0, or after another batch's part 0, is BROKEN and writes nothing."""
    ready(client)
    assert apply(client, 5, [[], [], [], []], tok="a", part=1, more="1")[0] == "BROKEN"
    apply(client, 5, [[], [], [], []], tok="a", more="1")
    apply(client, 5, [[], [], [], []], tok="b", more="1")
    assert apply(client, 5, [[["acme~acct", "calls L:0 u", "1"]], [], [], []], tok="a", part=1)[0] == "BROKEN"
    assert Lane.read(client).s == {}
    assert Lane.read(client).m["off"] == "0"


def test_totals_never_go_back_behind_a_torn_batch(client: Any) -> None:
    """What is older than anything begun is OLD, even if that batch never became complete."""
    ready(client)
    apply(client, 20, [[["acme~acct", "calls L:0 u", "9"]], [], [], []], more="1")
    assert apply(client, 15, [[["acme~acct", "calls L:0 u", "4"]], [], [], []])[0] == "OLD"
    assert Lane.read(client).s["acme~acct"]["calls L:0 u"] == "9"


def test_an_older_copy_of_a_rewrite_does_not_become_ready(client: Any) -> None:
    """After a failover inside a rewrite its end finds less than it wrote: LOST, and the lane stays COLD."""
    gen = begin(client, 5)[3]
    older = Lane.read(client)
    assert older.m["off"] == "-1"
    apply(client, 5, [[["acme~acct", "calls L:0 u", "1"]], [], [], []])
    older.write(client)
    assert run(client, REWRITE_END, EPOCH, gen, 5)[:1] == ["LOST"]
    assert Lane.read(client).m["state"] == "COLD"


def test_two_rewrites_never_share_a_generation(client: Any) -> None:
    """Each begin has a higher generation than the one it found, so the end of an earlier rewrite means nothing."""
    first, second = begin(client)[3], begin(client)[3]
    assert int(second) > int(first)
    client.hset(f"{TAG}m", "gen", str(2**52))
    assert begin(client)[3] == str(2**52 + 1)
    assert run(client, REWRITE_END, EPOCH, first, 0)[0] == "EPOCH"


def test_a_rewrite_belongs_to_the_latest_growth_step(client: Any) -> None:
    """A log that has grown takes the lane over; its predecessor, or another log of the same step, is refused."""
    begin(client, 50)
    assert begin(client, 99, OTHER_EPOCH)[0] == "EPOCH"
    assert begin(client, 3, LATER_EPOCH)[0] == "OK"
    assert begin(client, 99, EPOCH)[0] == "EPOCH"
    assert apply(client, 99, [[], [], [], []])[0] == "EPOCH"


def test_a_release_never_makes_a_field(client: Any) -> None:
    """Closing a hold whose field was removed leaves the field away: made again it would be negative for ever."""
    ready(client)
    model = Lane.read(client)
    model.hold("h1", [("acme~acct", "calls h:0", 5, NOW_S + HOUR)], NOW_MS)
    model.s = {}
    model.write(client)
    apply(client, 5, [[], [], [], ["h1"]])
    assert Lane.read(client).s == {}


def test_the_largest_calls_fit(client: Any) -> None:
    """A thousand totals of one scope, fifty closes, and a policy of a thousand limits for three kinds each go through."""
    ready(client)
    fields = [text for n in range(1_000) for text in (f"calls h:{n} u", str(BIG))]
    assert apply(client, 1, [[["acme~acct", *fields]], [], [], []])[0] == "OK"
    assert apply(client, 2, [[], [[NOW_S + HOUR, "acme~user:u1", *fields]], [], []])[0] == "OK"
    assert {client.zcard(f"{TAG}fx"), client.hlen(f"{TAG}s:acme~acct"), client.hlen(f"{TAG}s:acme~user:u1")} == {1_000}
    model = Lane.read(client)
    for n in range(50):
        model.hold(f"h{n}", [("acme~acct", "calls h:0", 1, 0)], NOW_MS)
    model.write(client)
    assert apply(client, 3, [[], [], [], [f"h{n}" for n in range(50)]])[0] == "OK"
    assert client.hget(f"{TAG}s:acme~acct", "calls h:0 h") == b"0"
    rows = [("principal", f"meter{n}", "h", n) for n in range(1_000)]
    policy = gate_fields({**counts(limits=rows), "outage": "open", "max_staleness_s": 9}, 7, False)
    assert apply(client, 4, [[], [], [["acme", *policy]], []])[0] == "OK"
    assert client.hlen(f"{TAG}p:acme") == 3_006


def test_a_total_of_a_swept_window_is_not_made_again(client: Any) -> None:
    """A total whose window ended a day before the lane's log time is left out; a millisecond earlier it is written."""
    ready(client)
    end = NOW_S + HOUR
    body = [[["acme~acct", "calls L:0 u", "1"]], [[end, "acme~acct", "calls h:0 u", "5"]], [], []]
    apply(client, 1, [[], [], [], []], log=(end + DAY) * 1000 - 1)
    apply(client, 2, body)
    assert set(Lane.read(client).s["acme~acct"]) == {"calls L:0 u", "calls h:0 u"}
    client.delete(f"{TAG}s:acme~acct", f"{TAG}fx")
    apply(client, 3, [[], [], [], []], log=(end + DAY) * 1000)
    apply(client, 4, body)
    assert (set(Lane.read(client).s["acme~acct"]), Lane.read(client).fx) == ({"calls L:0 u"}, {})


def test_a_policy_replaces_the_one_before(client: Any) -> None:
    """A limit that the new policy does not have is gone from `p`."""
    ready(client)
    apply(client, 1, [[], [], [["acme", "v", "1", "acct|calls|h", "5"]], []])
    apply(client, 2, [[], [], [["acme", "v", "2"]], []])
    assert Lane.read(client).p == {"acme": {"v": "2"}}


def test_sweep_removes_fields_a_day_after_their_window(client: Any) -> None:
    """A window's `u` and `h` go once its end lies a day behind the lane's log time, not a millisecond sooner."""
    ready(client)
    end = NOW_S + HOUR
    apply(client, 1, [[], [[end, "acme~acct", "calls h:0 u", "5"]], [], []], log=(end + DAY) * 1000 - 1)
    assert run(client, SWEEP, 10) == ["OK", [], [], 0, 0]
    apply(client, 2, [[], [], [], []], log=(end + DAY) * 1000)
    assert run(client, SWEEP, 10) == ["OK", [], [], 1, 0]
    assert (Lane.read(client).s, Lane.read(client).fx) == ({}, {})


def test_sweep_asks_about_captured_holds_and_expires_open_ones(client: Any) -> None:
    """A due open hold gives back its amounts once and is reported; a captured one is asked about again and again."""
    ready(client)
    model = Lane.read(client)
    for name in ("open", "captured"):
        model.hold(name, [("acme~acct", "calls d:0", BIG, NOW_S + DAY)], NOW_MS)
    model.capture("captured", NOW_MS)
    model.write(client)
    swept = Swept.read(client.eval(SWEEP.text, 1, f"{TAG}m", 10))
    assert (swept.unsettled, swept.asked) == (["open"], [("captured", "5" * 32, 7)])
    found = Lane.read(client)
    assert found.s["acme~acct"]["calls d:0 h"] == str(BIG)
    assert found.h["open"]["st"] == "X"
    assert found.i == {"acme~call-captured"}
    apply(client, 1, [[], [], [], ["open"]])
    assert Lane.read(client).s["acme~acct"]["calls d:0 h"] == str(BIG)
