"""The record of what a model has learnt: entries, their neuron sets and overlays, evaluations and runs."""

from registry.answers import (
    Difference,
    Found,
    Lineage,
    Near,
    Overlap,
    OverlapMatrix,
    Owner,
    SiteCapacity,
    Strong,
    TaskSummary,
)
from registry.entries import Registry
from registry.records import Entry, Evaluation, NewEntry, Run

__all__ = [
    "Difference",
    "Entry",
    "Evaluation",
    "Found",
    "Lineage",
    "Near",
    "NewEntry",
    "Overlap",
    "OverlapMatrix",
    "Owner",
    "Registry",
    "Run",
    "SiteCapacity",
    "Strong",
    "TaskSummary",
]
