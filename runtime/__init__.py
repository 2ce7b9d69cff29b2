"""The engine: any mixture-of-experts model in less memory than it needs, exactly.

import runtime
engine = runtime.load("profiles/my-model.yaml")     # or a checkpoint folder, or a hub id
engine.model.generate(**engine.tokenizer("Hello", return_tensors="pt").to(engine.model.device))
print(engine.stats().summary())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.build import load, load_reference
    from runtime.engine import Engine

__all__ = ["Engine", "load", "load_reference"]


def __getattr__(name: str) -> Any:
    """`load` and its kin, imported when first asked for: the decision modules must be usable without torch."""
    if name == "Engine":
        from runtime.engine import Engine

        return Engine
    if name in __all__:
        from runtime import build

        return getattr(build, name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
