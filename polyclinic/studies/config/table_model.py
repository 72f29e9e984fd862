"""The base of all tables of a study file."""

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """A table of a study file: its keys are known, its values of the right kind, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
