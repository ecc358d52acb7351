"""The small protocols that every execution backend implements.

A backend opens a bundle as a chain of stages, allocates its buffers once, and runs them many times. It knows tensors by name, and nothing
about pictures, instructions or robots.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError
from bundle.manifest import Manifest

if TYPE_CHECKING:
    from runtime.chain import Chain

Feeds = Mapping[str, NDArray[np.generic]]
Outputs = dict[str, NDArray[np.generic]]


def checked_feed(
    file: str, name: str, array: NDArray[np.generic], shape: tuple[int, ...], dtype: object
) -> NDArray[np.generic]:
    """Return a feed that has exactly the declared shape and type; broadcasting one camera to two would be silent.

    Raises:
        BackendError: it has not.
    """
    if array.shape != shape or array.dtype != dtype:
        raise BackendError(
            f"{file} got a wrong input {name}",
            got=f"{array.dtype}{list(array.shape)}",
            expected=f"{dtype}{list(shape)}",
            hint="feed what the manifest says.",
        )
    return array


class Stage(Protocol):
    """A loaded graph with its buffers."""

    def run(self, feeds: Feeds) -> Outputs:
        """Execute once. The returned arrays are the stage's own buffers: valid until the next run, copy to keep.

        Raises:
            BackendError: execution failed.
        """
        ...


class Backend(Protocol):
    """A way to execute a policy, with the name that `Policy.load(backend=...)` takes."""

    name: str
    remark: str
    """What a person should know about how the opened bundle is computed; mostly empty."""

    def open(self, folder: Path, manifest: Manifest) -> Chain:
        """Load the stages of a bundle as one chain. The language stage may wait until a prompt tells its length.

        Raises:
            BackendError: the runtime refuses a graph, or the bundle has nothing for this backend.
        """
        ...
