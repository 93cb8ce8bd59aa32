"""Whether the themes that a run's item router found are the ones that synthetic data was made of.

Agreement is adjusted mutual information: 1 for the same partition whatever the themes' numbers, 0 on average for one that
has nothing to do with it.

Source: Vinh, Epps and Bailey, Information Theoretic Measures for Clusterings Comparison (JMLR 2010).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model_zoo.analysis.dispatch import item_router
from model_zoo.analysis.trained_run import TrainedRun
from model_zoo.errors import ConfigError, DataError
from model_zoo.layers.mos import MoS
from model_zoo.layers.routers import ThemeRouter
from model_zoo.pipeline.synthetic_files import TRUTH_FILE

Themes = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

#: orders of the found themes that chance is taken over, and starts of k-means
SHUFFLES, STARTS = 100, 10


@dataclass(frozen=True)
class Recovery:
    """Adjusted mutual information with the true themes, over all items.

    Attributes:
        router: of the item router's nearest theme.
        chance: 95 % of the router's themes in random order lie below.
        kmeans: of as many clusters of the item vectors as there are true themes.
        vectors: which vectors these are, in words.
    """

    router: float
    chance: float
    kmeans: float
    vectors: str


def recovery(run: TrainedRun) -> Recovery:
    """How well a run of MoS on synthetic data recovered its themes.

    Raises:
        ConfigError: the run has no router that looks at the item alone.
        DataError: ``truth.npz`` is not beside the data, or is of other items.
    """
    found = item_themes(run)
    truth = true_themes(run.dataset.files["user_info"], run.dataset.num_items)
    vectors, described = _given_vectors(run), "the data's item vectors"
    if vectors is None:
        vectors, described = item_vectors(run), "the run's trained item vectors"
    return Recovery(agreement(truth, found), chance(truth, found), agreement(truth, clusters(vectors, truth)), described)


@torch.no_grad()
def item_themes(run: TrainedRun) -> Themes:
    """The item router's nearest theme of the items 1, 2, ...

    Raises:
        ConfigError: the model has no such router, or it looks at the target too.
    """
    router, _ = item_router(run.model)
    layer = next((layer for layer in run.model.method_layers() if isinstance(layer, MoS)), None)
    if not isinstance(router, ThemeRouter) or layer is None or layer.router_input != "item":
        raise ConfigError(f"{run.params['model_id']}: its router gives an item no theme of its own; give a run of MoS with "
                          "router_input: item")  # fmt: skip
    run.model.eval()
    hidden = router.encode(torch.from_numpy(item_vectors(run)))
    return router.codebook.cosine(hidden).argmax(1).numpy()


@torch.no_grad()
def item_vectors(run: TrainedRun) -> Vectors:
    """``[items - 1, d]`` the run's own vectors of the items 1, 2, ..., which its routers look at."""
    assert run.model.item_features is not None
    index = torch.arange(1, run.dataset.num_items)
    return run.model.embedding_layer(run.model.item_features.rows(index), flatten_emb=True).float().numpy()


def _given_vectors(run: TrainedRun) -> Vectors | None:
    """The item features of type embedding, side by side; None if there is none."""
    specs = run.dataset.feature_map.features
    columns = [values for name, values in run.dataset.item_columns.items() if specs[name]["type"] == "embedding"]
    return np.concatenate(columns, axis=1)[1:].astype(np.float32) if columns else None


def true_themes(user_info: str, num_items: int) -> Themes:
    """The theme of the items 1, 2, ... from the ``truth.npz`` beside a synthetic data set's files.

    Raises:
        DataError: it is not there, unreadable, or of other items.
    """
    path = os.path.join(os.path.dirname(user_info), TRUTH_FILE)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; the true themes stand in it, which only synthetic data have")
    try:
        with np.load(path, allow_pickle=False) as truth:
            themes = truth["item_theme"].astype(np.int64)
    except (OSError, KeyError, ValueError):
        raise DataError(f"{path}: cannot be read as the true themes; generate the data again") from None
    if len(themes) != num_items:
        raise DataError(f"{path}: is of {len(themes)} items, item_info of {num_items}; generate the data again")
    return themes[1:]


def agreement(truth: Themes, found: Themes) -> float:
    """Adjusted mutual information, the mean of the two entropies its upper bound."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(truth, found))


def chance(truth: Themes, found: Themes, quantile: float = 0.95) -> float:
    """The quantile of `agreement` over `SHUFFLES` random orders of ``found``."""
    rng = np.random.default_rng(0)
    return float(np.quantile([agreement(truth, rng.permutation(found)) for _ in range(SHUFFLES)], quantile))


def clusters(vectors: Vectors, truth: Themes) -> Themes:
    """k-means of ``vectors`` ``[items, d]``, as many clusters as ``truth`` has themes, the best of `STARTS` starts."""
    from sklearn.cluster import KMeans

    return KMeans(len(np.unique(truth)), n_init=STARTS, random_state=0).fit_predict(vectors).astype(np.int64)
