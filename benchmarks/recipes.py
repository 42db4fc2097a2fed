"""Compare ways to learn a person on the shipped base: methods, the recipe of the paper, and numbers of references.

    python benchmarks/recipes.py FOLDER --lpips FILE --landmarks FILE --recognizer FILE -o recipes.csv

FOLDER has one folder of photographs per person, none of them in any training. Photographs, crops and seeds are as in
`people.py`. Each image is heavily degraded twice: reduced to a quarter, and to an eighth. One row per person, recipe,
reduction and image. `cosine` compares the result with the original, `likeness` with the references, as the mean over
them; `original` is the undegraded image. `another` restores the images of a person with the identity of the next one,
so its `likeness` is the likeness to the wrong person. No loss of any recipe is the recognizer of these columns. All
recipes except `paper` have ST-LPIPS and dlib's recognizer as losses. Recipes of a person in the CSV
file are not learned again, so the same command resumes an interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from common import hwc, machine, measuring, read, rounded, write
from heldout import cosine_to, metric
from people import REFERENCES, SEED, crops, learned

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.degradation.levels import LEVELS
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.runtime.restorer import Restorer

REDUCTIONS = (4.0, 8.0)


class Recipe(NamedTuple):
    """A way to learn a person."""

    config: Callable[[Base], PersonalizeConfig]
    references: int = REFERENCES
    own: bool = True
    """Whether the references show the person of the images; False: they show the next person of the folder."""


def defaults(**changes: Any) -> Callable[[Base], PersonalizeConfig]:
    """Return a function that makes the defaults of a base with changed fields."""
    return lambda base: PersonalizeConfig.for_base(base.config, **changes)


def lasting(iterations: int, **changes: Any) -> Callable[[Base], PersonalizeConfig]:
    """Return a function that makes the defaults of a base for another number of iterations, with changed fields."""

    def config(base: Base) -> PersonalizeConfig:
        default = PersonalizeConfig.for_base(base.config, **changes)
        return default.longer(iterations / default.train.iterations)

    return config


RECIPES = {
    "default": Recipe(defaults()),
    "no face features": Recipe(defaults(lambda_face=0.0)),
    "no color loss": Recipe(defaults(lambda_color=0.0)),
    **{f"{count} iterations": Recipe(lasting(count)) for count in (30, 440)},
    **{f"{count} iterations, no prior": Recipe(lasting(count, start="open")) for count in (110, 440)},
    "dreambooth": Recipe(defaults(method="dreambooth")),
    "vico": Recipe(defaults(method="vico", start="closed")),
    "closed": Recipe(defaults(start="closed")),
    "paper": Recipe(lambda _: PersonalizeConfig()),
    "1 reference": Recipe(defaults(), 1),
    "3 references": Recipe(defaults(), 3),
    "10 references": Recipe(defaults(), 10),
    "another": Recipe(defaults(), own=False),
    "token": Recipe(defaults(token_learning_rate=5e-3)),
    "self": Recipe(defaults(ref_source="self")),
}
"""`paper` is `personalize --recipe paper`; the others change one thing of the defaults of the base.

`token` trains the learned token with L_pers. A training that is longer than the default has more crops in the same
ratio. `dreambooth`, `vico` and `closed` do not start from the prior of the base.
"""
UNLEARNED = ("input", "base", "original")


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@measuring(side=512)
@click.option("--recipe", "names", multiple=True, type=click.Choice(list(RECIPES)), help="[default: all]")
@click.option("--people", default=2, show_default=True, help="Number of people, the first by name.")
def main(
    folder: Path,
    output: Path,
    base: str,
    names: tuple[str, ...],
    people: int,
    tests: int,
    side: int,
    lpips: Path,
    landmarks: Path,
    recognizer: Path,
) -> None:
    rows, loaded, cosine = read(output), load_base(base), cosine_to(recognizer)
    metrics: dict[str, Callable[[Pixels, Pixels], float | None]] = {
        "psnr": metric("psnr"),
        "lpips": metric("lpips", lpips=lpips),
        "sharpness": metric("sharpness"),
        "lmse_98": metric("lmse_98", landmarks=landmarks),
        "cosine": cosine,
        "dlib": metric("id_original_dlib"),
    }
    folders = sorted(path for path in folder.iterdir() if path.is_dir())[: max(2, people)]
    photos = [find_images([path]) for path in folders]
    for place, person in enumerate(folders[:people]):
        for name in (*UNLEARNED, *(names or RECIPES)):
            if any((row["person"], row["recipe"]) == (person.name, name) for row in rows):
                continue
            own = name in UNLEARNED or RECIPES[name].own
            theirs = photos[place if own else (place + 1) % len(folders)]
            untested = theirs[:REFERENCES] + theirs[REFERENCES + tests :]
            method, seconds = restoring(name, untested, loaded)
            known = [hwc(reference) for reference in crops(theirs[:REFERENCES], side)]
            for sf, number, truth, lq in cases(photos[place][REFERENCES : REFERENCES + tests], side):
                result = truth if name == "original" else method(lq)
                values = {key: measure(result, truth) for key, measure in metrics.items()}
                values["likeness"] = mean([cosine(result, reference) for reference in known])
                about = {"person": person.name, "recipe": name, "sf": round(sf), "image": number}
                values = {key: rounded(value) for key, value in values.items()}
                rows.append({**about, **values, "learn_cpu_s": seconds, "side": len(truth), **machine()})
            write(output, rows)
            click.echo(f"{person.name} {name}: {seconds} s")


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def restoring(name: str, paths: Sequence[Path], base: Base) -> tuple[Callable[[Pixels], Pixels], int]:
    """Return a function that restores images by a recipe, and the seconds of learning."""
    if name in ("input", "original"):
        return lambda lq: lq, 0
    if name == "base":
        return Restorer.from_base(base).restore, 0
    recipe = RECIPES[name]
    restorer, seconds = learned(paths[: recipe.references], base, recipe.config(base))
    return restorer.restore, seconds


def cases(paths: Sequence[Path], side: int) -> Iterator[tuple[float, int, Pixels, Pixels]]:
    """Yield the reduction, the number, the original and the degraded version of each image."""
    truths = crops(paths, side)
    for sf in REDUCTIONS:
        for number, truth in enumerate(truths):
            lq = degrade(truth, replace(LEVELS["heavy"], sf=sf), SEED + number)
            yield sf, number, hwc(truth), hwc(lq)


if __name__ == "__main__":
    main()
