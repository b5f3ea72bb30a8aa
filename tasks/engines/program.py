"""A program as supervisord runs it, and its .ini file: rendered purely, and read back exactly.

supervisord reads an .ini file in four passes, and a text must come through all of them unchanged: a space and
``#`` or ``;`` begin a comment, ``%(here)s`` is replaced, ``%(...)s`` is expanded, and the result is split by
shlex (the command as a shell would; the environment without escapes, its quotes stripped afterwards).
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tasks.spec.value import Value

INSTANCE = "DRYDOCK_INSTANCE"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Expands to nothing. It parts what may not stand side by side in the file: a space and '#', a '%' and '('.
_NOTHING = "%(here).0s"


class Program(Value):
    """One supervised process.

    With ``autorestart`` it stays: it is restarted when it dies, and comes back with the supervisor. Without,
    it runs once, and a restarted supervisor has forgotten it.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,99}$")
    command: tuple[str, ...] = Field(min_length=1)
    environment: dict[str, str] = {}
    folder: str = Field(description="the working folder, absolute")
    log: str = Field(description="where stdout and stderr go, absolute; rotated for a program that stays")
    autorestart: bool = True
    stop_seconds: int = Field(default=10, ge=1, le=60, description="from SIGTERM to SIGKILL")
    start_seconds: int = Field(default=1, ge=0, description="a program that dies sooner did not start")
    priority: int = Field(default=500, ge=0, le=9999, description="the lowest starts first and stops last")

    @model_validator(mode="after")
    def _can_be_written(self) -> Program:
        for field in ("folder", "log"):
            if not Path(getattr(self, field)).is_absolute():
                raise ValueError(f"{field} = {getattr(self, field)!r}, must be an absolute path")
            _refuse_breaks(field, getattr(self, field))
        for index, argument in enumerate(self.command):
            _refuse_breaks(f"command.{index}", argument)
        for name, value in self.environment.items():
            _refuse_uncarried(name, value)
        return self


def succeeding(file: Path, command: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command that first ends what its last start left (``successor``); ``file`` remembers each start."""
    return (sys.executable, "-I", "-S", str(Path(__file__).with_name("successor.py")), str(file), *command)


def render_ini(program: Program, home: Path) -> str:
    """Return a program's .ini file. Its first line, a comment, is the program as JSON, for ``parse_ini``."""
    environment = program.environment | {INSTANCE: str(home)}
    options = {
        "command": escape(shlex.join(program.command)),
        "environment": ",".join(f"{key}={_quoted(value)}" for key, value in sorted(environment.items())),
        "directory": escape(program.folder),
        "stdout_logfile": escape(escape(program.log)),  # supervisord expands this one twice
        # Readers of a job's log go on from an offset, so a log that ends is never rotated under them.
        "stdout_logfile_maxbytes": "20MB" if program.autorestart else "0",
        "stdout_logfile_backups": 3,
        "redirect_stderr": "true",
        "autostart": "true",
        "autorestart": _flag(program.autorestart),
        "startsecs": program.start_seconds if program.autorestart else 0,
        # The wait grows by a second each time: 20 tries outlast a port that is taken for minutes.
        "startretries": 20 if program.autorestart else 0,
        "stopsignal": "TERM",
        "stopwaitsecs": program.stop_seconds,
        "stopasgroup": "true",
        "killasgroup": "true",
        "priority": program.priority,
    }
    lines = [f"; {json.dumps(program.model_dump(mode='json'), sort_keys=True)}", f"[program:{program.name}]"]
    return "\n".join([*lines, *(f"{key}={value}" for key, value in options.items())]) + "\n"


def parse_ini(text: str, where: str) -> Program:
    """Return the program that ``render_ini`` wrote."""
    first = text.partition("\n")[0].removeprefix("; ")
    try:
        data: Any = json.loads(first)
    except ValueError:
        data = {}
    return Program.parse(data, where)


def escape(text: str) -> str:
    """Return a text so that supervisord's expansion gives it back unchanged."""
    parted = text.replace("%", f"%%{_NOTHING}")
    return re.sub(r"(?=[#;])", lambda _: _NOTHING, parted)


def _quoted(value: str) -> str:
    quote = "'" if '"' in value else '"'
    return f"{quote}{escape(value)}{quote}"


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _refuse_breaks(field: str, text: str) -> None:
    if any(character in text for character in "\n\r\0"):
        raise ValueError(f"{field} holds a line break or NUL, which the process supervisor cannot carry")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field} is not valid Unicode") from None


def _refuse_uncarried(name: str, value: str) -> None:
    """Refuse what supervisord's environment syntax, which has no escapes, would change; name no value."""
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f"environment: {name!r} is no name of a variable")
    _refuse_breaks(f"environment.{name}", value)
    if ('"' in value and "'" in value) or value[:1] in ("'", '"') or value[-1:] in ("'", '"'):
        raise ValueError(
            f"environment.{name} holds both kinds of quotes, or begins or ends with one, which the process "
            "supervisor cannot carry; put the value into a file and name the file"
        )
