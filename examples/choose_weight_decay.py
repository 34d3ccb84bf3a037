"""Choose the strength of weight decay by cross-validation, with Optuna or with a sweep of Weights & Biases.

    python examples/choose_weight_decay.py                             # Optuna; given again, it goes on where it was
    python examples/choose_weight_decay.py --trials 3                  # no more than three strengths this time
    python examples/choose_weight_decay.py --weight-decay 3 --wandb    # one, as examples/sweep.yaml has it done

What to look for: weight decays of different size, because only the size of it counts. Those up to 0.1 do all the same,
next to nothing, and 10 is far too much. In between lies one that is best for images that were held out, whose labels
are as wrong as the others' (40 %), so that even one who knows the truth would score 0.6 with them. It was 3 for each of
the seeds 0 to 4, and scored 0.523 to 0.557, where the smallest had 0.427 to 0.480. No right label was needed to find
it; with the right labels of other images it has 0.885 to 0.907, and the smallest 0.724 to 0.771.

A trial is in a database as soon as it is done, so that the command can be interrupted and given again: a trial that was
interrupted is run again, and those that were done are not.
"""

from __future__ import annotations

import os
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import optuna
import torch
from claims import Claim, be_quiet, conclude, integer, number, parser_of
from label_noise import Batches, digits
from lightning.pytorch import LightningModule, Trainer, seed_everything
from optuna.samplers import GridSampler
from optuna.trial import TrialState
from pictures import look, panels, save
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from lightning_regularize import WeightDecay

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

GRID = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
DATABASE = "study.db"


