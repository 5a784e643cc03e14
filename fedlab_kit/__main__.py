"""`python -m fedlab_kit runs`: what the store holds and who made it; with `--free`, what older code made is deleted."""

from __future__ import annotations

import argparse

from fedlab_kit import runs
from fedlab_kit.lab.style import human_bytes


def main() -> None:
    """Print every run's folder with its size and which code made it, or delete those of older code."""
    parser = argparse.ArgumentParser(prog="python -m fedlab_kit", description=__doc__)
    parser.add_argument("command", choices=["runs"])
    parser.add_argument("--free", action="store_true", help="delete the runs that older code made")
    if parser.parse_args().free:
        count, freed = runs.free()
        print(f"{count} runs of older code deleted, {human_bytes(freed)} freed")
        return
    for folder in (folders := sorted(filter(runs.is_run, runs.runs_folder().glob("*")))):
        print(f"{folder.name}  {human_bytes(runs.size(folder)):>9}  {runs.made_by(folder)}")
    print(f"{len(folders)} runs in {runs.runs_folder()}, {human_bytes(sum(map(runs.size, folders)))}")


if __name__ == "__main__":
    main()
