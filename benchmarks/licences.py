"""Lists the licences of what is installed with the project: `python -m benchmarks.licences [PAGE]`.

Writes the table of docs/licences.md, or refuses: every package must name a licence, and the licence must be known here.
"""

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("rtx", "corpora", "serve", "genai")
"""Those that the development environment has; the others are named on the page."""

SPDX: Mapping[str, str] = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Proprietary": "LicenseRef-NVIDIA-Proprietary",
    "Other/Proprietary License": "LicenseRef-NVIDIA-Proprietary",
    "Python Software Foundation License": "PSF-2.0",
}
"""What older metadata say → SPDX's name."""

ACCEPTED = frozenset(
    {
        *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
        *("CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"),
    }
)
"""Licences under which the project may be used and passed on together with the package."""

PROPRIETARY = re.compile(r"tensorrt-.*|nvidia-.*")
"""Packages that may have NVIDIA's own licence: extras install them from NVIDIA's wheels, and the project has none."""


class LicenceError(Exception):
    """A package's licence is missing, unknown, or not accepted."""


def licence_of(package: str, metadata: Mapping[str, list[str]]) -> str:
    """Return the SPDX expression of a package.

    Args:
        metadata: Its `License-Expression`, `License` and `Classifier` entries.

    Raises:
        LicenceError: Names the package and what it says.
    """
    classifiers = [text.split(" :: ")[-1] for text in metadata.get("Classifier", []) if text.startswith("License ::")]
    stated = [*metadata.get("License-Expression", []), *metadata.get("License", []), *classifiers]
    for text in stated:
        expression = SPDX.get(text.strip(), text.strip())
        parts = set(re.split(r" AND | OR ", expression.replace("(", "").replace(")", "")))
        if parts <= ACCEPTED or (expression in SPDX.values() and PROPRIETARY.fullmatch(package)):
            return expression
    said = "; ".join(" ".join(text.split())[:60] for text in stated) or "nothing"
    raise LicenceError(f"{package}: its metadata say {said!r}, no accepted licence; see benchmarks/licences.py")


def installed(requirements: list[Requirement]) -> Iterator[importlib.metadata.Distribution]:
    """Yield what requirements install here, with all that it requires in turn.

    Raises:
        PackageNotFoundError: Something is not installed.
    """
    seen: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        yield distribution
        waiting += map(Requirement, distribution.requires or [])


def licences() -> dict[str, str]:
    """Return package → SPDX expression of all that the project and `EXTRAS` install.

    Raises:
        LicenceError: A licence is missing or not accepted.
        PackageNotFoundError: Something is not installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    keys = ("License-Expression", "License", "Classifier")
    found = {}
    for distribution in installed([Requirement(line) for line in [*project["dependencies"], *extras]]):
        name = canonicalize_name(distribution.metadata["Name"])
        found[name] = licence_of(name, {key: distribution.metadata.get_all(key) or [] for key in keys})
    return dict(sorted(found.items()))


def table(found: Mapping[str, str]) -> str:
    """Return the page's table."""
    rows = [f"| {name} | {expression} |" for name, expression in found.items()]
    return "\n".join(["| package | licence |", "|---|---|", *rows]) + "\n"


def main() -> None:
    """Write the table into the page, from its first row on, or print it."""
    try:
        written = table(licences())
    except (LicenceError, importlib.metadata.PackageNotFoundError) as error:
        sys.exit(str(error))
    if len(sys.argv) == 1:
        print(written, end="")
        return
    page = Path(sys.argv[1])
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.index("| package |")] + written, encoding="utf-8")


if __name__ == "__main__":
    main()
