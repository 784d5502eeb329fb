"""What several test files share, one file for each subject. Nothing here is a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the project
PATIENCE = 600  # seconds; however busy the machine is, a process that takes longer hangs
