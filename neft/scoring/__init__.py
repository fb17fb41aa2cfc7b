"""Scorers, one a file, found by name in a config."""

from neft.scoring.activation import Activation
from neft.scoring.fisher import Fisher
from neft.scoring.keystone import Keystone
from neft.scoring.random import Random
from neft.scoring.scores import Scorer, Scores
from neft.scoring.similarity import Similarity
from neft.scoring.taylor import Taylor
from neft.scoring.weight import Weight

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer for scorer in (Taylor, Fisher, Activation, Weight, Similarity, Keystone, Random)
}

__all__ = ["SCORERS", "Scorer", "Scores"]
