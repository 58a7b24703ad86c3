"""A whole run, first step to resumed end, unpickles nothing and calls no one."""

import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import Project

AUDITED = """
import sys
refused = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
def refuse(event, arguments):
    if event in refused:
        raise AssertionError(f"{event} {arguments[:2]}")
sys.addaudithook(refuse)
from simpletuner.cli import main
folder = sys.argv[1]
for steps in ("1", "2"):
    sys.argv = ["simpletuner", "train", "--config", folder, "--max_train_steps", steps]
    try:
        main()
    except SystemExit as left:
        assert not left.code, left.code
import pickle
try:
    pickle.loads(b"cos\\nsystem\\n.")
except AssertionError:
    print("the hook is at work")
"""


def test_a_run_unpickles_nothing_and_asks_no_network(project: Project, tmp_path: Path):
    """With validation, checkpoint and resume: each file that a run reads is one that somebody else may have made."""
    project.write(validation_prompt="a picture", disable_benchmark=True, cache_dir=str(tmp_path / "cache"))
    command = [sys.executable, "-c", AUDITED, str(project.folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "the hook is at work"
    assert (project.output / "checkpoint-2").is_dir()
