"""What schemathesis is told of the server that it tests: one of its models, or else nearly every answer is a 404.

A model that the document does not allow stays as it is: it is there to be refused.
"""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or not isinstance(model := body.get("model"), str):
        return body
    return {**body, "model": "mug"} if len(model) % 2 and len(model) <= 200 else body
