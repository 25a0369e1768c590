"""MobileNetV2 (ImageNet weights): five and eight blocks merged, then distilled without labels.

    uv run --frozen python -m tests.experiments.mobilenet_v2_training

Writes mobilenet_v2_training.csv beside this file, row by row; what is there is not run again. Fitted to 400
images of one half of the ImageNet classes and trained on the 500 that there are and 800 training images of Imagenette's
ten classes, for three epochs of batches of 32 by Adam (0.00001, cosine decay) with norms frozen, towards the original's
probabilities; evaluated on the other half of the classes pooled with 500 held-out images of ImageNet's validation set.
The recipe was picked in the other direction, on 400 images: SGD at 0.003 and norms that train lose there. `fitted` is
what training starts from; `direct` trains the merged network, `whole` blends the blocks away meanwhile. The blocks are
the best by R^2 of a fitted 3x3, without block 0.
"""

import time

import numpy as np

from tests.experiments.mobilenet_v2_merging import BLOCK_0, Data, pack
from tests.experiments.records import HERE, Records, shared_loader
from tests.experiments.resnet56_merging import macs_of

N_MERGED = (5, 8)
MODES = ("direct", "whole")
EPOCHS, BATCH, RATE = 3, 32, 1e-5


def records() -> Records:
    values = ("macs", "top1", "n", "seconds", "hits")
    return Records(HERE / "mobilenet_v2_training.csv", ("way", "n_blocks"), values)


def main() -> None:
    import keras

    import updp_tf

    rows = records()
    data, load = Data("odd"), shared_loader()
    training = load.mobilenet_preprocess(np.concatenate([load.imagenet1000()[0][1::2], load.imagenette("train")[0]]))
    model = load.mobilenet_v2()
    decay = keras.optimizers.schedules.CosineDecay(RATE, EPOCHS * (len(training) // BATCH))

    def row(net, seconds: float) -> dict[str, object]:
        hits = data.hits(net)
        top1 = f"{hits.mean():.4f}"
        return {"macs": macs_of(net), "top1": top1, "n": len(hits), "seconds": f"{seconds:.0f}", "hits": pack(hits)}

    rows.ensure(lambda: row(model, 0.0), way="original", n_blocks=0)
    for n in N_MERGED:
        asked = {"calibration": data.calibration, "budget": {"merged": n}, "forms": ["conv3"], "keep": [BLOCK_0]}

        def run(way: str, asked=asked) -> dict[str, object]:
            started = time.perf_counter()
            trained = {}
            if way != "fitted":
                adam = keras.optimizers.Adam(decay)
                recipe = updp_tf.Training(epochs=EPOCHS, mode=way, batch_size=BATCH, optimizer=adam, freeze_norms=True)
                trained = {"train": training, "training": recipe}
            net = updp_tf.prune(model, **asked, **trained, verbose=False)
            return row(net, time.perf_counter() - started)

        for way in ("fitted", *MODES):
            rows.ensure(lambda way=way, run=run: run(way), way=way, n_blocks=n)


if __name__ == "__main__":
    main()
