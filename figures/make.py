"""Draw the committed figures again: each PNG from the JSON beside it.

python figures/make.py                       draw every PNG from its JSON
python figures/make.py --run runs/demo/run   make the JSON anew from a run, then draw
"""

from __future__ import annotations

import argparse
from pathlib import Path

import plotly.io

from lcc_lens.files import write_text
from lcc_lens.plotting import plot_loss_map, write_image
from lcc_lens.scan import Scan

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    if arguments.run is not None:
        write_text(HERE / "loss_map.json", plot_loss_map(Scan.load(arguments.run)).to_json(pretty=True) + "\n")
    for file in sorted(HERE.glob("*.json")):
        figure = plotly.io.read_json(file)
        write_image(figure, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
