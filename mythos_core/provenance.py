"""Which commit of this code a result comes from."""
import subprocess
from pathlib import Path


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit checked out in the repository that tracks this package in `folder`; None
    without git, outside a repository, and in one that does not track it (an installed copy)."""
    try:
        for command in (["ls-files", "--error-unmatch", Path(__file__).name],
                        ["rev-parse", "HEAD"]):
            git = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True,
                                 encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()