class Classifier(LightningModule):
    """Learns to classify vectors of 64 numbers with AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy with the labels as they are."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy, whatever the labels are worth."""
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """AdamW, and a cosine of the learning rate to 0."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def score(
    weight_decay: float, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], options: argparse.Namespace
) -> float:
    """Accuracy on one part of the data after training on another."""
    seed_everything(options.seed)  # so that it does not depend on what was trained before
    model = Classifier()
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[WeightDecay(weight_decay)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, Batches(*train, batch_size=60, seed=options.seed))
    (result,) = trainer.validate(model, Batches(*test, batch_size=len(test[0])), verbose=False)
    return result["val_accuracy"]


def cross_validate(weight_decay: float, options: argparse.Namespace) -> list[float]:
    """Accuracy on each fold after training on the others; the folds are the same for every strength."""
    images, labels = digits(options.seed).train
    folds = StratifiedKFold(options.folds, shuffle=True, random_state=options.seed).split(images, labels)
    return [
        score(weight_decay, (images[rest], labels[rest]), (images[fold], labels[fold]), options) for rest, fold in folds
    ]


# -- who asks for it ---------------------------------------------------------------------------------------------------


def search(options: argparse.Namespace) -> optuna.Study:
    """Have Optuna try what is left of the grid."""
    options.output.mkdir(parents=True, exist_ok=True)
    sampler = GridSampler({"weight_decay": GRID}, seed=options.seed)
    study = optuna.create_study(
        storage=f"sqlite:///{options.output / DATABASE}",
        study_name=f"seed {options.seed}, {options.folds} folds, {options.epochs} epochs",  # others have other results
        direction="maximize",
        sampler=sampler,
        load_if_exists=True,
    )

    def objective(trial: optuna.Trial) -> float:
        weight_decay = trial.suggest_float("weight_decay", min(GRID), max(GRID), log=True)
        try:
            scores = cross_validate(weight_decay, options)
        except KeyboardInterrupt:  # of which Optuna would say that this strength has failed; so it is left unfinished
            raise SystemExit(130) from None
        trial.set_user_attr("scores", scores)
        print(f"weight decay {weight_decay:g}: {mean(scores):.3f}, standard deviation of a fold {stdev(scores):.3f}")
        return mean(scores)

    if not sampler.is_exhausted(study):
        study.optimize(objective, n_trials=options.trials)
    if failed := study.get_trials(states=[TrialState.FAIL]):
        raise SystemExit(
            f"Of {len(failed)} trials an exception was the end, and Optuna does not try them again. When its cause is "
            f"gone, remove {options.output / DATABASE}, and begin anew."
        )
    return study


def scores_of(study: optuna.Study) -> dict[float, list[float]]:
    """The score on each fold, by weight decay."""
    done = study.get_trials(states=[TrialState.COMPLETE])
    return dict(sorted((trial.params["weight_decay"], trial.user_attrs["scores"]) for trial in done))


def log_to_wandb(weight_decay: float, scores: Sequence[float], options: argparse.Namespace) -> None:
    """What a sweep looks at; offline, unless the agent of a sweep has started this."""
    import wandb  # takes seconds

    if "WANDB_SWEEP_ID" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    options.output.mkdir(parents=True, exist_ok=True)
    with wandb.init(project="choose-weight-decay", dir=options.output) as run:
        run.log({"weight_decay": weight_decay, "val_accuracy": mean(scores), "val_accuracy_std": stdev(scores)})


# -- what is shown -----------------------------------------------------------------------------------------------------


def judge(scores: Mapping[float, Sequence[float]], clean: Mapping[float, float], again: int) -> list[Claim]:
    """Was there something to choose, and was it chosen well?"""
    smallest, *_, largest = scores
    best = best_of(scores)
    gain = mean(scores[best]) - mean(scores[smallest])
    won = sum(a > b for a, b in zip(scores[best], scores[smallest], strict=True))
    return [
        Claim(
            "the best weight decay lies inside the grid",
            f"{best:g} in {smallest:g} to {largest:g}",
            smallest < best < largest,
        ),
        Claim(
            "it scores higher than the smallest, which does nothing",
            f"{gain:+.3f} on held-out images, in {won} of {len(scores[best])} folds",
            gain > 0.03,
        ),
        Claim(
            "and it is better for the true labels of other images, too",
            f"{clean[best]:.3f}, and {clean[smallest]:.3f} with the smallest",
            clean[best] > clean[smallest] + 0.05,
        ),
        Claim("a second search runs no trial again", f"{again} trials more", again == 0),
    ]


def best_of(scores: Mapping[float, Sequence[float]]) -> float:
    """The weight decay with the highest mean score."""
    return max(scores, key=lambda weight_decay: mean(scores[weight_decay]))


def plot(scores: Mapping[float, Sequence[float]]) -> Figure:
    """The score of each strength, on each fold and on average."""
    figure, (ax,) = panels(1, 1)
    strengths, best = list(scores), best_of(scores)
    for i, fold in enumerate(zip(*scores.values(), strict=True)):
        ax.plot(strengths, fold, color="0.7", marker=".", linewidth=0.8, label=None if i else "one fold")
    ax.plot(strengths, list(map(mean, scores.values())), linewidth=2, label="mean of the folds", **look(0))
    ax.axvline(best, color="0.3", linestyle=":", label=f"chosen: {best:g}")
    ax.set(xscale="log", xlabel="weight decay", ylabel="accuracy on held-out images,\n40 % of the labels wrong")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = parser_of(__doc__, "choose_weight_decay")
    parser.add_argument(
        "--trials", type=integer(1, 1000), help="how many to run this time, by default all that are left"
    )
    parser.add_argument("--weight-decay", type=number(0.0, 1e6), metavar="X", help="try only this, without Optuna")
    parser.add_argument("--folds", type=integer(2, 20), help="of the cross-validation, by default 5")
    parser.add_argument("--wandb", action="store_true", help="with --weight-decay: log the score to Weights & Biases")
    options = parser.parse_args(arguments)
    if options.wandb and options.weight_decay is None:
        parser.error("argument --wandb: needs --weight-decay; a search is Optuna's, or that of examples/sweep.yaml")
    options.folds = options.folds or (2 if options.fast else 5)
    options.epochs = 2 if options.fast else 40
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, or try one strength."""
    options = parse_options(arguments)
    be_quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.weight_decay is not None:
        scores = cross_validate(options.weight_decay, options)
        print(f"weight decay {options.weight_decay:g}: {mean(scores):.3f}")
        if options.wandb:
            log_to_wandb(options.weight_decay, scores, options)
        return
    study = search(options)
    scores = scores_of(study)
    if len(scores) < len(GRID):
        print(f"{len(scores)} of {len(GRID)} strengths are done; the same command goes on with the others.")
        return
    again = len(search(options).trials) - len(study.trials)
    train, test = digits(options.seed)
    clean = {weight_decay: score(weight_decay, train, test, options) for weight_decay in (GRID[0], best_of(scores))}
    save(plot(scores), options.output / "choose_weight_decay.png")
    conclude(judge(scores, clean, again), is_fast=options.fast)


if __name__ == "__main__":
    main()
