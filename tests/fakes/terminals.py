"""Runs programs on a real pseudo-terminal: keys in, the screen out."""

import os
import sys

import pexpect

WHERE_IS_THE_CURSOR = "\x1b[6n"
PROMPT = ">"  # some versions of prompt_toolkit skip the space after it instead of writing it
UP, TAB, ENTER, ALT_ENTER, CTRL_C, CTRL_D, CTRL_J = "\x1b[A", "\t", "\r", "\x1b\r", "\3", "\4", "\n"
PASTE = "\x1b[200~{}\x1b[201~"


class Terminal:
    """A program on a pseudo-terminal that reports the cursor position, as terminals do."""

    def __init__(self, *args, columns=100, **env):
        """Start Python with arguments."""
        self.program = pexpect.spawn(
            sys.executable,
            [*map(str, args)],
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "NO_COLOR": "", **env},
            encoding="utf-8",
            codec_errors="backslashreplace",
            timeout=60,
            dimensions=(24, columns),
        )
        self.shown = ""

    def see(self, text):
        """Wait until a text is shown; return all that was shown since the last call."""
        seen = ""
        while True:
            found = self.program.expect_exact([WHERE_IS_THE_CURSOR, text])
            seen += f"{self.program.before}{self.program.after}"
            if found:
                self.shown += seen
                return seen
            self.program.send("\x1b[1;1R")

    def type(self, *keys):
        for key in keys:
            self.program.send(key)

    def leave(self):
        self.type(CTRL_D)
        self.end()

    def end(self):
        """Wait until the program exits with status 0."""
        self.program.expect(pexpect.EOF)
        self.shown += str(self.program.before)
        self.program.close()
        assert self.program.exitstatus == 0, self.shown
