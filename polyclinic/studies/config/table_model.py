"""The base of all tables of a study file."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Table(BaseModel):
    """A table of a study file: its keys are known, its values of the right kind, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    UNSET: ClassVar[frozenset[str]] = frozenset()
    """Keys that are left out of the hash and of plans if they are not set."""

    @model_serializer(mode="wrap")
    def _set_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value is not None or key not in self.UNSET}
