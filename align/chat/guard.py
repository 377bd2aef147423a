"""Renders a foreign chat template once in a child process with limits, before anything renders it in ours.

Jinja's sandbox stops a template from running code, not from looping for ever or filling the memory (a constant
product like `'a' * 2e8` even does so while it is compiled). A template that misbehaves only for certain contents is
not found here. Where the system has no resource limits (Windows), only the time is limited.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from align.errors import AlignError

CPU_SECONDS = 2  # two short messages take milliseconds
WALL_SECONDS = 120  # a loaded machine takes long to import the renderer; the work itself has CPU_SECONDS
MEMORY_BYTES = 512 * 2**20  # beyond what the child holds when it begins to render
OUTPUT_CHARACTERS = 1_000_000
TEMPLATE_CHARACTERS = 1_000_000

_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
_FINE, _TOO_LONG, _TOO_MUCH = 0, 3, 4


@lru_cache(maxsize=16)
def guard(template: str) -> None:
    """Refuse a template that takes too much time or memory to render two short messages.

    A template that merely fails to render passes: whoever renders it next gets its own message.
    """
    if len(template) > TEMPLATE_CHARACTERS:
        raise _refusal(f"{len(template):,} characters long")
    command = [sys.executable, "-P", "-m", "align.chat.guard"]  # -P: no modules from the working folder
    try:
        child = subprocess.run(command, input=template.encode(), capture_output=True, timeout=WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _refusal(f"not done after {WALL_SECONDS} seconds") from None
    if child.returncode == _TOO_LONG:
        raise _refusal(f"more than {OUTPUT_CHARACTERS:,} characters of output")
    if child.returncode == _TOO_MUCH or child.returncode < 0:  # < 0: killed by the system at a limit
        raise _refusal(f"more than {CPU_SECONDS} seconds or {MEMORY_BYTES // 2**20} MiB")
    if child.returncode != _FINE:
        raise RuntimeError(f"the guard against costly templates failed: {child.stderr.decode(errors='replace')}")


def _refusal(what: str) -> AlignError:
    return AlignError(
        f"the chat template is refused: rendering two short messages with it takes too much ({what})",
        "It may be an attack on whoever renders it. Set `template:` in the recipe to a Jinja file that you trust.",
    )


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:
        return
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS + 1))
    held = _address_space()
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))


def _address_space() -> int:
    """Bytes of address space of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _render_probe(template: str) -> int:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_resources()
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        for messages, ask in ((_PROBE[:1], True), (_PROBE, False)):
            texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=ask, **special)
            if len(texts[0]) > OUTPUT_CHARACTERS:
                return _TOO_LONG
    except MemoryError:
        return _TOO_MUCH
    except Exception:  # not a matter of cost: whoever renders it next says what is wrong
        return _FINE
    return _FINE


if __name__ == "__main__":
    sys.exit(_render_probe(sys.stdin.buffer.read().decode()))
