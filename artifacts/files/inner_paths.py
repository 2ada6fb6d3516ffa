"""Names of files that a document gives, which may not lead out of the document's folder."""

from pathlib import PurePath


def leads_outside(name: str) -> bool:
    """Return whether a relative name leads out of the folder it is relative to, by what it says.

    Links are not followed: the hub's own cache consists of links into a neighbouring folder.
    """
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name
