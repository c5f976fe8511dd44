"""Draw the held-out losses of a run beside pictures that its model generates.

Example: python tools/draw_samples.py runs/openmoji --prompt "red heart" --output samples.png
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import user_path
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mot_megatron.compare.curves import RunCurves
    from mot_megatron.data.corpus import CorpusDescription
    from mot_megatron.generation.generate import Item

NAME = "draw_samples"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("run", type=user_path, metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("--output", type=user_path, required=True, help="PNG file to write")
    parser.add_argument(
        "--corpus", type=user_path, help="the corpus, if it was moved after training"
    )
    parser.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be repeated"
    )
    parser.add_argument("--samples", type=int, default=2, help="pictures a prompt (default 2)")
    parser.add_argument("--temperature", type=float, default=0.9, help="(default 0.9)")


def run(options: argparse.Namespace) -> int:
    """Load the model, generate and draw."""
    say(NAME, f"loading {options.run}")
    device = choose_device()

    from tqdm import tqdm

    from mot_megatron.compare.curves import read_run
    from mot_megatron.generation.generate import Generator
    from mot_megatron.generation.sampling import SamplingSettings
    from mot_megatron.train.trained import load_trained_model

    trained = load_trained_model(options.run, device, options.corpus)
    generator = Generator(trained.model, trained.corpus, trained.config.data.seq_length)
    pictures = {}
    for seed, prompt in enumerate(tqdm(options.prompt, "pictures", ncols=100, disable=None)):
        # A seed of its own: with the same one, pictures of all prompts begin alike.
        settings = SamplingSettings(
            temperature=options.temperature, top_p=0.95, num_samples=options.samples, seed=seed
        )
        pictures[prompt] = generator.continue_text(prompt, "image", settings)
    figure = draw(read_run(options.run), trained.corpus.description, pictures)
    try:
        figure.savefig(options.output)
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written: {error.strerror}") from error
    print(options.output)
    return 0


def draw(
    curves: RunCurves, corpus: CorpusDescription, pictures: Mapping[str, Sequence[Item]]
) -> Figure:
    """Return a figure with the losses on the left and a column of pictures for each prompt."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = max(map(len, pictures.values()))
    figure = Figure((13, 3.4), dpi=110, layout="constrained")
    left, right = np.array(figure.subfigures(1, 2, width_ratios=(1, 2.6)), dtype=object)
    _draw_losses(left.subplots(), curves, corpus)
    grid = right.subplots(rows, len(pictures), squeeze=False)
    for column, (prompt, items) in enumerate(pictures.items()):
        for row, item in enumerate(items):
            panel = grid[row, column]
            panel.imshow(item.media, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("#CCCCCC")
        title = textwrap.fill(prompt, 12, max_lines=3, placeholder=" ...")
        grid[0, column].set_title(title, fontsize=10)
    return figure


def _draw_losses(panel: Axes, curves: RunCurves, corpus: CorpusDescription) -> None:
    for color, modality in zip(_COLORS, corpus.modalities, strict=False):
        curve = curves.curve("held_out", modality.name)
        if curve is not None:
            panel.plot(curve.steps, curve.losses, lw=2, color=color, label=modality.name)
    units = dict.fromkeys(curves.unit(modality.name) for modality in corpus.modalities)
    panel.set(xlabel="steps", ylabel=f"held-out loss, {' or '.join(units)}", xlim=(0, None))
    panel.grid(color="#E6E6E6", lw=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
