"""The command line with remote files: its environment, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Variables of the machine that would reach into a test.
OUTSIDE = ("HF_", "AWS_", "HUGGING", "TRANSFORMERS_OFFLINE", "LORAFMT_", "HTTP", "http", "ALL_PROXY", "all_proxy")


@dataclass
class Place:
    """A folder of its own for each test, with a cache and the address of a server."""

    folder: Path
    variables: dict[str, str]

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
        return {**kept, "HOME": str(self.folder), "LORAFMT_RETRIES": "3", **self.variables, **more}

    def start(self, *args: str, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lorafmt", *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(**more), stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *args: str, status: int = 0, **more: str) -> str:
        """Standard output of a run that ends with this status."""
        process = self.start(*args, **more)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, (process.returncode, out, err)
        return out

    def document(self, *args: str, status: int = 0, **more: str) -> Any:
        return json.loads(self.run(*args, "--json", status=status, **more))

    def error(self, *args: str, status: int = 2, **more: str) -> dict[str, str]:
        return self.document(*args, status=status, **more)["error"]

    def python(self, script: str, **more: str) -> Any:
        """What a script prints as JSON, in a process of its own: `huggingface_hub` reads its settings once."""
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment(**more), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
