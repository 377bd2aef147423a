"""Entry point of the `align` command. Importing it imports nothing more: a Ctrl-C while the commands are loaded ends as one."""

from __future__ import annotations

import os
import stat
import sys


def main() -> None:
    """Carries out what the command line says."""
    try:
        keep_others_out()
        from align.cli.commands import carry_out

        carry_out()
    except KeyboardInterrupt:
        sys.exit(130)


def keep_others_out() -> None:
    """Nothing that is made from here on can be written by everybody, whatever the shell's umask says."""
    os.umask(os.umask(0o077) | stat.S_IWOTH)
