"""ResNet-20 and ResNet-56 on CIFAR-10: plans of each way to search at equal MACs, merged without training.

    uv run --frozen python -m tests.experiments.search_methods resnet20
    uv run --frozen python -m tests.experiments.search_methods resnet56

Writes search_methods.csv beside this file, row by row; what is there is not run again. 600 calibration images of the
training images; every plan is merged as `prune` does by default (in sequence, norms renewed, refits where held-out
images gain), so that ways differ by their plan alone. KL and accuracy of the merged network on 1,000 test images, which
choose nothing. `measured` counts the plans that a search looked at.
"""

import sys

import numpy as np

from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet56_merging import macs_of

N_CALIBRATION = 600
BUDGETS = (0.6,)
DRAWS = (0, 1, 2)
WAYS = ("additive", "uniform", "random", "exact", "best of 40 random", "genetic")


def main(name: str) -> None:
    load = shared_loader()
    import updp_tf
    from updp_tf.judging import divergence

    columns = ("macs", "merged", "measured", "search_loss", "rank_correlation", "kl", "top1", "n_test")
    records = Records(HERE / "search_methods.csv", ("network", "budget", "way", "draw"), columns)
    model = getattr(load, name)()
    (x_train, _), (x_test, y_test) = load.cifar10()
    x_test = load.cifar_preprocess(x_test)
    wanted = predict(model, x_test)

    def row(small, report) -> dict[str, object]:
        written = predict(small, x_test)
        search = report and report.search
        best = search and search.best
        correlation = search and search.rank_correlation
        return {
            "macs": macs_of(small),
            "merged": sum(len(edit.blocks) for edit in report.plan.edits) if report else 0,
            "measured": len(search.measured) if search else 0,
            "search_loss": "" if best is None else f"{search.measured[best].loss:.4f}",
            "rank_correlation": "" if correlation is None else f"{correlation:.3f}",
            "kl": f"{divergence(wanted, written):.4f}",
            "top1": f"{float((written.argmax(-1) == y_test).mean()):.4f}",
            "n_test": len(y_test),
        }

    records.ensure(lambda: row(model, None), network=name, budget=1.0, way="original", draw="-")
    for draw in DRAWS:
        images = load.cifar_preprocess(
            x_train[np.random.default_rng(draw).choice(len(x_train), N_CALIBRATION, replace=False)]
        )
        methods = {
            "additive": updp_tf.Additive(),
            "exact": updp_tf.Exact(),
            "genetic": updp_tf.Genetic(trials=40, population=10, seed=draw, warm_start=False),
            "random": updp_tf.Random(seed=draw),
            "best of 40 random": updp_tf.Random(n=40, seed=draw),
            "uniform": updp_tf.Uniform(),
        }
        for budget in BUDGETS:
            for way in WAYS:

                def run(method=methods[way], budget=budget, images=images):
                    small = updp_tf.prune(
                        model, calibration=images, budget={"macs": budget}, method=method, verbose=False
                    )
                    return row(small, small.pruning)

                records.ensure(run, network=name, budget=budget, way=way, draw=draw)


def predict(model, images) -> np.ndarray:
    return np.concatenate([np.asarray(model(images[i : i + 250], training=False)) for i in range(0, len(images), 250)])


if __name__ == "__main__":
    main(sys.argv[1])
