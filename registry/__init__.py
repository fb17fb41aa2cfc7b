"""The record of what a model has learnt: entries, their neuron sets and overlays, evaluations and runs."""

from registry.entries import Registry
from registry.records import Entry, Evaluation, NewEntry, Run

__all__ = ["Entry", "Evaluation", "NewEntry", "Registry", "Run"]
