"""Do stored embeddings know more than colour? A linear probe for nuclei, patch by patch.

    python docs/examples/linear_probe.py DATA/histo/nuinsseg DATA/nuinsseg_groups.csv

Fields of NuInsSeg (512 px, 40x) are embedded with the shipped model into stores. A logistic
regression on the embeddings, and one on the mean colours of the same patches, learn from fields of
training slides which patches are mostly nucleus; both are tested on fields of the slides that
neither they nor the model have seen.
"""

import csv
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata

import gigavim
from gigavim.config import Settings
from gigavim.store.reader import EmbeddingStore
from gigavim.training.recipe import load_recipe

FIELD_MPP = 0.23


def fields_by_group(root: Path, groups_csv: Path) -> dict[str, list[Path]]:
    """Images by slide."""
    found: dict[str, list[Path]] = {}
    for row in csv.DictReader(groups_csv.open()):
        numbers = range(int(row["first"]), int(row["last"]) + 1)
        paths = [root / "images" / f"{number}.png" for number in numbers]
        found[row["group"]] = [path for path in paths if path.exists()]
    return found


def patch_means(values: np.ndarray, store: EmbeddingStore) -> np.ndarray:
    """(n, channels) mean of an image over the patch of each token."""
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1, values.shape[2]))
    sums[1:, 1:] = values.cumsum(0).cumsum(1)
    side = store.info.grid.patch_px * store.frame.scale_x
    corners = store.xy_level0[:]
    x0, y0 = np.round(np.clip(corners, 0, values.shape[0] - 1)).astype(int).T
    x1, y1 = np.round(np.clip(corners + side, 1, values.shape[0])).astype(int).T
    total = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return total / ((x1 - x0) * (y1 - y0))[:, None]


def samples(paths: list[Path], folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings (n, D), mean colours (n, 3) and whether most of a patch is nucleus (n,)."""
    parts = []
    for path in paths:
        settings = Settings().with_flags(
            input={"slide_mpp": FIELD_MPP}, tokens={"tissue": "none"},
            output={"directory": str(folder), "overwrite": True},
        )  # fmt: skip
        store = gigavim.embed(path, settings=settings).open()
        image = np.asarray(Image.open(path).convert("RGB"), float)
        mask = np.asarray(Image.open(path.parents[1] / "masks" / path.name).convert("L")) > 0
        inside = (store.xy_level0[:] + 8 < image.shape[0]).all(1)
        nuclei = patch_means(mask[..., None].astype(float), store)[:, 0] > 0.5
        colours = patch_means(image, store)
        parts.append((store.numpy()[inside], colours[inside], nuclei[inside]))
    embeddings, colours, nuclei = (np.concatenate(part) for part in zip(*parts))
    return embeddings.astype(np.float32), colours.astype(np.float32), nuclei


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores of a logistic regression (L2, standardised inputs, L-BFGS)."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = (torch.from_numpy((part - mean) / std) for part in (train, test))
    target = torch.from_numpy(labels).float()
    weight = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = x @ weight + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        value = value + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return (y @ weight + bias).detach().numpy()


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve."""
    ranks, positive = rankdata(scores), int(labels.sum())
    negative = len(labels) - positive
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


@click.command()
@click.argument("root", type=click.Path(exists=True, path_type=Path))
@click.argument("groups_csv", type=click.Path(exists=True, path_type=Path))
@click.option("--fields", default=3, show_default=True, help="Fields of each slide.")
def main(root: Path, groups_csv: Path, fields: int) -> None:
    """Compare a probe on embeddings with one on mean colour."""
    groups = fields_by_group(root, groups_csv)
    held_out = load_recipe("histo-nuclei-nano").split.validation_groups
    train = [p for g, paths in groups.items() if g not in held_out for p in paths[:fields]]
    test = [path for group in held_out for path in groups.get(group, [])[:fields]]
    with tempfile.TemporaryDirectory() as folder:
        learned, seen = samples(train, Path(folder)), samples(test, Path(folder))
    click.echo(f"{len(train)} fields to learn from, {len(test)} of unseen slides to test on")
    for name, place in (("mean colour", 1), ("embeddings", 0)):
        scores = probe(learned[place], learned[2], seen[place])
        click.echo(f"{name:<12} AUC {auc(scores, seen[2]):.3f}")


if __name__ == "__main__":
    main()
