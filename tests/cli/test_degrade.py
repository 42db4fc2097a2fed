"""`degrade`."""

import numpy as np
from PIL import Image


def test_degrade_is_deterministic_for_a_seed(run, save, tree, tmp_path):
    image = save(tmp_path / "a.png", 64, 48)

    def bad(*arguments):
        assert run("degrade", image, "-o", tmp_path / "b.png", "--overwrite", *arguments).status == 0
        with Image.open(tmp_path / "b.png") as result:
            assert result.size == (64, 48)
        return (tmp_path / "b.png").read_bytes()

    first = bad("--seed", 4)
    assert bad("--seed", 4) == first
    others = [bad("--seed", 5), bad("--seed", 4, "--level", "light"), image.read_bytes()]
    assert len({first, *others}) == 4


def test_heavy_is_further_from_the_original_than_light(run, save, tmp_path):
    images = [save(tmp_path / "in" / f"{i}.png", 64, 64, seed=i) for i in range(6)]

    def distance(level):
        assert run("degrade", tmp_path / "in", "-o", tmp_path / level, "--level", level).status == 0
        pairs = [(p, tmp_path / level / f"{p.stem}_degraded.png") for p in images]
        return np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in pairs])

    assert distance("heavy") > distance("light")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, np.float32)


def test_each_image_of_a_call_is_degraded_differently(run, save, tree, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, 48, 48)
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "out", "--seed", 1).status == 0
    assert run("degrade", tmp_path / "in" / "b.png", "-o", tmp_path / "b.png", "--seed", 2).status == 0
    out = tree(tmp_path / "out")
    assert out["a_degraded.png"] != out["b_degraded.png"] == (tmp_path / "b.png").read_bytes()


def test_a_repeated_degrade_completes_the_results(run, save, tree, tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", 48, 48, seed=i)
    (tmp_path / "in" / "1.png").write_bytes(b"damaged")
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "out").status == 1
    save(tmp_path / "in" / "1.png", 48, 48, seed=1)
    (tmp_path / "out" / "2_degraded.png").unlink()
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "out").status == 0
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "at once").status == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "at once")


def test_a_named_image_is_not_replaced(run, save, tmp_path):
    images = [save(tmp_path / name, 48, 48, seed=i) for i, name in enumerate(("a.png", "a_degraded.png"))]
    before = images[1].read_bytes()
    done = run("degrade", *images, "-o", tmp_path, "--overwrite")
    assert done.status == 2 and "written over an input" in done.err
    assert images[1].read_bytes() == before
