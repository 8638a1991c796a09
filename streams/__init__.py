"""WHAT HAPPENS: folds of the log and what reads their effects. Imports schemas and connectors."""
