"""Parts of a set to train and to test on, which share no recording."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from gdviz.core.files import UserError
from gdviz.data.listing import SPLITS, Video

Counts = dict[str, Counter[str]]  # videos of each class, for each group


SHARE = 0.3  # of the videos of each class, to test on


def split_by_group(videos: list[Video], name: str, *, seed: int = 0) -> list[str]:
    """Return the part of each video: the one that is given, or drawn, class by class.

    Whole groups are drawn at random until about ``SHARE`` of each class is tested on, with at least
    two videos to train on and one to test on. Unlabelled videos of groups that are tested on are in
    no part: "". Raise UserError for too few classes or videos, given parts that share a group or
    are not given to all labelled videos, and where there is no split by group.
    """
    _check_classes(videos, name)
    if any(video.split for video in videos):
        _check_given(videos, name)
        kept = ("train", "test", "probe")
        return [v.split if v.split in kept else "unlabelled" for v in videos]
    counts: Counts = defaultdict(Counter)
    for video in videos:
        if video.label:
            counts[video.group][video.label] += 1
    tested = _draw(counts, name, seed)
    labelled, others = {True: "test", False: "train"}, {True: "", False: "unlabelled"}
    return [(labelled if v.label else others)[v.group in tested] for v in videos]


def _check_classes(videos: list[Video], name: str) -> None:
    labels = Counter(label for v in videos if v.split != "unlabelled" for label in v.classes)
    if len(labels) < 2:
        found = f"{len(labels)} class found ({', '.join(labels) or 'none'})"
        advice = "a classifier needs two or more; if they lie in one more folder, give that"
        raise UserError(f"--data {name}: {found}; {advice}")
    parts = Counter((label, video.split) for video in videos for label in video.classes)
    for label, count in sorted(labels.items()):
        given, train, test = (parts[label, split] for split in ("", "train", "test"))
        if count < 3 or (not given and (train < 2 or test < 1)):
            where = "" if given else f" ({train} to train on, {test} to test on)"
            clips = f"{count} usable clip{'s' * (count > 1)}{where}"
            needs = "each class needs two to train on, for cross-fitting, and one to test on"
            raise UserError(f"--data {name}: class {label!r} has {clips}; {needs}")


def _check_given(videos: list[Video], name: str) -> None:
    some = next(video.path for video in videos if video.split)
    tested = {video.group: video.path for video in videos if video.split == "test"}
    for v in videos:
        problem = ""
        if v.label and not v.split:
            problem = f"{v.path} has a label but no split, as {some} has: give all one, or none"
        elif not v.label and v.labels is None and v.split in ("train", "test"):
            problem = f"{v.path} is to {v.split} but has no label"
        elif v.split != "test" and v.group in tested:
            pair = f"{v.path} and {tested[v.group]}, which is tested on"
            problem = f"{pair}, are of one recording ({v.group!r})"
        if problem:
            raise UserError(f"--data {name}: {problem}")


def _draw(counts: Counts, name: str, seed: int) -> set[str]:
    """Draw groups to test on; where some class is left out, begin with those a search finds."""
    total: Counter[str] = Counter()
    for own in counts.values():
        total.update(own)
    wanted = {label: max(1, round(SHARE * count)) for label, count in total.items()}
    order = [str(group) for group in np.random.default_rng(seed).permutation(sorted(counts))]
    # Groups with more of a class than is wanted come last.
    order.sort(key=lambda group: any(n > wanted[label] for label, n in counts[group].items()))

    def completed(begun: set[str]) -> set[str]:
        """Add groups in the order drawn, as long as they help and leave two videos a class."""
        chosen, tested = set(begun), Counter()
        for group in begun:
            tested.update(counts[group])
        for group in order:
            own = counts[group]
            leaves_two = all(total[label] - tested[label] - n >= 2 for label, n in own.items())
            new_class = any(not tested[label] for label in own)
            lacking = sum(n for label, n in own.items() if tested[label] < wanted[label])
            if group not in chosen and leaves_two and (new_class or 2 * lacking > own.total()):
                chosen.add(group)
                tested.update(own)
        return chosen

    chosen = completed(set())
    missed = set(total).difference(*(counts[group] for group in chosen))
    return completed(_search(counts, total, name)) if missed else chosen


def _search(counts: Counts, total: Counter[str], name: str) -> set[str]:
    """Return the fewest groups that test every class and leave it two videos to train on.

    By integer programming: whether there are any is set splitting, which is NP-hard. Raise
    UserError where there are none.
    """
    groups, classes = list(counts), {label: row for row, label in enumerate(total)}
    held = [(n, classes[label], j) for j, g in enumerate(groups) for label, n in counts[g].items()]
    sizes, rows, columns = zip(*held, strict=True)
    tested = csr_array((sizes, (rows, columns)), dtype=float)
    ones = np.ones(len(groups))
    most: Any = np.array(list(total.values())) - 2
    limits = {"bounds": Bounds(0, 1), "constraints": LinearConstraint(tested, 1, most)}
    found = milp(ones, integrality=ones, options={"time_limit": 60}, **limits)
    if found.x is not None:
        return {group for group, x in zip(groups, found.x, strict=True) if x > 0.5}
    problem = "no split by group exists" if found.status == 2 else "no split by group was found"
    problem += " that leaves every class two videos to train on and one to test on"
    for label, count in sorted(total.items()):
        of_class = [c[label] for c in counts.values() if c[label]]
        if count - min(of_class) < 2:
            problem += f": class {label!r} has {count} videos of {len(of_class)} recordings"
            break
    advice = f"give a list with a 'split' column ({', '.join(SPLITS)})"
    raise UserError(f"--data {name}: {problem}; {advice}")
