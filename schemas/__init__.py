"""WHAT TRAVELS: the contracts. Imports nothing else of this project."""
