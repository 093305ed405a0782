"""Rows of a batch as the study keeps them.

    python -m mythos_core.study build/exits/results.json mythos_core/study/results/exits.json
"""
import argparse
import json
from pathlib import Path

from mythos_core.study import pack


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mythos_core.study",
                                     description="Write a batch's rows as the study keeps them.")
    parser.add_argument("rows", type=Path, help="results.json of a batch")
    parser.add_argument("out", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    args.out.write_text(pack(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
