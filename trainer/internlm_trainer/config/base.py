"""What all parts of the description have in common: their base class, and numbers of tokens with a unit."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "B": 10**9,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
QUANTITY_PATTERN = r"^([1-9][0-9]*(Ki|Mi|Gi|Ti)?|[0-9]+([.][0-9]{1,3})?(k|M|B|G|T))$"
MAX_QUANTITY_LENGTH = 16
QUANTITY_SENTENCE = (
    "must be a whole number of tokens of at least 1, or one with a unit: k, M, B, G, T (powers of 1000) or "
    "Ki, Mi, Gi, Ti (powers of 1024), such as 4Mi or 200B"
)


def parse_quantity(value: object) -> int:
    """Tokens as an integer: `4194304`, `"4Mi"` and `"1.5B"` are all accepted.

    Raises ValueError for anything else, with the sentence that the cluster gives too.
    """
    tokens = 0
    if isinstance(value, str) and len(value) > MAX_QUANTITY_LENGTH:
        raise ValueError(f"Too long: may not be more than {MAX_QUANTITY_LENGTH} bytes")
    if isinstance(value, int) and not isinstance(value, bool):
        tokens = value
    elif isinstance(value, str) and re.fullmatch(QUANTITY_PATTERN, value):
        number, unit = re.match(r"([0-9.]+)(.*)", value).groups()  # type: ignore[union-attr]
        whole, _, fraction = number.partition(".")
        tokens = int(whole + fraction) * UNITS[unit] // 10 ** len(fraction)
    if not 1 <= tokens < 2**63:
        raise ValueError(QUANTITY_SENTENCE)
    return tokens


Tokens = Annotated[
    int,
    BeforeValidator(parse_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": MAX_QUANTITY_LENGTH,
            "x-kubernetes-validations": [
                {
                    "rule": f"type(self) == int ? int(self) >= 1 : string(self).matches('{QUANTITY_PATTERN}') "
                    "&& quantity(string(self).replace('B', 'G')).isInteger() "
                    "&& quantity(string(self).replace('B', 'G')).isGreaterThan(quantity('0'))",
                    "message": QUANTITY_SENTENCE,
                }
            ],
        }
    ),
]


class Spec(BaseModel):
    """Base of every part of the description: camelCase, strict types, nothing unknown, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        """`field: null` is a field that was left out, as it is for the API server."""
        if not isinstance(value, dict):
            return value
        known = {field.alias for field in cls.model_fields.values()}
        return {name: item for name, item in value.items() if item is not None or name not in known}
