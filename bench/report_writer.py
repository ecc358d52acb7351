"""A latency result as one HTML file: no network, no scripts, every foreign text escaped.

What stands on the page is bench/report_content.py's business, how it looks bench/report_page.html.jinja's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.report_content import content
from bench.results import Result
from bundle.atomic import write_bytes
from bundle.errors import ConfigError
from export.html_page import check_jinja2, fill

_PAGE = Path(__file__).with_name("report_page.html.jinja")


def check_report() -> None:
    """Find out that no report can be drawn before a long measurement rather than after.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    check_jinja2("a report")


def write_report(result: Result, path: Path) -> None:
    """Write a result as a page, atomically; without pictures where matplotlib is not installed.

    Raises:
        ConfigError: jinja2 is not installed, or the path is a folder.
        StorageError: the disk refuses.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", expected="a file to write", hint="name it, e.g. report.html")
    write_bytes(path, page(result).encode())


def page(result: Result) -> str:
    """The page as text.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    check_report()
    filters: dict[str, Callable[..., str]] = {
        "ms": _ms,
        "ratio": "{:.3g}".format,
        "percent": "{:.1%}".format,
        "words": _words,
    }
    return fill(_PAGE, content(result), filters)


def _ms(value: float | None) -> str:
    """Three digits that matter, two decimals at most."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _words(ratio: Sequence[float]) -> str:
    value, low, high = ratio
    if low <= 1 <= high:
        return "no difference shown"
    return f"{1 / value:.1f} times as fast" if value < 1 else f"{value:.1f} times as slow"
