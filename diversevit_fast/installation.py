"""How this package was installed, what its extras need, and the command that installs one.

No index need serve this package: it may lie in a checkout or a wheel file. Installers write down where
they took a package from (PEP 610), and that is where an extra is installed from.
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

DISTRIBUTION = "diversevit-fast"


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this package, from where the package itself came."""
    found = distribution()
    came = found and found.read_text("direct_url.json")
    if came:
        source = _source(json.loads(came), extra)
    elif found and found.read_text("INSTALLER"):  # from an index, which is not written down
        source = f'"{DISTRIBUTION}[{extra}]"'
    else:
        source = None
    return f"pip install {source or _CHECKOUT.format(extra=extra)}"


def distribution() -> metadata.Distribution | None:
    """Return the metadata of the installed package; None where it is only found on Python's path."""
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements(extra: str = "") -> list[str]:
    """Return the distributions that an extra adds here, those of the extras in it too, in order.

    Args:
        extra: as pyproject.toml names it; ``""`` for what the package needs by itself.
    """
    from packaging.requirements import Requirement  # beside typer: for the command line
    from packaging.utils import canonicalize_name

    found, names = distribution(), list[str]()
    for line in (found and found.requires) or ():
        needed = Requirement(line)
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if always if extra else not always:
            continue
        if extra and not (needed.marker and needed.marker.evaluate({"extra": extra})):
            continue
        if canonicalize_name(needed.name) == DISTRIBUTION:
            names += [name for inner in sorted(needed.extras) for name in requirements(inner)]
        else:
            names.append(canonicalize_name(needed.name))
    return list(dict.fromkeys(names))


def extras() -> list[str]:
    """Return the names of the extras, in alphabetical order."""
    found = distribution()
    return sorted(found.metadata.get_all("Provides-Extra") or ()) if found else []


_CHECKOUT = '-e ".[{extra}]" in a checkout of this package'


def _source(came: dict[str, Any], extra: str) -> str | None:
    """Return what pip is told to install for an entry of ``direct_url.json``; None if it is no longer there."""
    url = came["url"]
    if not url.startswith("file:"):
        kind = came.get("vcs_info", {}).get("vcs")
        return f'"{DISTRIBUTION}[{extra}] @ {f"{kind}+" if kind else ""}{url}"'
    path = Path(url2pathname(unquote(urlparse(url).path)))
    if not path.exists():
        return None
    editable = "-e " if came.get("dir_info", {}).get("editable") else ""
    return f'{editable}"{path}[{extra}]"'
