"""The small protocol that every execution backend implements.

A backend loads a stage's graph once, allocates its buffers once, and runs it many times. It knows tensors by name, and nothing about
policies, prompts or robots.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Graph

Feeds = Mapping[str, NDArray[np.generic]]
Outputs = dict[str, NDArray[np.generic]]


class Stage(Protocol):
    """A loaded graph with its buffers."""

    def run(self, feeds: Feeds) -> Outputs:
        """Execute once. The returned arrays are the stage's own buffers: valid until the next run, copy to keep.

        Raises:
            BackendError: execution failed.
        """
        ...


class Backend(Protocol):
    """A way to execute stages, with the name that `Policy.load(backend=...)` takes."""

    name: str

    def load(self, folder: Path, graph: Graph) -> Stage:
        """Load one graph of a bundle.

        Raises:
            BackendError: the runtime refuses the graph.
        """
        ...
