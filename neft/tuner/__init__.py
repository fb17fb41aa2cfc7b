"""NEFT as a PEFT method; importing this package registers it with PEFT."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    """Add a true member to PEFT's closed enum, which `register_peft_method` demands.

    PEFT has no hook for methods from outside (0.21.2), so the member is made as `enum` itself makes it.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, __objclass__=PeftType, _sort_order_=len(PeftType.__members__))
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


_add_peft_type("NEFT")

# The config's class needs the member above.
from neft.tuner.config import NeftConfig  # noqa: E402
from neft.tuner.layer import NeftLinear  # noqa: E402
from neft.tuner.model import NeftModel  # noqa: E402

register_peft_method(name="neft", config_cls=NeftConfig, model_cls=NeftModel, prefix="neft_")

__all__ = ["NeftConfig", "NeftLinear", "NeftModel"]
