"""Files that are there as a whole or not at all, whenever a run is stopped."""

from etils import epath


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file under another name beside it, and then gives it its own."""
    unfinished = path.parent / f"unfinished-{path.name}"
    unfinished.write_bytes(content)
    unfinished.replace(path)
