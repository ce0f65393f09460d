"""How every benchmark ends: its result as one JSON object on the last line, and in a file where one is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def publish(result: Mapping[str, Any], out: Path | None) -> int:
    """Print the result, and write it to `out`; returns the exit status of the command."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0
