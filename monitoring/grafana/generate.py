"""Writes the board: `python -m monitoring.grafana.generate` after a change of `monitoring/grafana/board`.

`--check` writes nothing, and exits with 1 if the file is not what the code makes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monitoring.grafana.board.assemble import board_json

BOARD = Path(__file__).parent / "dashboards" / "vramancer.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the Grafana board.")
    parser.add_argument("--check", action="store_true", help="only say whether the file is what the code makes")
    options = parser.parse_args(arguments)
    made = board_json()
    if options.check:
        return 0 if BOARD.exists() and BOARD.read_text(encoding="utf-8") == made else 1
    BOARD.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
