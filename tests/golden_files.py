"""The golden files, recorded from LongCTR on FuxiCTR 2.3.2, and models on the tiny data set that they were recorded on."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_zoo.compat import FeatureMap, seed_everything
from model_zoo.pipeline.dataset import CTRDataset, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.registry import get_model, model_keys

# models this small lose far more to the hand-over between threads than they gain, above all on a busy machine
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
TINY_MAX_LEN = 20
CONTEXT_COLUMNS: list[dict[str, Any]] = [
    {"name": "user_id", "type": "categorical", "vocab_size": 42},
    {"name": "tags", "type": "sequence", "vocab_size": 6, "max_len": 3},
]
#: a model that trains in milliseconds: of these, a model gets the keys that it has
SMALL: dict[str, Any] = {
    "embedding_dim": 8,
    "attention_dim": 8,
    "num_heads": 2,
    "short_seq_len": 6,
    "topk": 4,
    "dnn_hidden_units": [12, 6],
    "batch_norm": True,
    "learning_rate": 1e-2,
    # MoS and its rivals
    "n_item_experts": 3,
    "n_window_experts": 2,
    "topk_item": 2,
    "topk_window": 2,
    "codebook_dim": 6,
    "window_size": 4,
    "window_stride": 2,
    "ema_decay": 0.9,
    "n_experts": 3,
    # other backbones and heads
    "hash_bits": 3,
    "num_hashes": 4,
    "max_len": 40,
    "dim_feedforward": 8,
    "first_k_cols": 2,
    "dcn_hidden_units": [12, 6],
    "dcn_cross_layers": 2,
    "attention_hidden_units": [6],
    "enable_sum_pooling": True,
    "hidden_dim": 8,
    "d_state": 4,
    "num_layers": 2,
    "inner_dim": 8,
    "max_positions": 24,
    "last_k": 3,
    "parallel_dnn_hidden_units": [12, 6],
    "stacked_dnn_hidden_units": [12, 6],
    "num_cross_layers": 2,
    "mlp1_hidden_units": [8],
    "mlp2_hidden_units": [8],
    "fs_hidden_units": [4],
}
SMALL_RUN: dict[str, Any] = {"metrics": ["AUC", "logloss"], "monitor": "AUC", "early_stop_patience": 5}


def feature_map_of(text: str | dict[str, Any], group_id: str = "user_index") -> FeatureMap:
    """A FuxiCTR feature map from its recorded json."""
    recorded = json.loads(text) if isinstance(text, str) else text
    feature_map = FeatureMap(recorded["dataset_id"], "")
    feature_map.labels = recorded["labels"]
    feature_map.group_id = group_id
    feature_map.default_emb_dim = recorded["default_emb_dim"]
    feature_map.features = OrderedDict((name, spec) for entry in recorded["features"] for name, spec in entry.items())
    return feature_map


class Golden:
    """One ``<Model>_<k>.npz``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arrays: Mapping[str, np.ndarray] = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        self.feature_map = feature_map_of(str(self.arrays["feature_map"]))

    def tensor(self, name: str) -> Tensor:
        """The array ``name``."""
        return torch.from_numpy(np.array(self.arrays[name]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All arrays under ``prefix/``, in order, by what follows it."""
        return {name[len(prefix) + 1 :]: self.tensor(name) for name in self.arrays if name.startswith(f"{prefix}/")}

    def inputs(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """LongCTR's batch."""
        return self.group("batch"), self.group("item"), self.tensor("mask")

    def model(self, **overrides: Any) -> Any:
        """The recorded model with the recorded weights, under ``longctr_compat`` unless overridden, without dropout."""
        params = {**self.hparams, "longctr_compat": True, **overrides}
        model = get_model(self.meta["model"])(self.feature_map, **params)
        model.load_state_dict(model.from_longctr(self.group("state")))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def evaluation(self, model: Any) -> Any:
        """``model`` ready to predict as recorded: draws of the forward that follows are LongCTR's."""
        torch.manual_seed(self.meta["eval_seed"])
        return model.eval()

    def training(self, model: Any) -> Any:
        """``model`` ready for a training forward as recorded."""
        torch.manual_seed(self.meta["train_seed"])
        return model.train()


#: single precision, sums of at most 1,000 terms in another order: 1e-5 of the largest entry
RELATIVE = 1e-5


def close(found: Tensor, wanted: Tensor, name: str, noise: float = 0.0) -> None:
    """Largest difference within `RELATIVE` of the largest entry, and ``noise``: single entries may be sums that cancel."""
    assert found.shape == wanted.shape, name
    assert float((found - wanted).abs().max()) <= RELATIVE * float(wanted.abs().max()) + noise, name


@cache
def tiny_dataset(context: bool = True) -> CTRDataset:
    """The data set of the golden files: 30 rows (for training and validation alike), 60 items, some empty histories."""
    columns: list[dict[str, Any]] = [{"name": name, "type": "meta"} for name in ("user_index", "item_index", "seq_len")]
    columns += CONTEXT_COLUMNS if context else []
    columns += [
        {"name": "item_id", "type": "categorical", "source": "item", "vocab_size": 60},
        {"name": "cate_id", "type": "categorical", "source": "item", "vocab_size": 6},
        {
            "name": "image_emb_dim8",
            "type": "embedding",
            "source": "item",
            "embedding_dim": 8,
            "feature_encoder": "nn.Identity()",
        },
    ]
    params: dict[str, Any] = {
        "dataset_id": "tiny",
        "feature_cols": columns,
        "label_col": {"name": "is_click"},
        "group_id": "user_index",
        "embedding_dim": SMALL["embedding_dim"],
        "item_info": str(TINY / "item_info.parquet"),
        "user_info": str(TINY / "user_info.parquet"),
        "train_data": str(TINY / "train.parquet"),
        "valid_data": str(TINY / "train.parquet"),
    }
    return load_dataset(build_feature_map(params), params)


def tiny_loader(
    split: str = "train", batch_size: int = 8, shuffle: bool = False, dataset: CTRDataset | None = None
) -> SequenceLoader:
    """Batches of the tiny data set."""
    return SequenceLoader(dataset or tiny_dataset(), split, batch_size, TINY_MAX_LEN, shuffle=shuffle, seed=1)


def small_model(
    name: str, folder: Path | None = None, seed: int = 0, dataset: CTRDataset | None = None, **overrides: Any
) -> Any:
    """A small model on the tiny data set; its checkpoints go to ``folder``."""
    seed_everything(seed)
    data = dataset or tiny_dataset()
    own = {key: SMALL[key] for key in model_keys(name) if key in SMALL}
    params = {**SMALL_RUN, **own, "model_id": name, **overrides}
    model = get_model(name)(data.feature_map, item_features=data.item_features(), **params)
    if folder is not None:
        model.place_checkpoints(str(folder))
    return model
