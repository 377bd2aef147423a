"""Which file system a folder lies on. Linux only: elsewhere the answer is that we do not know of a network."""

from __future__ import annotations

from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "lustre", "beegfs", "gpfs", "ceph"}
)


def network_filesystem(folder: Path) -> str | None:
    """Type of the network file system below `folder`, or None. SQLite's WAL needs shared memory, so it fails on these."""
    if not MOUNTS.exists():
        return None
    place = folder.resolve()
    best, kind = Path(), ""
    for line in MOUNTS.read_text(errors="surrogateescape").splitlines():
        _, mount, this_kind, *_ = line.split(" ")
        point = Path(mount.replace("\\040", " "))
        if (place == point or point in place.parents) and len(point.parts) >= len(best.parts):
            best, kind = point, this_kind
    return kind if kind in NETWORK else None
