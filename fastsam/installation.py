"""Which installed distribution these files belong to: ours is `fastsam-torch`; `fastsam` is an unrelated project's.

Both names can bring a package that is imported as `fastsam`, and then they write over each other's files: the one that
was installed last is imported, and to uninstall either one deletes what both wrote.
"""

import warnings
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

DISTRIBUTION = "fastsam-torch"
REMEDY = f"Run pip uninstall fastsam, then install {DISTRIBUTION} again with pip's --force-reinstall"


def installed_version() -> str:
    """Return the version of the installed distribution, "0+unknown" in a source tree that is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0+unknown"


def warn_if_shared(file: str) -> None:
    """Warn where an installed distribution `fastsam` lists this file of our package as its own.

    Args:
        file: path of a module of this package.
    """
    for other in distributions(name="fastsam"):
        # what an installer wrote; a source tree's egg-info lists files too, which it does not own
        is_installed = other.read_text("RECORD") is not None
        files = other.files or () if is_installed else ()
        if any(Path(str(other.locate_file(path))).resolve() == Path(file).resolve() for path in files):
            warnings.warn(
                f"the installed distribution 'fastsam' {other.version} is not {DISTRIBUTION} but lists {file} as its "
                f"own; to update or uninstall it breaks this package. {REMEDY}",
                stacklevel=3,
            )


def why_not_ours(package: object) -> str | None:
    """Return what to say where the imported package `fastsam` is another project's, None where it is ours.

    Args:
        package: the imported module `fastsam`.
    """
    if hasattr(package, "SAM") and hasattr(package, "__version__"):
        return None
    where = getattr(package, "__file__", None) or "the package fastsam, which has no __init__.py,"
    return f"{where} is not {DISTRIBUTION}'s; another distribution wrote over it or deleted it. {REMEDY}"
