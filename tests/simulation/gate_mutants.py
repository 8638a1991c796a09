"""Faults to plant in the gate contract's model, and the invariants that must name them (gate-contract §5.2, gate-held)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`kind` of worlds that kill it soonest; `worlds` in which at least one must."""

    name: str
    killers: str
    kind: str = "mixed"
    worlds: int = 60


MUTANTS = [
    Mutant("additive", "IDEMPOTENT Q.EQUAL OVERGRANT"),
    Mutant("apply_drops_h", "TIE"),
    Mutant("apply_skips_fx", "FX"),
    Mutant("authorize_ignores_h", "OVERGRANT"),
    Mutant("authorize_ignores_u", "OVERGRANT"),
    Mutant("authorize_skips_fx", "FX"),
    Mutant("call_id_outlives_expiry", "CALLID", "days"),
    Mutant("call_id_outlives_void", "CALLID"),
    Mutant("capture_forgets_actual", "TIE"),
    Mutant("capture_forgets_held", "TIE"),
    Mutant("close_first_held", "TIE Q.HELD"),
    Mutant("close_nothing", "TIE Q.HELD"),
    Mutant("closes_in_the_first_part", "COVER"),
    Mutant("cold_ignored", "COLDGRANT"),
    Mutant("drawn_lease_is_voided", "LEASE", "leases"),
    Mutant("end_unguarded", "READY", "storm", 200),
    Mutant("ended_totals_are_sent", "FX Q.LEAK", "days", 300),
    Mutant("ends_are_sent_once", "FX Q.LEAK", "days", 200),
    Mutant("expect_ignored", "READY COVER Q.MISSING Q.EQUAL FX EXPIRY", "storm", 200),
    Mutant("expiry_does_not_subtract", "TIE Q.HELD"),
    Mutant("expiry_keeps_amounts", "TIE", "days", 200),
    Mutant("extend_adds", "IDEMPOTENT OVERGRANT", "mixed", 200),
    Mutant("extend_forgets_h", "TIE"),
    Mutant("first_scope_only", "OVERGRANT REFUSAL"),
    Mutant("fold_counts_duplicates", "Q.FOLD"),
    Mutant("fold_counts_in_window_of_arrival", "COVER Q.FOLD"),
    Mutant("gates_do_not_reassert", "HEAL", "storm", 300),
    Mutant("given_up_rewrite_is_not_refreshed", "COVER EXPIRY Q.MISSING Q.EQUAL", "storm", 1_000),
    Mutant("guard_complete_only", "MONOTONE", "mixed", 200),
    Mutant("lane_wide_counter", "HEAL", "mixed", 200),
    Mutant("late_forgets_h", "TIE", "mixed", 200),
    Mutant("late_nothing", "CAPTURED", "mixed", 200),
    Mutant("late_reopens_empty", "CAPTURED", "mixed", 200),
    Mutant("late_subtracts_held_again", "TIE", "mixed", 200),
    Mutant("lease_drawn_after_its_end", "LEASE", "leases"),
    Mutant("lease_overdrawn", "LEASE", "leases"),
    Mutant("lease_usage_names_the_hold", "LEASE COVER", "leases"),
    Mutant("leases_are_not_reasserted", "HEAL", "leases", 200),
    Mutant("log_by_first_part", "EXPIRY", "mixed", 300),
    Mutant("no_floor", "HEAL", "mixed", 200),
    Mutant("no_guard", "MONOTONE", "mixed", 200),
    Mutant("no_part_chain", "COVER", "storm", 100),
    Mutant("no_refresh_on_assignment", "COVER Q.EQUAL Q.MISSING Q.PHANTOM", "mixed", 200),
    Mutant("old_gen_takes", "OLDGEN", "mixed", 200),
    Mutant("ready_early", "READY"),
    Mutant("reassert_adds_again", "IDEMPOTENT TIE", "mixed", 200),
    Mutant("reassert_on_ended", "FX Q.LEAK", "days"),
    Mutant("reassert_only_existing", "TIE"),
    Mutant("refresh_without_ends", "FX Q.LEAK", "days"),
    Mutant("refusal_takes", "REFUSAL"),
    Mutant("release_creates", "TIE Q.HELD", "days", 200),
    Mutant("retry_second_hold", "IDEMPOTENT", "mixed", 200),
    Mutant("second_capture", "CAPTURED"),
    Mutant("sweep_by_fold_clock", "EXPIRY", "mixed", 200),
    Mutant("sweep_does_not_ask", "Q.PHANTOM"),
    Mutant("sweep_expires_captured", "EXPIRY"),
    Mutant("sweep_used_only", "FX Q.LEAK", "days"),
    Mutant("void_captured", "CAPTURED"),
    Mutant("zero_held_at_begin", "TIE"),
]

DIRECTED = ("begin_keeps_off", "no_new_gen", "reassert_uncounted", "unexpected_batch_without_ends")
"""Faults that random worlds seldom reach: tests/test_gate_directed.py leads them there."""

HEALED = ("dirty_dropped_on_old",)
"""Dropping what is dirty when a newer fold is there: its refresh has written it, and sweep asks for the holds."""
