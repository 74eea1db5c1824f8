"""Names and sizes as Kubernetes writes them: the same check on the laptop and on the cluster, in the same words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function


@dataclass(frozen=True)
class Form:
    """Text that matches `pattern` as a whole; `sentence` is told of text that does not."""

    pattern: str
    max_length: int
    sentence: str

    def check(self, value: str) -> str:
        if len(value) > self.max_length:
            raise ValueError(f"Too long: may not be more than {self.max_length} bytes")
        if not re.fullmatch(self.pattern, value):
            raise ValueError(self.sentence)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        rule = {"rule": f"self.matches('^({self.pattern})$')", "message": self.sentence}
        return {"type": "string", "maxLength": self.max_length, "x-kubernetes-validations": [rule]}


_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN = f"{_LABEL}([.]{_LABEL})*"
_WORD = "[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
ManagerName = Annotated[
    str, Form(f"{_DOMAIN}/{_WORD}", 63, "must be a domain and a name, such as kueue.x-k8s.io/multikueue")
]
ResourceName = Annotated[
    str,
    Form(
        f"{_DOMAIN}/{_WORD}",
        253,
        "must be the name of an extended resource, such as nvidia.com/gpu or rdma/hca",
    ),
]
ObjectName = Annotated[
    str, Form(_DOMAIN, 253, "must be the name of an object: lower-case letters, digits, dashes and dots")
]
ImageTag = Annotated[
    str, Form("[A-Za-z0-9_][A-Za-z0-9_.-]*", 128, "must be a tag of an image, such as 1.2.0")
]
MemorySize = Annotated[
    str,
    Form(
        "[1-9][0-9]*(Ki|Mi|Gi|Ti|k|M|G|T)?",
        16,
        "must be a number of bytes, or one with a unit: Ki, Mi, Gi, Ti (powers of 1024) or k, M, G, T (powers of "
        "1000), such as 64Gi",
    ),
]
