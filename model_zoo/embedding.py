"""FuxiCTR's feature embedding, with pretrained vectors and shared tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor

from model_zoo.compat import FeatureEmbedding, FeatureMap
from model_zoo.errors import ConfigError
from model_zoo.layers.pretrained import PretrainedVectors
from model_zoo.pipeline.feature_map import ENCODERS

#: feature name to ``(vectors [V, p], known [V])``
Pretrained = Mapping[str, tuple[Tensor, Tensor]]


def build_embedding(feature_map: FeatureMap, embedding_dim: int, pretrained: Pretrained) -> FeatureEmbedding:
    """FuxiCTR's feature embedding; features with ``pretrained_emb`` get `PretrainedVectors` in their place.

    Raises:
        ConfigError: a feature names ``pretrained_emb`` but its vectors were not given, or an encoder that is not one of
            `ENCODERS`, which FuxiCTR would evaluate as Python.
    """
    for name, spec in feature_map.features.items():
        encoder, allowed = spec.get("feature_encoder"), ENCODERS.get(spec["type"], ())
        if encoder is not None and encoder not in allowed:
            raise ConfigError(f"{name}: feature_encoder: {encoder!r}: not one of {', '.join(allowed) or 'none'}")
    plain = copy.copy(feature_map)
    plain.features = {
        name: {key: value for key, value in spec.items() if key != "pretrained_emb"}
        for name, spec in feature_map.features.items()
    }
    layer = FeatureEmbedding(plain, embedding_dim)
    for name, spec in feature_map.features.items():
        if "pretrained_emb" in spec:
            if name not in pretrained:
                raise ConfigError(f"{name}: pretrained_emb is set, but its vectors were not loaded (pretrained=)")
            vectors, known = pretrained[name]
            layer.embedding_layer.embedding_layers[name] = PretrainedVectors(
                vectors,
                known,
                spec.get("embedding_dim", embedding_dim),
                spec.get("pretrain_usage", "init"),
                spec.get("freeze_emb", True),
            )
    tables = layer.embedding_layer.embedding_layers
    for name, spec in feature_map.features.items():
        if spec.get("share_embedding") in tables:
            tables[name] = tables[spec["share_embedding"]]
    return layer
