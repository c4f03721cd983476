"""Lists of UT-Interaction set 1 with whole sequences held out, one a draw.

    python benchmarks/ut_interaction.py DIR OUT     # writes OUT/ut_interaction_1.csv to _10.csv

Of the ten sequences three are tested on, three are labelled, and four are unlabelled (the set's 60
clips: 18, 18 and 24), drawn by the draw's number.
"""

import csv
import random
import re
import sys
from pathlib import Path


def main(folder: Path, out: Path) -> None:
    clips = sorted(folder.rglob("set1_*.avi"))
    if not clips:
        sys.exit(f"{folder}: holds no clip named set1_ID_SEQUENCE_CLASS.avi")
    out.mkdir(parents=True, exist_ok=True)
    for draw in range(1, 11):
        order = random.Random(draw).sample(range(1, 11), 10)
        parts = ["test"] * 3 + ["train"] * 3 + ["unlabelled"] * 4
        split_of = dict(zip(order, parts, strict=True))
        with open(out / f"ut_interaction_{draw}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label", "group", "split"])
            for clip in clips:
                sequence = int(re.fullmatch(r"set1_\d+_(\d+)_\d+", clip.stem)[1])
                split = split_of[sequence]
                label = "" if split == "unlabelled" else clip.parent.name
                rows.writerow([clip.resolve(), label, f"sequence {sequence}", split])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
