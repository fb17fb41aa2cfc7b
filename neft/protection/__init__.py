"""Protection policies, one a file, found by name in a config."""

from neft.protection.distill import Distill
from neft.protection.exclude import Exclude
from neft.protection.functional import Functional
from neft.protection.keystone import KeystoneGuard
from neft.protection.none import Unprotected
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy
from neft.protection.replay import Replay
from neft.protection.soft import Soft

POLICIES: dict[str, type[ProtectionPolicy]] = {
    policy.name: policy for policy in (Exclude, Functional, KeystoneGuard, Soft, Replay, Distill, Unprotected)
}

__all__ = ["POLICIES", "Candidates", "Learnt", "ProtectionPolicy"]
