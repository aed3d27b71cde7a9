"""The bodies that clients send."""

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """Unknown keys are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)
