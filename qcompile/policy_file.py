"""A policy as it is named outside Python: by its name, or by a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import PolicyError
from .policy import Policy


def policy_from(value: Any) -> Policy:
    """As :meth:`~qcompile.policy.Policy.parse`; a text that ends in ``.json`` names a file of
    :meth:`~qcompile.policy.Policy.to_json` or :meth:`~qcompile.allocation.Search.save`.

    Raises :class:`~qcompile.errors.PolicyError` for a file that cannot be read or holds no policy.
    """
    if not (isinstance(value, str) and value.endswith(".json")):
        return Policy.parse(value)
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"{value}: no policy can be read from it ({error}); give a file that Policy.to_json or Search.save "
                          "wrote") from error  # fmt: skip
    searched = isinstance(content, dict) and "choices" in content
    return Policy.from_json(json.dumps(content["policy"] if searched else content))
