"""The command line's face. It answers ``--help`` at once: what is heavy is imported by need."""

from __future__ import annotations

import os
import sys
from importlib import import_module

USAGE = """usage: gdviz run [--profile NAME] [--data DIR] [--out DIR] [options]
                                          teachers, both graphs and students: a table and figures
       gdviz experiment PLAN --out DIR    a plan's settings on several draws of the data
       gdviz report DIR                   means, intervals and contrasts of an experiment
       gdviz evaluate RUN                 linear probe, retrieval, calibration, accuracy by class
       gdviz figures RUN [--out DIR]      draw the figures of a finished run again
       gdviz export RUN --out DIR         its student as ONNX, with labels and a model card
       gdviz predict DIR VIDEO...         label videos with an exported student
       gdviz bench [RUN] [options]        size and speed of its networks, of students and of others
       gdviz data check DIR [options]     what is there of a data set, what cannot be read

gdviz COMMAND --help lists a command's options."""
COMMANDS = ("run", "experiment", "report", "evaluate", "figures", "bench", "export", "data")


def main() -> None:
    """Run a command; exit with 1 and one line on what the user can mend."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "predict":  # needs no PyTorch
        try:
            sys.exit(import_module("gdviz.student.predict").main(words))
        except ModuleNotFoundError as error:
            sys.exit(f"gdviz: {error}; pip install 'gdviz[predict]'")
    elif command not in COMMANDS:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    else:
        # Only files are drawn; the backend of a notebook may not exist here.
        os.environ["MPLBACKEND"] = "Agg"
        try:
            commands = import_module("gdviz.commands")
        except ModuleNotFoundError as error:
            sys.exit(f"gdviz: {error}; pip install 'gdviz[video,figures]'")
        commands.execute(command, words)


if __name__ == "__main__":
    main()
