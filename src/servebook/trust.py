"""Who, beside this user, may change a file or folder; with the standard library only."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def not_only_mine(path: Path) -> str:
    """Why others than this user and root may write to `path`, or to what a folder holds; "" where they may not.

    A folder with the sticky bit, such as /tmp, gives others no way to what is mine in it.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        return f"it belongs to {_user(found.st_uid)}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return ""
    if found.st_mode & stat.S_IWOTH:
        return "every user of this machine may write to it"
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        return f"group {_group(found.st_gid)} may write to it"
    return ""


def others_may_read(path: Path) -> bool:
    """Whether users beside the owner may read a file.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    found = path.stat()
    return bool(found.st_mode & stat.S_IROTH or (found.st_mode & stat.S_IRGRP and not _is_private(found.st_gid)))


def _is_private(gid: int) -> bool:
    """Whether it is this user's own group, as Debian and others make one for each user."""
    try:
        me, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return me.pw_gid == gid and set(group.gr_mem) <= {me.pw_name} and group.gr_name == me.pw_name


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
