"""Versions of installed packages, this one included."""

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "multimodal-stream"


def installed_version(package: str) -> str | None:
    """The version of a package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_version() -> str:
    """The installed version of this library, or 'unknown' when run from a bare source tree."""
    return installed_version(PACKAGE) or "unknown"
