"""Train an attention classifier on an archive of embedding stores.

    gigavim embed slides/*.svs -o archive
    python docs/examples/mil.py archive labels.csv

`labels.csv` has the columns `slide` (a store's name without .embeddings.zarr), `label` (0 or 1) and
`split` (train or test). Gated attention as in Ilse et al. 2018 (arXiv 1802.04712).
"""

import csv
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gigavim.store.dataset import Bag, EmbeddingBags, find_stores
from gigavim.store.layout import SUFFIX

BAGS_PER_STEP = 8


class GatedAttention(nn.Module):
    """A bag of instances to one logit."""

    def __init__(self, mean: Tensor, std: Tensor, hidden: int = 64) -> None:
        super().__init__()
        width = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.value, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.score, self.out = nn.Linear(hidden, 1), nn.Linear(width, 1)
        for layer in (self.score, self.out):  # begin as the mean of all instances
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> the logit, and (n,) what each instance counts."""
        x = (features - self.mean) / self.std
        scores = self.score(self.value(x).tanh() * self.gate(x).sigmoid())[:, 0]
        weights = scores.softmax(0)
        return self.out(weights @ x)[0], weights


def loader(
    stores: list[Path], labels: list[float], pool: int, limit: int | None
) -> DataLoader[Bag]:
    """One bag at a time: bags differ in size."""
    bags = EmbeddingBags(stores, labels, pool=pool, limit=limit)
    return DataLoader(bags, batch_size=None, shuffle=limit is not None)


def train(bags: DataLoader[Bag], epochs: int) -> GatedAttention:
    """Fit a classifier; features are standardised by those of one pass."""
    moments = torch.stack(
        [torch.stack((bag.features.mean(0), bag.features.square().mean(0))) for bag in bags]
    ).mean(0)
    mean, std = moments[0], (moments[1] - moments[0].square()).clamp(min=1e-6).sqrt()
    model = GatedAttention(mean, std)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(epochs):
        for number, bag in enumerate(bags, 1):
            logit, _ = model(bag.features)
            nn.functional.binary_cross_entropy_with_logits(logit, bag.label.float()).backward()
            # Bags come one by one; a step is taken for several together.
            if number % BAGS_PER_STEP == 0 or number == len(bags):
                optimiser.step()
                optimiser.zero_grad()
    return model.eval()


@click.command()
@click.argument("archive", type=click.Path(exists=True, path_type=Path))
@click.argument("labels_csv", type=click.Path(exists=True, path_type=Path))
@click.option("--pool", default=16, show_default=True, help="Tokens a side of an instance.")
@click.option("--limit", default=4096, show_default=True, help="Instances of a bag in training.")
@click.option("--epochs", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(archive: Path, labels_csv: Path, pool: int, limit: int, epochs: int, seed: int) -> None:
    """Train on the slides of split train, and say how those of split test come out."""
    torch.manual_seed(seed)
    rows = {row["slide"]: row for row in csv.DictReader(labels_csv.open())}
    stores = {path.name.removesuffix(SUFFIX): path for path in find_stores(archive)}
    missing = rows.keys() - stores.keys()
    if missing:
        raise click.ClickException(f"no store of {min(missing)} in {archive}")
    of = {
        split: [(stores[name], float(row["label"])) for name, row in rows.items()
                if row["split"] == split]
        for split in ("train", "test")
    }  # fmt: skip
    model = train(loader(*map(list, zip(*of["train"])), pool, limit), epochs)
    right = 0
    with torch.inference_mode():
        for bag in loader(*map(list, zip(*of["test"])), pool, None):
            logit, weights = model(bag.features)
            x, y = bag.xy_level0[weights.argmax()].tolist()
            right += int((logit > 0) == bag.label)
            click.echo(
                f"{bag.name}: label {bag.label:g}, predicted {logit.sigmoid():.2f},"
                f" most looked at ({x:.0f}, {y:.0f})"
            )
    click.echo(f"accuracy {right / len(of['test']):.3f} on {len(of['test'])} slides")


if __name__ == "__main__":
    main()
