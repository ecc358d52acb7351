"""Pages as one HTML file: a template beside the module that fills it, every foreign text escaped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bundle.errors import ConfigError


def check_jinja2(what: str) -> None:
    """Find out that no page can be made before long work rather than after.

    Args:
        what: is to be made, for the message.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError(f"{what} needs jinja2", expected="the extra `report`", hint="pip install 'jetvla[report]'")


def fill(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> str:
    """The page as text; a name that the template uses and nobody gave is an error. jinja2 must be installed."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(values)
