"""Tollway: usage metering as a fold of one log."""
